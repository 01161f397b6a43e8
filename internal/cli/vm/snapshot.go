package vm

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"atoll.dev/atoll/internal/cli/command"
	"atoll.dev/atoll/internal/cli/text"
)

func (c *commands) snapshotCommand() *cobra.Command {
	var name, description string
	var memory, quiesce bool
	var w waiting
	cmd := &cobra.Command{
		Use:   "snapshot <vm>",
		Short: "Take a snapshot of a virtual machine",
		Long: `Takes a snapshot of all disks of a virtual machine at one moment, with --memory also of its memory, so that reverting
goes on at that moment. With --quiesce the guest's file systems are made consistent first, which needs the guest agent.`,
		Example: `  atoll vm snapshot box
  atoll vm snapshot box --name before-upgrade --memory`,
		Args:              command.ExactArgs("vm"),
		ValidArgsFunction: c.completeMachines(false),
		RunE: c.with(func(s *session, cmd *cobra.Command, args []string) error {
			vm, err := s.machine(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			snap := &vmopv1.VirtualMachineSnapshot{
				ObjectMeta: metav1.ObjectMeta{Namespace: s.namespace, Name: cmp.Or(name, vm.Name+"-"+c.now().UTC().Format("20060102-150405"))},
				Spec:       vmopv1.VirtualMachineSnapshotSpec{VMName: vm.Name, Memory: memory, Description: description},
			}
			if quiesce {
				snap.Spec.Quiesce = &vmopv1.QuiesceSpec{Timeout: &metav1.Duration{Duration: 5 * time.Minute}}
			}
			if err := s.Create(cmd.Context(), snap); err != nil {
				return fmt.Errorf("taking snapshot %s: %w", snap.Name, err)
			}
			if w.no {
				c.Printf("snapshot %s of %s is being taken\n", snap.Name, vm.Name)
				return nil
			}
			err = c.await(cmd.Context(), snap.Name, w, func(ctx context.Context) (bool, string, error) {
				if err := s.Get(ctx, client.ObjectKeyFromObject(snap), snap); err != nil {
					return false, "", fmt.Errorf("reading snapshot %s: %w", snap.Name, err)
				}
				if created := meta.FindStatusCondition(snap.Status.Conditions, vmopv1.VirtualMachineSnapshotCreatedCondition); is(created, metav1.ConditionFalse) &&
					created.Reason == vmopv1.VirtualMachineSnapshotCreationFailedReason {
					return false, "", fmt.Errorf("snapshot %s failed: %s", snap.Name, clean(created.Message))
				}
				return meta.IsStatusConditionTrue(snap.Status.Conditions, vmopv1.VirtualMachineSnapshotReadyCondition), snapshotState(snap), nil
			})
			if err != nil {
				return err
			}
			c.Printf("snapshot %s of %s is taken\n", snap.Name, vm.Name)
			if quiesce && !snap.Status.Quiesced {
				c.Tell("the file systems of the guest were not quiesced: it is off\n")
			}
			return nil
		}),
	}
	cmd.Flags().StringVar(&name, "name", "", "name of the snapshot (default: of machine and time)")
	cmd.Flags().StringVar(&description, "description", "", "what it is for")
	cmd.Flags().BoolVar(&memory, "memory", false, "with the memory, if the machine is running")
	cmd.Flags().BoolVar(&quiesce, "quiesce", false, "with consistent file systems; fails if the machine runs and its guest agent does not answer")
	w.add(cmd, "it is taken")
	return cmd
}

// snapshotState is how a snapshot is, in words.
func snapshotState(snap *vmopv1.VirtualMachineSnapshot) string {
	if !snap.DeletionTimestamp.IsZero() {
		return "Deleting"
	}
	ready := meta.FindStatusCondition(snap.Status.Conditions, vmopv1.VirtualMachineSnapshotReadyCondition)
	switch {
	case is(ready, metav1.ConditionTrue):
		return "Ready"
	case ready != nil:
		for _, kind := range []string{vmopv1.VirtualMachineSnapshotCreatedCondition, vmopv1.VirtualMachineSnapshotCSIVolumeSyncedCondition} {
			if why := meta.FindStatusCondition(snap.Status.Conditions, kind); is(why, metav1.ConditionFalse) {
				return strings.TrimSuffix(strings.TrimPrefix(why.Reason, "VirtualMachineSnapshot")+": "+clean(why.Message), ": ")
			}
		}
		return strings.TrimPrefix(ready.Reason, "VirtualMachineSnapshot")
	}
	return "Pending"
}

func (c *commands) snapshotsCommand() *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use:     "snapshots [vm]",
		Aliases: []string{"snapshot-ls"},
		Short:   "List snapshots as the trees that they are",
		Long: `Lists the snapshots of a virtual machine, or of all of the namespace. A snapshot is below the one that the machine was at
when it was taken; "*" marks where a machine is now.`,
		Example: `  atoll vm snapshots box
  atoll vm snapshots -o yaml`,
		Args:              command.OptionalArg("vm"),
		ValidArgsFunction: c.completeMachines(false),
		RunE: c.with(func(s *session, cmd *cobra.Command, args []string) error {
			list := &vmopv1.VirtualMachineSnapshotList{}
			if err := s.List(cmd.Context(), list, s.here()); err != nil {
				return fmt.Errorf("listing snapshots: %w", err)
			}
			if len(args) == 1 {
				list.Items = slices.DeleteFunc(list.Items, func(x vmopv1.VirtualMachineSnapshot) bool { return x.Spec.VMName != args[0] })
			}
			slices.SortFunc(list.Items, func(a, b vmopv1.VirtualMachineSnapshot) int {
				return cmp.Or(cmp.Compare(a.Spec.VMName, b.Spec.VMName), a.CreationTimestamp.Compare(b.CreationTimestamp.Time), cmp.Compare(a.Name, b.Name))
			})
			if output != "table" {
				list.SetGroupVersionKind(vmopv1.GroupVersion.WithKind("VirtualMachineSnapshotList"))
				return c.Structured(output, list)
			}
			var vms vmopv1.VirtualMachineList
			if err := s.List(cmd.Context(), &vms, s.here()); err != nil {
				return fmt.Errorf("listing virtual machines: %w", err)
			}
			at := map[string]string{}
			for _, vm := range vms.Items {
				if vm.Status.CurrentSnapshot != nil {
					at[vm.Name] = vm.Status.CurrentSnapshot.Name
				}
			}
			c.Table(tree(list.Items, at))
			return nil
		}),
	}
	command.OutputFlag(cmd, &output, "table", "json", "yaml")
	return cmd
}

