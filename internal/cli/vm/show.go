package vm

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"atoll.dev/atoll/internal/cli/command"
	"atoll.dev/atoll/internal/cli/text"
)

// Conditions of the controller of VirtualMachines.
const (
	guestHealthy = "atoll.dev/GuestHealthy"
	restarted    = "atoll.dev/Restarted"
)

func (c *commands) listCommand() *cobra.Command {
	var output, selector string
	var all bool
	cmd := &cobra.Command{
		Use:     "ls [name]...",
		Aliases: []string{"list"},
		Short:   "List virtual machines, and what keeps them from running",
		Example: `  atoll vm ls
  atoll vm ls -A -o wide
  atoll vm ls -l app=web -o name`,
		ValidArgsFunction: c.completeMachines(true),
		RunE: c.with(func(s *session, cmd *cobra.Command, args []string) error {
			options := []client.ListOption{client.InNamespace(s.namespace)}
			if all {
				options[0] = client.InNamespace("")
			}
			if selector != "" {
				parsed, err := labels.Parse(selector)
				if err != nil {
					return command.UsageError{Err: fmt.Errorf("--selector: %w", err)}
				}
				options = append(options, client.MatchingLabelsSelector{Selector: parsed})
			}
			list := &vmopv1.VirtualMachineList{}
			if err := s.List(cmd.Context(), list, options...); err != nil {
				return fmt.Errorf("listing virtual machines: %w", err)
			}
			if len(args) > 0 {
				list.Items = slices.DeleteFunc(list.Items, func(vm vmopv1.VirtualMachine) bool { return !slices.Contains(args, vm.Name) })
			}
			slices.SortFunc(list.Items, func(a, b vmopv1.VirtualMachine) int {
				return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
			})
			return c.printMachines(list, output, all, s.namespace)
		}),
	}
	command.OutputFlag(cmd, &output, "table", "wide", "json", "yaml", "name")
	cmd.Flags().StringVarP(&selector, "selector", "l", "", "only those with these labels: app=web,tier!=front")
	cmd.Flags().BoolVarP(&all, "all-namespaces", "A", false, "in all namespaces")
	return cmd
}

func (c *commands) printMachines(list *vmopv1.VirtualMachineList, output string, all bool, namespace string) error {
	switch output {
	case "json", "yaml":
		list.SetGroupVersionKind(vmopv1.GroupVersion.WithKind("VirtualMachineList"))
		for i := range list.Items {
			typed(&list.Items[i])
		}
		return c.Structured(output, list)
	case "name":
		for i := range list.Items {
			if _, err := c.structured(output, &list.Items[i]); err != nil {
				return err
			}
		}
		return nil
	}
	if len(list.Items) == 0 {
		c.Tell("no virtual machines in namespace %q; `atoll vm create NAME --image IMAGE` makes one, -A looks into all namespaces\n", namespace)
		return nil
	}
	c.table(list.Items, output == "wide", all)
	return nil
}

// table prints virtual machines, and what is wrong with them below.
func (c *commands) table(list []vmopv1.VirtualMachine, wide, namespaces bool) {
	head := []string{"NAME", "STATE", "CLASS", "IMAGE", "ADDRESS", "AGE"}
	if wide {
		head = append(head, "NODE", "ZONE", "DISKS", "GUEST", "SNAPSHOT")
	}
	if namespaces {
		head = append([]string{"NAMESPACE"}, head...)
	}
	rows, problems := [][]string{head}, []string(nil)
	for i := range list {
		vm := &list[i]
		row := []string{vm.Name, state(vm), cmp.Or(vm.Spec.ClassName, "-"), image(vm), cmp.Or(address(vm), "-"), text.Age(vm.CreationTimestamp.Time)}
		if wide {
			guest, snapshot := "-", "-"
			if vm.Status.Guest != nil {
				guest = cmp.Or(vm.Status.Guest.GuestFullName, vm.Status.Guest.GuestID, "-")
			}
			if vm.Status.CurrentSnapshot != nil {
				snapshot = cmp.Or(vm.Status.CurrentSnapshot.Name, "-")
			}
			row = append(row, cmp.Or(vm.Status.NodeName, "-"), cmp.Or(vm.Status.Zone, "-"), disks(vm), guest, snapshot)
		}
		if namespaces {
			row = append([]string{vm.Namespace}, row...)
		}
		rows = append(rows, row)
		if why := problem(vm); why != "" {
			problems = append(problems, vm.Name+": "+why)
		}
	}
	c.Table(rows)
	for _, p := range problems {
		c.Printf("%s\n", p)
	}
}

