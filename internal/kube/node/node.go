// Package node keeps what Atoll says about a host on its Node object: labels and
// the annotation atoll.dev/version.
//
// The kubelet registers the Node; it sets labels only then. The agent role calls
// Describe with the kubelet's own identity, which may change its own Node only.
// What can go wrong: the API server is away; Describe tries again until it is not.
package node

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
)

// VersionAnnotation holds Atoll's version on a Node.
const VersionAnnotation = "atoll.dev/version"

// retryEvery is the pause between two attempts.
const retryEvery = 500 * time.Millisecond

// Config of a node.
type Config struct {
	Kubeconfig string
	Name       string
	Labels     map[string]string
	Version    string
}

// Describe waits for the Node to exist and sets labels and version. It returns an
// error when ctx ends before that, or when the API server refuses.
func Describe(ctx context.Context, cfg Config) error {
	rest, err := clientcmd.BuildConfigFromFlags("", cfg.Kubeconfig)
	if err != nil {
		return fmt.Errorf("describing node: %w", err)
	}
	client, err := kubernetes.NewForConfig(rest)
	if err != nil {
		return fmt.Errorf("describing node: %w", err)
	}
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{
		"labels":      cfg.Labels,
		"annotations": map[string]string{VersionAnnotation: cfg.Version},
	}})
	if err != nil {
		return fmt.Errorf("describing node: %w", err)
	}
	err = wait.PollUntilContextCancel(ctx, retryEvery, true, func(ctx context.Context) (bool, error) {
		_, err := client.CoreV1().Nodes().Patch(ctx, cfg.Name, types.StrategicMergePatchType, patch, metav1.PatchOptions{})
		if apierrors.IsForbidden(err) || apierrors.IsInvalid(err) {
			return false, err
		}
		return err == nil, nil
	})
	if err != nil {
		return fmt.Errorf("describing node: %w", err)
	}
	return nil
}