// tree are rows of snapshots, children indented below their parents.
func tree(list []vmopv1.VirtualMachineSnapshot, at map[string]string) [][]string {
	rows := [][]string{{"SNAPSHOT", "VM", "STATE", "POWER", "MEMORY", "SIZE", "AGE", "DESCRIPTION"}}
	byName, child := map[string]*vmopv1.VirtualMachineSnapshot{}, map[string]bool{}
	for i := range list {
		byName[list[i].Name] = &list[i]
		for _, ref := range list[i].Status.Children {
			child[ref.Name] = true
		}
	}
	seen := map[string]bool{}
	var add func(x *vmopv1.VirtualMachineSnapshot, depth int)
	add = func(x *vmopv1.VirtualMachineSnapshot, depth int) {
		if seen[x.Name] {
			return // a status that says nonsense ends here
		}
		seen[x.Name] = true
		mark := ""
		if at[x.Spec.VMName] == x.Name {
			mark = " *"
		}
		size := "-"
		if x.Status.Storage != nil && x.Status.Storage.Used != nil {
			size = text.Size(x.Status.Storage.Used.Value())
		}
		rows = append(rows, []string{
			strings.Repeat("  ", depth) + x.Name + mark, x.Spec.VMName, snapshotState(x), cmp.Or(string(x.Status.PowerState), "-"),
			map[bool]string{true: "yes", false: "no"}[x.Spec.Memory], size, text.Age(x.CreationTimestamp.Time), cmp.Or(clean(x.Spec.Description), "-"),
		})
		for _, ref := range x.Status.Children {
			if kid := byName[ref.Name]; kid != nil {
				add(kid, depth+1)
			}
		}
	}
	for i := range list {
		if !child[list[i].Name] {
			add(&list[i], 0)
		}
	}
	for i := range list {
		add(&list[i], 0)
	}
	return rows
}

