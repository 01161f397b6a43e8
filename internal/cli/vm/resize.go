package vm

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"atoll.dev/atoll/internal/cli/command"
)

func (c *commands) resizeCommand() *cobra.Command {
	var class string
	var sizes []string
	var w waiting
	cmd := &cobra.Command{
		Use:   "resize <name>",
		Short: "Give a virtual machine another class, or larger disks",
		Long: `Gives a virtual machine another class, which changes its processors and memory, or makes disks larger. What can be added
while it runs is added; for the rest it says that it has to be stopped and started.`,
		Example: `  atoll vm resize box --class guaranteed-large
  atoll vm resize box --disk boot=40Gi --disk data=200Gi`,
		Args:              command.ExactArgs("name"),
		ValidArgsFunction: c.completeMachines(false),
		RunE: c.with(func(s *session, cmd *cobra.Command, args []string) error {
			if class == "" && len(sizes) == 0 {
				return command.UsageError{Err: errors.New("say what to change: --class CLASS, or --disk NAME=SIZE")}
			}
			for _, d := range sizes {
				if err := c.growDisk(cmd.Context(), s, args[0], d); err != nil {
					return err
				}
			}
			if class == "" {
				return nil
			}
			return c.changeClass(cmd.Context(), s, args[0], class, w)
		}),
	}
	cmd.Flags().StringVar(&class, "class", "", "the new VirtualMachineClass")
	cmd.Flags().StringSliceVar(&sizes, "disk", nil, "new size of a disk: NAME=SIZE, the boot disk is called boot; may be repeated")
	c.complete(cmd, "class", named(classes))
	w.add(cmd, "it is done")
	return cmd
}

func (c *commands) changeClass(ctx context.Context, s *session, name, class string, w waiting) error {
	if err := s.Get(ctx, client.ObjectKey{Namespace: s.namespace, Name: class}, &vmopv1.VirtualMachineClass{}); apierrors.IsNotFound(err) {
		return fmt.Errorf("no class %q in namespace %q; `kubectl get vmclass` lists them: %w", class, s.namespace, err)
	}
	before, err := c.change(ctx, s, name, func(vm *vmopv1.VirtualMachine) error {
		vm.Spec.ClassName, vm.Spec.Class = class, nil
		return nil
	})
	if err != nil {
		return err
	}
	if w.no || before.Spec.ClassName == class {
		c.Printf("%s is of class %s\n", name, class)
		return nil
	}
	pending := ""
	err = c.awaitMachine(ctx, s, name, w, func(vm *vmopv1.VirtualMachine) (bool, string, error) {
		cond := find(vm, vmopv1.VirtualMachineClassConfigurationSynced)
		if is(cond, metav1.ConditionFalse) && slices.Contains([]string{"PowerOffRequired", "PowerCyclePending"}, cond.Reason) {
			pending = clean(cond.Message)
			return true, "", nil
		}
		return is(cond, metav1.ConditionTrue) && vm.Status.Class != nil && vm.Status.Class.Name == class, "changing to class " + class, nil
	})
	if err != nil {
		return err
	}
	if pending != "" {
		c.Printf("%s is of class %s once it was stopped and started (`atoll vm stop %s && atoll vm start %s`): %s\n", name, class, name, name, pending)
		return nil
	}
	c.Printf("%s is of class %s\n", name, class)
	return nil
}

// growDisk makes the claim of a disk larger.
func (c *commands) growDisk(ctx context.Context, s *session, name, wish string) error {
	disk, text, ok := strings.Cut(wish, "=")
	size, err := resource.ParseQuantity(text)
	if !ok || err != nil {
		return command.UsageError{Err: fmt.Errorf("--disk %q: write NAME=SIZE, like boot=40Gi", wish)}
	}
	vm, err := s.machine(ctx, name)
	if err != nil {
		return err
	}
	claim, err := s.claim(ctx, vm, disk)
	if err != nil {
		return err
	}
	if have := claim.Spec.Resources.Requests[corev1.ResourceStorage]; size.Cmp(have) <= 0 {
		return fmt.Errorf("disk %s of %s has %s, and cannot become smaller", disk, name, have.String())
	}
	before := claim.DeepCopy()
	claim.Spec.Resources.Requests[corev1.ResourceStorage] = size
	if err := s.Patch(ctx, claim, client.MergeFrom(before)); err != nil {
		return fmt.Errorf("making disk %s of %s larger: %w", disk, name, err)
	}
	c.Printf("disk %s of %s becomes %s\n", disk, name, size.String())
	return nil
}

// claim is that of a disk of a virtual machine.
func (s *session) claim(ctx context.Context, vm *vmopv1.VirtualMachine, disk string) (*corev1.PersistentVolumeClaim, error) {
	names := []string{"boot"}
	for _, v := range vm.Spec.Volumes {
		names = append(names, v.Name)
		if v.Name != disk || v.PersistentVolumeClaim == nil {
			continue
		}
		claim := &corev1.PersistentVolumeClaim{}
		if err := s.Get(ctx, client.ObjectKey{Namespace: vm.Namespace, Name: v.PersistentVolumeClaim.ClaimName}, claim); err != nil {
			return nil, fmt.Errorf("reading the claim of disk %s: %w", disk, err)
		}
		return claim, nil
	}
	if disk != "boot" {
		return nil, fmt.Errorf("virtual machine %s has no disk %q; it has %s", vm.Name, disk, strings.Join(names, ", "))
	}
	var list corev1.PersistentVolumeClaimList
	if err := s.List(ctx, &list, client.InNamespace(vm.Namespace)); err != nil {
		return nil, fmt.Errorf("looking for the boot disk: %w", err)
	}
	for i := range list.Items {
		owned := slices.ContainsFunc(list.Items[i].OwnerReferences, func(o metav1.OwnerReference) bool { return o.UID == vm.UID })
		if _, image := list.Items[i].Annotations["atoll.dev/image"]; owned && image && strings.HasPrefix(list.Items[i].Name, "disk-") {
			return &list.Items[i], nil
		}
	}
	return nil, fmt.Errorf("virtual machine %s has no boot disk of its own yet", vm.Name)
}
