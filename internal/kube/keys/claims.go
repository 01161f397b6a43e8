package keys

import (
	"context"
	"fmt"
	"slices"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	api "atoll.dev/atoll/api/encryption/v1alpha1"
)

// Claim returns the class of encryption of a claim's volume, "" being none: what the claim's annotation
// names, or if its StorageClass encrypts, which is what fallback says, the default class of its namespace,
// or else fallback. datastore.ErrUnavailable: the API server did not answer as it should.
func (s *Secrets) Claim(ctx context.Context, namespace, name, fallback string) (string, error) {
	claim, err := s.client.CoreV1().PersistentVolumeClaims(namespace).Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return "", fmt.Errorf("reading which EncryptionClass claim %s/%s names: %w", namespace, name, unanswered(err))
	}
	switch class, ok := claim.Annotations[api.ClaimAnnotation]; {
	case ok && (class == "" || strings.Contains(class, "/")):
		return "", fmt.Errorf("annotation %q of claim %s/%s is %q, and must be the name of an EncryptionClass in the claim's namespace",
			api.ClaimAnnotation, namespace, name, class)
	case ok:
		return ClassOf(namespace, class), nil
	case fallback == "":
		return "", nil
	}
	list, err := s.classes.Namespace(namespace).List(ctx, metav1.ListOptions{LabelSelector: api.DefaultLabel + "=true"})
	if err != nil {
		return "", fmt.Errorf("looking for the default EncryptionClass of namespace %s: %w", namespace, unanswered(err))
	}
	var names []string
	for _, class := range list.Items {
		names = append(names, class.GetName())
	}
	slices.Sort(names)
	switch len(names) {
	case 0:
		return fallback, nil
	case 1:
		return ClassOf(namespace, names[0]), nil
	}
	return "", fmt.Errorf("namespace %s has several default EncryptionClasses, %s; remove the label %q from all but one, or name one by the annotation %q of claim %s",
		namespace, strings.Join(names, ", "), api.DefaultLabel, api.ClaimAnnotation, name)
}
