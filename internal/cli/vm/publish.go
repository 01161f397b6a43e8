package vm

import (
	"cmp"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"
	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	imageregistry "atoll.dev/atoll/api/imageregistry/v1alpha1"
	"atoll.dev/atoll/internal/cli/command"
)

func (c *commands) publishCommand() *cobra.Command {
	var library, item, description, to string
	var w waiting
	cmd := &cobra.Command{
		Use:   "publish <name>",
		Short: "Make an image of a virtual machine",
		Long: `Makes an item of a content library, and by that an image, of the boot disk of a virtual machine. A running one is published
as if its power had been cut; stop it before, or clean the guest up, if that matters.

In the library registry it is pushed to the project of the namespace, as registry.atoll.local/NAMESPACE/ITEM:TAG, which
--to says at once.`,
		Example: `  atoll vm publish box --library images --item debian-with-nginx
  atoll vm publish box --to registry.atoll.local/shop/web:1.0
  atoll vm publish box --no-wait`,
		Args:              command.ExactArgs("name"),
		ValidArgsFunction: c.completeMachines(false),
		RunE: c.with(func(s *session, cmd *cobra.Command, args []string) error {
			vm, err := s.machine(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if to != "" {
				if item, err = inRegistry(to, s.namespace, item, library); err != nil {
					return command.UsageError{Err: err}
				}
				library = imageregistry.RegistryLibrary
			}
			name := cmp.Or(item, vm.Name+"-image")
			request, err := c.publish(cmd.Context(), s, vm, name, description, library, w)
			if err != nil {
				return err
			}
			if w.no {
				c.Printf("%s is being published; `kubectl get vmpub %s -o yaml` shows how it is\n", vm.Name, request.Name)
				return nil
			}
			c.Printf("%s is published as %s; the image is %s\n", vm.Name, name, request.Status.ImageName)
			return nil
		}),
	}
	cmd.Flags().StringVar(&library, "library", "", "ContentLibrary it goes to (default: the one labelled imageregistry.vmware.com/default)")
	cmd.Flags().StringVar(&to, "to", "", "REGISTRY/NAMESPACE/NAME[:TAG] of the cluster's registry, in place of --library and --item")
	cmd.Flags().StringVar(&item, "item", "", "name of the image (default: that of the machine and -image)")
	cmd.Flags().StringVar(&description, "description", "", "what it is")
	w.add(cmd, "the image is there")
	return cmd
}

// inRegistry is the item that a name in the registry means, in the library that is the project of the namespace.
func inRegistry(to, namespace, item, library string) (string, error) {
	if item != "" || library != "" {
		return "", errors.New("--to says what --item and --library say; leave those out")
	}
	host, rest, _ := strings.Cut(to, "/")
	project, name, ok := strings.Cut(rest, "/")
	switch {
	case host != atoll.RegistryHost || !ok || name == "":
		return "", fmt.Errorf("--to %q: say %s/%s/NAME, and perhaps :TAG", to, atoll.RegistryHost, namespace)
	case project != namespace:
		return "", fmt.Errorf("--to %q: a virtual machine of namespace %s is published into the project of that namespace; say %s/%s/%s", to, namespace, atoll.RegistryHost, namespace, name)
	case strings.Contains(name, "@"):
		return "", fmt.Errorf("--to %q names a digest; say a tag", to)
	}
	return name, nil
}

// published tells how far a request is.
func published(request *vmopv1.VirtualMachinePublishRequest) (bool, string, error) {
	if request.Status.Ready {
		return true, "", nil
	}
	how := "publishing"
	for _, kind := range []string{
		vmopv1.VirtualMachinePublishRequestConditionSourceValid, vmopv1.VirtualMachinePublishRequestConditionTargetValid,
		vmopv1.VirtualMachinePublishRequestConditionUploaded, vmopv1.VirtualMachinePublishRequestConditionImageAvailable,
	} {
		cond := meta.FindStatusCondition(request.Status.Conditions, kind)
		if !is(cond, metav1.ConditionFalse) {
			continue
		}
		if cond.Reason == vmopv1.FatalReason {
			return false, "", fmt.Errorf("it was not published: %s", say(cond))
		}
		how = say(cond)
		break
	}
	return false, how, nil
}
