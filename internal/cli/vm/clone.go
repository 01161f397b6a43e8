package vm

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"
	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation"
	"sigs.k8s.io/controller-runtime/pkg/client"

	imageregistry "atoll.dev/atoll/api/imageregistry/v1alpha1"
	"atoll.dev/atoll/internal/cli/command"
)

// publish makes an image of a virtual machine and returns the request when that is done.
func (c *commands) publish(ctx context.Context, s *session, vm *vmopv1.VirtualMachine, item, description, library string, w waiting) (*vmopv1.VirtualMachinePublishRequest, error) {
	request := &vmopv1.VirtualMachinePublishRequest{
		ObjectMeta: metav1.ObjectMeta{Namespace: s.namespace, GenerateName: vm.Name + "-"},
		Spec: vmopv1.VirtualMachinePublishRequestSpec{
			Source: vmopv1.VirtualMachinePublishRequestSource{Name: vm.Name, APIVersion: vmopv1.GroupVersion.String(), Kind: "VirtualMachine"},
			Target: vmopv1.VirtualMachinePublishRequestTarget{
				Item:     vmopv1.VirtualMachinePublishRequestTargetItem{Name: item, Description: description},
				Location: vmopv1.VirtualMachinePublishRequestTargetLocation{Name: library},
			},
			TTLSecondsAfterFinished: new(int64(600)),
		},
	}
	if err := s.Create(ctx, request); err != nil {
		return nil, fmt.Errorf("publishing virtual machine %s: %w", vm.Name, err)
	}
	if w.no {
		return request, nil
	}
	err := c.await(ctx, vm.Name, w, func(ctx context.Context) (bool, string, error) {
		if err := s.Get(ctx, client.ObjectKeyFromObject(request), request); err != nil {
			return false, "", fmt.Errorf("reading the request %s: %w", request.Name, err)
		}
		return published(request)
	})
	return request, err
}

func (c *commands) exportCommand() *cobra.Command {
	var file, format string
	var w waiting
	cmd := &cobra.Command{
		Use:   "export <name>",
		Short: "Write the boot disk of a virtual machine into a file",
		Long: `Writes the boot disk into a file: as qcow2, raw, VMDK or OVA, which vSphere and VirtualBox import. An image is made of the
machine for that and deleted afterwards. A running machine is exported as if its power had been cut.`,
		Example: `  atoll vm export box -f box.ova
  atoll vm export box --format qcow2`,
		Args:              command.ExactArgs("name"),
		ValidArgsFunction: c.completeMachines(false),
		RunE: c.with(func(s *session, cmd *cobra.Command, args []string) error {
			if w.no {
				return command.UsageError{Err: errors.New("--no-wait: there is nothing to export before the image is made")}
			}
			vm, err := s.machine(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if file == "" {
				if format == "" {
					format = "qcow2"
				}
				file = vm.Name + "." + format
			}
			item := "export-" + strings.ToLower(rand.Text()[:10])
			request, err := c.publish(cmd.Context(), s, vm, item, "export of "+vm.Name, "", w)
			defer c.unpublish(cmd.Context(), s, item)
			if err != nil {
				return err
			}
			return c.Export(cmd.Context(), *c.flags.KubeConfig, s.namespace, request.Status.ImageName, format, file)
		}),
	}
	cmd.Flags().StringVarP(&file, "file", "f", "", "the file (default: the machine's name in this directory)")
	cmd.Flags().StringVar(&format, "format", "", "qcow2, raw, vmdk or ova (default: from the file's name, or qcow2)")
	w.add(cmd, "it is exported")
	return cmd
}

// unpublish deletes an image that was made for a moment, also when the command was interrupted.
func (c *commands) unpublish(ctx context.Context, s *session, item string) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	object := &imageregistry.ContentLibraryItem{ObjectMeta: metav1.ObjectMeta{Namespace: s.namespace, Name: item}}
	if err := s.Delete(ctx, object); client.IgnoreNotFound(err) != nil {
		c.Tell("the image %s that was made for this is still there (`atoll image rm %s --vm -n %s`): %v\n", item, item, s.namespace, err)
	}
}

