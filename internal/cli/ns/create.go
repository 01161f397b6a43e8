package ns

import (
	"cmp"
	"context"
	"fmt"

	"github.com/spf13/cobra"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/internal/cli/command"
)

func (c *commands) createCommand() *cobra.Command {
	var l limits
	var w waiting
	var template, output string
	var dryRun bool
	cmd := &cobra.Command{
		Use:   "create <name>",
		Short: "Make a namespace with limits",
		Long: `Makes a namespace with limits. What is not given is not bounded, or is as the template says. Owners of a namespace may
make more from a template that an administrator offers: atoll ns template ls lists them.`,
		Example: `  atoll ns create shop --cpu-limit 8 --memory-limit 16Gi --storage-class atoll=100Gi --owner anna --view group:auditors
  atoll ns create lab --isolation isolated --egress 10.0.0.0/8 --vm-class best-effort-small --count pods=20,vms=5
  atoll ns create mine --from-template small`,
		Args: command.ExactArgs("name"),
		RunE: c.with(func(s client.WithWatch, cmd *cobra.Command, args []string) error {
			b := &atoll.SupervisorNamespace{ObjectMeta: metav1.ObjectMeta{Name: args[0]}}
			b.Spec.ClassName = template
			if err := l.apply(cmd, &b.Spec); err != nil {
				return command.UsageError{Err: err}
			}
			var options []client.CreateOption
			if dryRun {
				options = append(options, client.DryRunAll)
			}
			err := s.Create(cmd.Context(), b, options...)
			if apierrors.IsAlreadyExists(err) {
				return fmt.Errorf("there is a SupervisorNamespace %s already; `atoll ns edit %s` changes it: %w", b.Name, b.Name, err)
			}
			if err != nil {
				return fmt.Errorf("making SupervisorNamespace %s: %w", b.Name, err)
			}
			if w.wait && !dryRun {
				if err := c.awaitReady(cmd.Context(), s, b, w); err != nil {
					return err
				}
			}
			if done, err := c.structured(output, b); done || err != nil {
				return err
			}
			c.made(b, dryRun, w.wait)
			return nil
		}),
	}
	l.add(cmd)
	cmd.Flags().StringVar(&template, "from-template", "", "SupervisorNamespaceTemplate that says what the flags do not")
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "have the API server check it, and make nothing")
	w.add(cmd, "it is ready")
	command.OutputFlag(cmd, &output, "text", "json", "yaml", "name")
	c.completeLimits(cmd)
	c.complete(cmd, "from-template", named(func() client.ObjectList { return &atoll.SupervisorNamespaceTemplateList{} }))
	return cmd
}

// made tells what was made, and how to go on.
func (c *commands) made(b *atoll.SupervisorNamespace, dryRun, ready bool) {
	switch {
	case dryRun:
		c.Printf("%s would be made\n", b.Name)
	case !ready:
		c.Printf("%s is being made\n", b.Name)
	default:
		c.Printf("%s is ready\n", b.Name)
		if b.Status.RegistryProject != "" {
			c.Printf("images are pushed to %s\n", b.Status.RegistryProject)
		}
	}
}

// awaitReady waits until everything is as the spec says, and reads the object again.
func (c *commands) awaitReady(ctx context.Context, s client.Client, b *atoll.SupervisorNamespace, w waiting) error {
	generation := b.Generation
	return c.await(ctx, b.Name, w, func(ctx context.Context) (bool, string, error) {
		if err := s.Get(ctx, client.ObjectKeyFromObject(b), b); err != nil {
			return false, "", err
		}
		ready := meta.FindStatusCondition(b.Status.Conditions, atoll.NamespaceReady)
		switch {
		case b.DeletionTimestamp != nil:
			return false, "", fmt.Errorf("%s is being deleted", b.Name)
		case ready == nil || b.Status.ObservedGeneration < generation:
			return false, "waiting for the controller", nil
		case ready.Status != metav1.ConditionTrue:
			return false, cmp.Or(ready.Message, ready.Reason), nil
		}
		return true, "", nil
	})
}
