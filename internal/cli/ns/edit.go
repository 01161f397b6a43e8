package ns

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/client-go/util/retry"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/yaml"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/internal/cli/command"
)

func (c *commands) editCommand() *cobra.Command {
	var l limits
	var w waiting
	var output string
	cmd := &cobra.Command{
		Use:   "edit <name>",
		Short: "Change the limits of a namespace, by flags or in an editor",
		Long: `Changes what a namespace is bounded by, live. With flags, what they name is changed: lists are replaced, people are added
to or moved between roles. Without flags the spec is opened in $KUBE_EDITOR or $EDITOR. A limit below what is used is
accepted and shown as over the limit; nothing is evicted.`,
		Example: `  atoll ns edit shop --memory-limit 32Gi --cpu-reservation none
  atoll ns edit shop --owner bob --remove-access anna
  atoll ns edit shop --vm-class any
  EDITOR=nano atoll ns edit shop`,
		Args: command.ExactArgs("name"), ValidArgsFunction: c.completeNames(false),
		RunE: c.with(func(s client.WithWatch, cmd *cobra.Command, args []string) error {
			b, err := c.get(cmd.Context(), s, args[0])
			if err != nil {
				return err
			}
			changed := false
			if l.given(cmd) {
				changed, err = c.changeByFlags(cmd, s, b, &l)
			} else {
				changed, err = c.changeInEditor(cmd.Context(), s, b)
			}
			if err != nil {
				return err
			}
			if changed && w.wait {
				if err := c.awaitReady(cmd.Context(), s, b, w); err != nil {
					return err
				}
			}
			if done, err := c.structured(output, b); done || err != nil {
				return err
			}
			if !changed {
				c.Printf("%s is not changed\n", b.Name)
				return nil
			}
			c.Printf("%s is changed\n", b.Name)
			for _, why := range wrong(b) {
				c.Tell("%s: %s\n", b.Name, why)
			}
			return nil
		}),
	}
	l.add(cmd)
	cmd.Flags().StringSliceVar(&l.remove, "remove-access", nil, "who loses the role: USER or "+groupPrefix+"GROUP")
	w.add(cmd, "the change is in effect")
	command.OutputFlag(cmd, &output, "text", "json", "yaml", "name")
	c.completeLimits(cmd)
	c.complete(cmd, "remove-access", nothingToPropose)
	return cmd
}

// changeByFlags changes what flags name. When somebody else was faster it is done again to what is there then.
func (c *commands) changeByFlags(cmd *cobra.Command, s client.Client, b *atoll.SupervisorNamespace, l *limits) (bool, error) {
	changed := false
	err := retry.RetryOnConflict(retry.DefaultBackoff, func() error {
		before := b.DeepCopy()
		if err := l.apply(cmd, &b.Spec); err != nil {
			return command.UsageError{Err: err}
		}
		if changed = !equality.Semantic.DeepEqual(before.Spec, b.Spec); !changed {
			return nil
		}
		err := s.Patch(cmd.Context(), b, client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{}))
		if apierrors.IsConflict(err) {
			if err := s.Get(cmd.Context(), client.ObjectKeyFromObject(b), b); err != nil {
				return err
			}
		}
		return err
	})
	if err != nil {
		return false, fmt.Errorf("changing SupervisorNamespace %s: %w", b.Name, err)
	}
	return changed, nil
}

// header is above what is edited.
const header = `# The spec of SupervisorNamespace %s. Lines that begin with # are left out; save it empty or unchanged to leave it as it is.
`

// errNothing is what an empty file says.
var errNothing = errors.New("the file is empty")

// changeInEditor has a person change the spec. What is wrong with it is written above, and it is opened again.
func (c *commands) changeInEditor(ctx context.Context, s client.Client, b *atoll.SupervisorNamespace) (bool, error) {
	dir, err := os.MkdirTemp("", "atoll-ns-")
	if err != nil {
		return false, fmt.Errorf("making a file to edit: %w", err)
	}
	path := filepath.Join(dir, b.Name+".yaml")
	original, err := yaml.Marshal(map[string]any{"spec": b.Spec})
	if err != nil {
		return false, fmt.Errorf("writing the spec as YAML: %w", err)
	}
	shown, complaint := original, ""
	for {
		content := append([]byte(fmt.Sprintf(header, b.Name)+complaint), shown...)
		if err := os.WriteFile(path, content, 0o600); err != nil {
			return false, fmt.Errorf("writing %s: %w", path, err)
		}
		if err := c.Edit(ctx, path); err != nil {
			return false, fmt.Errorf("editing %s: %w", path, err)
		}
		edited, err := os.ReadFile(path)
		if err != nil {
			return false, fmt.Errorf("reading %s: %w", path, err)
		}
		text := uncommented(edited)
		if bytes.Equal(text, original) || len(bytes.TrimSpace(text)) == 0 {
			return false, os.RemoveAll(dir)
		}
		if complaint != "" && bytes.Equal(text, shown) {
			return false, fmt.Errorf("%s is as it was, and what was edited is in %s: %s", b.Name, path, strings.ReplaceAll(strings.TrimSpace(complaint), "# ", ""))
		}
		err = c.put(ctx, s, b, text)
		if err == nil {
			return true, os.RemoveAll(dir)
		}
		shown, complaint = text, "# It was not taken: "+strings.ReplaceAll(err.Error(), "\n", "\n# ")+"\n"
	}
}

// uncommented leaves out comments.
func uncommented(text []byte) []byte {
	var out []byte
	for line := range bytes.Lines(text) {
		if !bytes.HasPrefix(line, []byte("#")) {
			out = append(out, line...)
		}
	}
	return out
}

// put writes an edited spec, unless somebody else has changed it since b was read.
func (c *commands) put(ctx context.Context, s client.Client, b *atoll.SupervisorNamespace, text []byte) error {
	var edited struct {
		Spec *atoll.SupervisorNamespaceSpec `json:"spec"`
	}
	if err := yaml.UnmarshalStrict(text, &edited); err != nil {
		return err
	}
	if edited.Spec == nil {
		return errNothing
	}
	next := b.DeepCopy()
	next.Spec = *edited.Spec
	err := s.Patch(ctx, next, client.MergeFromWithOptions(b, client.MergeFromWithOptimisticLock{}))
	if apierrors.IsConflict(err) {
		return fmt.Errorf("somebody else has changed %s since it was opened; save your changes elsewhere, leave and edit it again: %w", b.Name, err)
	}
	if err != nil {
		return err
	}
	*b = *next
	return nil
}