// state is how a virtual machine is, in one word.
func state(vm *vmopv1.VirtualMachine) string {
	want, have := vm.Spec.PowerState, vm.Status.PowerState
	switch {
	case !vm.DeletionTimestamp.IsZero():
		return "Deleting"
	case want == vmopv1.VirtualMachinePowerStateOn && have != want:
		if blocker(vm) != nil {
			return "Waiting"
		}
		return "Starting"
	case want == vmopv1.VirtualMachinePowerStateOff && have == vmopv1.VirtualMachinePowerStateOn:
		return "Stopping"
	case want == vmopv1.VirtualMachinePowerStateSuspended && have == vmopv1.VirtualMachinePowerStateOn:
		return "Suspending"
	case have == vmopv1.VirtualMachinePowerStateOn:
		if ready := find(vm, vmopv1.ReadyConditionType); ready != nil && ready.Status != metav1.ConditionTrue {
			return "NotReady"
		}
		return "Running"
	case have == vmopv1.VirtualMachinePowerStateSuspended:
		return "Suspended"
	case have == vmopv1.VirtualMachinePowerStateOff, want == vmopv1.VirtualMachinePowerStateOff:
		return "Stopped"
	}
	return "Unknown"
}

// blockers are conditions that a virtual machine cannot run without, in the order in which they come true.
func blockers() []string {
	return []string{
		vmopv1.VirtualMachineConditionClassReady, vmopv1.VirtualMachineConditionImageReady, vmopv1.VirtualMachineConditionImageCacheReady,
		vmopv1.VirtualMachineConditionVMSetResourcePolicyReady, vmopv1.VirtualMachineConditionStorageReady,
		vmopv1.VirtualMachineConditionBootstrapReady, vmopv1.VirtualMachineConditionNetworkReady,
		vmopv1.VirtualMachineConditionPlacementReady, vmopv1.VirtualMachineConditionCreated, vmopv1.VirtualMachinePowerStateSynced,
	}
}

// blocker is the first condition that keeps a virtual machine from running.
func blocker(vm *vmopv1.VirtualMachine) *metav1.Condition {
	for _, kind := range blockers() {
		if c := find(vm, kind); c != nil && c.Status == metav1.ConditionFalse {
			return c
		}
	}
	return nil
}

// problem is what a person should know about a virtual machine that does not do what it should.
func problem(vm *vmopv1.VirtualMachine) string {
	if vm.Status.PowerState != vm.Spec.PowerState {
		if c := blocker(vm); c != nil {
			return say(c)
		}
	}
	// These are wrong when they are False, whatever the power state.
	for _, c := range vm.Status.Conditions {
		named := slices.Contains([]string{
			vmopv1.VirtualMachineSnapshotRevertSucceeded, vmopv1.VirtualMachineClassConfigurationSynced, vmopv1.GuestBootstrapCondition,
			vmopv1.VirtualMachineHardwareDeviceConfigVerified, guestHealthy, vmopv1.ReadyConditionType,
		}, c.Type)
		if named && c.Status == metav1.ConditionFalse {
			return say(&c)
		}
	}
	for _, v := range vm.Status.Volumes {
		if v.Error != "" {
			return "volume " + v.Name + ": " + clean(v.Error)
		}
	}
	return ""
}

// say is a condition in words.
func say(c *metav1.Condition) string {
	if c.Message == "" {
		return c.Type + ": " + c.Reason
	}
	return fmt.Sprintf("%s: %s (%s)", c.Type, clean(c.Message), c.Reason)
}

// clean makes one line without control characters of what may come from a guest.
func clean(s string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r == '\n' || r == '\t':
			return ' '
		case r < ' ' || r >= 0x7f && r < 0xa0:
			return -1
		}
		return r
	}, s)
}

func find(vm *vmopv1.VirtualMachine, kind string) *metav1.Condition {
	i := slices.IndexFunc(vm.Status.Conditions, func(c metav1.Condition) bool { return c.Type == kind })
	if i < 0 {
		return nil
	}
	return &vm.Status.Conditions[i]
}

func address(vm *vmopv1.VirtualMachine) string {
	if vm.Status.Network == nil {
		return ""
	}
	return clean(cmp.Or(vm.Status.Network.PrimaryIP4, vm.Status.Network.PrimaryIP6))
}

func image(vm *vmopv1.VirtualMachine) string {
	if vm.Spec.ImageName != "" {
		return vm.Spec.ImageName
	}
	if vm.Spec.Image != nil {
		return cmp.Or(vm.Spec.Image.Name, "-")
	}
	return "-"
}

func disks(vm *vmopv1.VirtualMachine) string {
	attached := 0
	for _, v := range vm.Status.Volumes {
		if v.Attached {
			attached++
		}
	}
	return fmt.Sprintf("%d/%d", attached, len(vm.Status.Volumes))
}