func (c *commands) revertCommand() *cobra.Command {
	var start bool
	var w waiting
	cmd := &cobra.Command{
		Use:   "revert <vm> <snapshot>",
		Short: "Bring a virtual machine back to a snapshot",
		Long: `Brings all disks and the spec of a virtual machine back to what they were, and its memory if the snapshot has it: then it
goes on where it was, else it is off, unless --start is given. What was written since is lost, unless there is a snapshot
of it.`,
		Example: `  atoll vm revert box before-upgrade
  atoll vm snapshot box --name now && atoll vm revert box before-upgrade`,
		Args:              command.ExactArgs("vm", "snapshot"),
		ValidArgsFunction: c.completeMachines(false, named(func() client.ObjectList { return &vmopv1.VirtualMachineSnapshotList{} })),
		RunE: c.with(func(s *session, cmd *cobra.Command, args []string) error {
			snap := &vmopv1.VirtualMachineSnapshot{}
			err := s.Get(cmd.Context(), client.ObjectKey{Namespace: s.namespace, Name: args[1]}, snap)
			if apierrors.IsNotFound(err) {
				return fmt.Errorf("no snapshot %q in namespace %q; `atoll vm snapshots %s` lists them: %w", args[1], s.namespace, args[0], err)
			}
			if err != nil {
				return fmt.Errorf("reading snapshot %s: %w", args[1], err)
			}
			if snap.Spec.VMName != args[0] {
				return fmt.Errorf("snapshot %s is of virtual machine %s, not of %s", snap.Name, snap.Spec.VMName, args[0])
			}
			_, err = c.change(cmd.Context(), s, args[0], func(vm *vmopv1.VirtualMachine) error {
				vm.Spec.CurrentSnapshotName = snap.Name
				return nil
			})
			if err != nil {
				return err
			}
			if w.no && start {
				return command.UsageError{Err: errors.New("--start waits for the end, and --no-wait does not")}
			}
			if w.no {
				c.Printf("%s is being reverted to %s\n", args[0], snap.Name)
				return nil
			}
			if err := c.awaitMachine(cmd.Context(), s, args[0], w, func(vm *vmopv1.VirtualMachine) (bool, string, error) {
				return reverted(vm, snap.Name)
			}); err != nil {
				return err
			}
			c.Printf("%s is as it was in %s\n", args[0], snap.Name)
			if !start {
				return nil
			}
			_, err = c.change(cmd.Context(), s, args[0], func(vm *vmopv1.VirtualMachine) error {
				vm.Spec.PowerState = vmopv1.VirtualMachinePowerStateOn
				return nil
			})
			return err
		}),
	}
	cmd.Flags().BoolVar(&start, "start", false, "power it on afterwards")
	w.add(cmd, "it is done")
	return cmd
}

// reverted tells whether a revert is done; the controller clears the wish then.
func reverted(vm *vmopv1.VirtualMachine, name string) (bool, string, error) {
	cond := find(vm, vmopv1.VirtualMachineSnapshotRevertSucceeded)
	if is(cond, metav1.ConditionFalse) && cond.Reason != vmopv1.VirtualMachineSnapshotRevertInProgressReason {
		return false, "", errors.New(vm.Name + " was not reverted: " + say(cond))
	}
	if vm.Spec.CurrentSnapshotName == name || is(cond, metav1.ConditionFalse) {
		how := "reverting"
		if cond != nil && cond.Message != "" {
			how += ": " + clean(cond.Message)
		}
		return false, how, nil
	}
	return vm.Status.PowerState == vm.Spec.PowerState, "", nil
}