func (c *commands) cloneCommand() *cobra.Command {
	var bare, off bool
	var w waiting
	cmd := &cobra.Command{
		Use:   "clone <name> <new>",
		Short: "Make a virtual machine that is a copy of another one",
		Long: `Makes an image of the boot disk, called NEW-image, which stays, and a machine of it with the same class, networks and
configuration and with an identity of its own (UUIDs, MAC and IP addresses, cloud-init instance). Claims that are
attached to the first one are not copied; --without-volumes makes the copy without them. A running machine is copied as
if its power had been cut.`,
		Example: `  atoll vm clone box box-2
  atoll vm clone db db-test --without-volumes --off`,
		Args:              command.ExactArgs("name", "new"),
		ValidArgsFunction: c.completeMachines(false),
		RunE: c.with(func(s *session, cmd *cobra.Command, args []string) error {
			if w.no {
				return command.UsageError{Err: errors.New("--no-wait: the machine is made when its image is there")}
			}
			return c.clone(cmd.Context(), s, args[0], args[1], bare, off, w)
		}),
	}
	cmd.Flags().BoolVar(&bare, "without-volumes", false, "leave out what is attached besides the boot disk")
	cmd.Flags().BoolVar(&off, "off", false, "do not power the copy on")
	w.add(cmd, "it has an address")
	return cmd
}

func (c *commands) clone(ctx context.Context, s *session, name, to string, bare, off bool, w waiting) error {
	if problems := validation.IsDNS1123Label(to); len(problems) > 0 {
		return command.UsageError{Err: fmt.Errorf("name %q: %s", to, strings.Join(problems, "; "))}
	}
	vm, err := s.machine(ctx, name)
	if err != nil {
		return err
	}
	if _, err := s.machine(ctx, to); !apierrors.IsNotFound(err) {
		if err == nil {
			err = fmt.Errorf("there is a virtual machine %q already", to)
		}
		return err
	}
	if attached := claimsOf(vm); len(attached) > 0 && !bare {
		return fmt.Errorf("virtual machine %s has claims that are not copied (%s); leave them out with --without-volumes", name, strings.Join(attached, ", "))
	}
	if _, err := c.publish(ctx, s, vm, to+"-image", "copy of "+name, "", w); err != nil {
		return err
	}
	next := copyOf(vm, to)
	if off {
		next.Spec.PowerState = vmopv1.VirtualMachinePowerStateOff
	}
	from, err := s.image(ctx, to+"-image")
	if err != nil {
		return err
	}
	next.Spec.ImageName, next.Spec.Image = to+"-image", &vmopv1.VirtualMachineImageRef{Kind: from.kind, Name: from.name}
	if err := s.Create(ctx, next); err != nil {
		return fmt.Errorf("making virtual machine %s: %w", to, err)
	}
	if !off {
		if err := c.awaitMachine(ctx, s, to, w, hasAddress); err != nil {
			return err
		}
	}
	if next, err = s.machine(ctx, to); err != nil {
		return err
	}
	c.howToGoOn(next, newMachine{off: off})
	return nil
}

// claimsOf are the claims that a person has attached to a machine.
func claimsOf(vm *vmopv1.VirtualMachine) []string {
	var out []string
	for _, v := range vm.Spec.Volumes {
		if v.PersistentVolumeClaim != nil && !strings.HasPrefix(v.PersistentVolumeClaim.ClaimName, "disk-") {
			out = append(out, v.PersistentVolumeClaim.ClaimName)
		}
	}
	return out
}

// copyOf is a machine like another one, with an identity of its own.
func copyOf(vm *vmopv1.VirtualMachine, name string) *vmopv1.VirtualMachine {
	next := &vmopv1.VirtualMachine{ObjectMeta: metav1.ObjectMeta{Namespace: vm.Namespace, Name: name, Labels: vm.Labels}, Spec: *vm.Spec.DeepCopy()}
	if user := vm.Annotations[userAnnotation]; user != "" {
		metav1.SetMetaDataAnnotation(&next.ObjectMeta, userAnnotation, user)
	}
	next.Spec.BiosUUID, next.Spec.InstanceUUID, next.Spec.CurrentSnapshotName, next.Spec.NextRestartTime = "", "", "", ""
	next.Spec.PowerState, next.Spec.Volumes, next.Spec.GroupName = vmopv1.VirtualMachinePowerStateOn, nil, ""
	if n := next.Spec.Network; n != nil {
		n.HostName = ""
		for i := range n.Interfaces {
			n.Interfaces[i].MACAddr, n.Interfaces[i].Addresses = "", nil
		}
	}
	if b := next.Spec.Bootstrap; b != nil && b.CloudInit != nil {
		b.CloudInit.InstanceID = ""
	}
	return next
}
