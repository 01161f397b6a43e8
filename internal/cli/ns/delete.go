package ns

import (
	"bufio"
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"sigs.k8s.io/controller-runtime/pkg/client"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/internal/cli/command"
)

func (c *commands) deleteCommand() *cobra.Command {
	var w waiting
	var contents, yes bool
	cmd := &cobra.Command{
		Use:     "delete <name>",
		Aliases: []string{"rm"},
		Short:   "Delete a namespace, and with --with-contents what is in it",
		Long: `Deletes a namespace, everything its limits are made of, and its project in the registry. While there is something in it,
that wants --with-contents: virtual machines, pods, volumes and images are gone then.`,
		Example: `  atoll ns delete shop
  atoll ns delete shop --with-contents --yes`,
		Args: command.ExactArgs("name"), ValidArgsFunction: c.completeNames(false),
		RunE: c.with(func(s client.WithWatch, cmd *cobra.Command, args []string) error {
			b, err := c.get(cmd.Context(), s, args[0])
			if err != nil {
				return err
			}
			inside, err := insideOf(cmd.Context(), s, b)
			if err != nil {
				return err
			}
			if len(inside) > 0 && !contents {
				return fmt.Errorf("%s is not empty, there are %s in it; --with-contents deletes them too", b.Name, strings.Join(inside, ", "))
			}
			if len(inside) > 0 && !yes {
				if ok, err := c.confirm(b.Name, inside); err != nil || !ok {
					return err
				}
			}
			return c.remove(cmd.Context(), s, b, contents, w)
		}),
	}
	cmd.Flags().BoolVar(&contents, "with-contents", false, "delete what is in it, too")
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	w.add(cmd, "it is gone")
	return cmd
}

// kind is something that may be in a namespace.
type kind struct {
	gvk    schema.GroupVersionKind
	plural string
	// ours tells whether the system has made an object, which does not count.
	ours func(metav1.Object) bool
}

func kinds() []kind {
	owned := func(o metav1.Object) bool { return len(o.GetOwnerReferences()) > 0 }
	return []kind{
		{vmopv1.GroupVersion.WithKind("VirtualMachine"), "virtual machines", owned},
		{appsv1.SchemeGroupVersion.WithKind("Deployment"), "deployments", owned},
		{appsv1.SchemeGroupVersion.WithKind("StatefulSet"), "stateful sets", owned},
		{appsv1.SchemeGroupVersion.WithKind("DaemonSet"), "daemon sets", owned},
		{batchv1.SchemeGroupVersion.WithKind("Job"), "jobs", owned},
		{batchv1.SchemeGroupVersion.WithKind("CronJob"), "cron jobs", owned},
		{corev1.SchemeGroupVersion.WithKind("Pod"), "pods", owned},
		{corev1.SchemeGroupVersion.WithKind("PersistentVolumeClaim"), "volumes", func(metav1.Object) bool { return false }},
		{corev1.SchemeGroupVersion.WithKind("Service"), "services", owned},
		{schema.GroupVersionKind{Group: "imageregistry.vmware.com", Version: "v1alpha1", Kind: "ContentLibraryItem"}, "images of virtual machines", func(metav1.Object) bool { return false }},
	}
}

// insideOf says what is in a namespace that somebody would miss.
func insideOf(ctx context.Context, s client.Client, b *atoll.SupervisorNamespace) ([]string, error) {
	var out []string
	for _, k := range kinds() {
		list := &metav1.PartialObjectMetadataList{}
		list.SetGroupVersionKind(k.gvk.GroupVersion().WithKind(k.gvk.Kind + "List"))
		err := s.List(ctx, list, client.InNamespace(b.Name))
		if apierrors.IsForbidden(err) || meta.IsNoMatchError(err) || apierrors.IsNotFound(err) {
			continue // the controller looks again, and refuses
		}
		if err != nil {
			return nil, fmt.Errorf("looking for %s in %s: %w", k.plural, b.Name, err)
		}
		list.Items = slices.DeleteFunc(list.Items, func(o metav1.PartialObjectMetadata) bool {
			return k.ours(&o) || o.Labels[atoll.SupervisorNamespaceLabel] != ""
		})
		if n := len(list.Items); n > 0 {
			out = append(out, fmt.Sprintf("%d %s", n, k.plural))
		}
	}
	if u := usage(b, "registry"); u != nil && u.Used.Sign() > 0 {
		out = append(out, human("registry", &u.Used)+" of images")
	}
	return out, nil
}

// confirm asks a person at a terminal; elsewhere the flag was enough.
func (c *commands) confirm(name string, inside []string) (bool, error) {
	terminal := c.Terminal()
	if terminal == nil {
		return true, nil
	}
	c.Tell("%s has %s in it, which will be gone. To go on, type its name: ", name, strings.Join(inside, ", "))
	line, err := bufio.NewReader(terminal).ReadString('\n')
	if err != nil && line == "" {
		return false, fmt.Errorf("reading the answer: %w", err)
	}
	if strings.TrimSpace(line) != name {
		c.Tell("nothing is deleted\n")
		return false, nil
	}
	return true, nil
}

// remove deletes a SupervisorNamespace and waits until it is gone.
func (c *commands) remove(ctx context.Context, s client.Client, b *atoll.SupervisorNamespace, contents bool, w waiting) error {
	if contents && b.Annotations[atoll.DeleteContentsAnnotation] != "true" {
		before := b.DeepCopy()
		if b.Annotations == nil {
			b.Annotations = map[string]string{}
		}
		b.Annotations[atoll.DeleteContentsAnnotation] = "true"
		if err := s.Patch(ctx, b, client.MergeFrom(before)); err != nil {
			return fmt.Errorf("allowing what is in %s to be deleted: %w", b.Name, err)
		}
	}
	if err := s.Delete(ctx, b, client.Preconditions{UID: &b.UID}); err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("deleting SupervisorNamespace %s: %w", b.Name, err)
	}
	if !w.wait {
		c.Printf("%s is being deleted\n", b.Name)
		return nil
	}
	err := c.await(ctx, b.Name, w, func(ctx context.Context) (bool, string, error) {
		now := &atoll.SupervisorNamespace{}
		err := s.Get(ctx, client.ObjectKeyFromObject(b), now)
		if apierrors.IsNotFound(err) || err == nil && now.UID != b.UID {
			return true, "", nil
		}
		if apierrors.IsForbidden(err) { // the role in it has gone with it
			return true, "", nil
		}
		if err != nil {
			return false, "", err
		}
		if d := meta.FindStatusCondition(now.Status.Conditions, atoll.NamespaceDeleting); d != nil {
			return false, d.Message, nil
		}
		return false, "is being deleted", nil
	})
	if err != nil {
		return err
	}
	c.Printf("%s is deleted\n", b.Name)
	return nil
}
