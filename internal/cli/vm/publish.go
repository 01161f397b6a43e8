package vm

import (
	"cmp"
	"fmt"

	"github.com/spf13/cobra"
	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"atoll.dev/atoll/internal/cli/command"
)

func (c *commands) publishCommand() *cobra.Command {
	var library, item, description string
	var w waiting
	cmd := &cobra.Command{
		Use:   "publish <name>",
		Short: "Make an image of a virtual machine",
		Long: `Makes an item of a content library, and by that an image, of the boot disk of a virtual machine. A running one is published
as if its power had been cut; stop it before, or clean the guest up, if that matters.`,
		Example: `  atoll vm publish box --library images --item debian-with-nginx
  atoll vm publish box --no-wait`,
		Args:              command.ExactArgs("name"),
		ValidArgsFunction: c.completeMachines(false),
		RunE: c.with(func(s *session, cmd *cobra.Command, args []string) error {
			vm, err := s.machine(cmd.Context(), args[0])
			if err != nil {
				return err
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
	cmd.Flags().StringVar(&item, "item", "", "name of the image (default: that of the machine and -image)")
	cmd.Flags().StringVar(&description, "description", "", "what it is")
	w.add(cmd, "the image is there")
	return cmd
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
