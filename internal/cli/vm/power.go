package vm

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"
	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"atoll.dev/atoll/internal/cli/command"
)

// power is a command that changes the power state of virtual machines.
type power struct {
	use, short, long, example string
	// change edits the machine, done tells whether it has come about.
	change func(*vmopv1.VirtualMachine, vmopv1.VirtualMachinePowerOpMode) error
	done   func(before, now *vmopv1.VirtualMachine) (bool, error)
	// modes: the command has flags for how hard it is.
	modes bool
	past  string
}

func (c *commands) powerCommand(p power) *cobra.Command {
	var hard, soft bool
	var w waiting
	cmd := &cobra.Command{
		Use: p.use + " <name>...", Short: p.short, Long: p.long, Example: p.example,
		Args:              command.MoreArgs("name"),
		ValidArgsFunction: c.completeMachines(true),
		RunE: c.with(func(s *session, cmd *cobra.Command, args []string) error {
			mode := vmopv1.VirtualMachinePowerOpModeTrySoft
			switch {
			case hard && soft:
				return command.UsageError{Err: errors.New("--hard and --soft exclude each other")}
			case hard:
				mode = vmopv1.VirtualMachinePowerOpModeHard
			case soft:
				mode = vmopv1.VirtualMachinePowerOpModeSoft
			}
			before := map[string]*vmopv1.VirtualMachine{}
			for _, name := range args { // all are told before the first is waited for
				vm, err := c.change(cmd.Context(), s, name, func(vm *vmopv1.VirtualMachine) error { return p.change(vm, mode) })
				if err != nil {
					return err
				}
				before[name] = vm
			}
			for _, name := range args {
				if !w.no {
					err := c.awaitMachine(cmd.Context(), s, name, w, func(vm *vmopv1.VirtualMachine) (bool, string, error) {
						ok, err := p.done(before[name], vm)
						return ok, "", err
					})
					if err != nil {
						return err
					}
				}
				c.Printf("%s %s\n", name, map[bool]string{false: p.past, true: "is asked to " + p.use}[w.no])
			}
			return nil
		}),
	}
	if p.modes {
		cmd.Flags().BoolVar(&hard, "hard", false, "without asking the guest, like the power button held down")
		cmd.Flags().BoolVar(&soft, "soft", false, "only by asking the guest, however long it takes (default: ask, then by force)")
	}
	w.add(cmd, "it is done")
	return cmd
}

// change edits a virtual machine and returns it as it was. A conflict with somebody else's change is tried again.
func (c *commands) change(ctx context.Context, s *session, name string, edit func(*vmopv1.VirtualMachine) error) (*vmopv1.VirtualMachine, error) {
	const tries = 5
	for n := 1; ; n++ {
		vm, err := s.machine(ctx, name)
		if err != nil {
			return nil, err
		}
		before := vm.DeepCopy()
		if err := edit(vm); err != nil {
			return nil, err
		}
		err = s.Patch(ctx, vm, client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{}))
		if apierrors.IsConflict(err) && n < tries {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("changing virtual machine %s: %w", name, err)
		}
		return before, nil
	}
}

func (c *commands) startCommand() *cobra.Command {
	return c.powerCommand(power{
		use: "start", short: "Power virtual machines on", past: "is running",
		long: "Powers virtual machines on. A suspended one goes on where it was.",
		example: `  atoll vm start box
  atoll vm start db web-1 web-2 --no-wait`,
		change: func(vm *vmopv1.VirtualMachine, _ vmopv1.VirtualMachinePowerOpMode) error {
			vm.Spec.PowerState = vmopv1.VirtualMachinePowerStateOn
			return nil
		},
		done: func(_, vm *vmopv1.VirtualMachine) (bool, error) {
			if vm.Spec.PowerState != vmopv1.VirtualMachinePowerStateOn {
				return false, fmt.Errorf("%s: somebody else has set its power state to %s", vm.Name, vm.Spec.PowerState)
			}
			return vm.Status.PowerState == vmopv1.VirtualMachinePowerStateOn, nil
		},
	})
}

func (c *commands) stopCommand() *cobra.Command {
	return c.powerCommand(power{
		use: "stop", short: "Power virtual machines off", past: "is stopped", modes: true,
		long: `Powers virtual machines off: the guest is asked to shut down, and if it does not in five minutes its power is cut.`,
		example: `  atoll vm stop box
  atoll vm stop box --hard`,
		change: func(vm *vmopv1.VirtualMachine, mode vmopv1.VirtualMachinePowerOpMode) error {
			vm.Spec.PowerState, vm.Spec.PowerOffMode = vmopv1.VirtualMachinePowerStateOff, mode
			return nil
		},
		done: func(_, vm *vmopv1.VirtualMachine) (bool, error) {
			if vm.Spec.PowerState != vmopv1.VirtualMachinePowerStateOff {
				return false, fmt.Errorf("%s: somebody else has set its power state to %s", vm.Name, vm.Spec.PowerState)
			}
			return vm.Status.PowerState == vmopv1.VirtualMachinePowerStateOff, nil
		},
	})
}

func (c *commands) suspendCommand() *cobra.Command {
	return c.powerCommand(power{
		use: "suspend", short: "Keep the memory of virtual machines on disk and stop them", past: "is suspended", modes: true,
		long: `Keeps the memory of virtual machines on disk and stops them. ` + "`atoll vm start`" + ` goes on where they were.`,
		example: `  atoll vm suspend box
  atoll vm start box`,
		change: func(vm *vmopv1.VirtualMachine, mode vmopv1.VirtualMachinePowerOpMode) error {
			if vm.Status.PowerState != vmopv1.VirtualMachinePowerStateOn {
				return fmt.Errorf("virtual machine %s is %s, only a running one can be suspended", vm.Name, state(vm))
			}
			vm.Spec.PowerState, vm.Spec.SuspendMode = vmopv1.VirtualMachinePowerStateSuspended, mode
			return nil
		},
		done: func(_, vm *vmopv1.VirtualMachine) (bool, error) {
			if vm.Spec.PowerState != vmopv1.VirtualMachinePowerStateSuspended {
				return false, fmt.Errorf("%s: somebody else has set its power state to %s", vm.Name, vm.Spec.PowerState)
			}
			return vm.Status.PowerState == vmopv1.VirtualMachinePowerStateSuspended, nil
		},
	})
}

func (c *commands) restartCommand() *cobra.Command {
	return c.powerCommand(power{
		use: "restart", short: "Restart the guests of virtual machines", past: "was restarted", modes: true,
		long: `Restarts guests: the guest is asked to, and if it does not it is reset. Hardware that waits for it (atoll vm describe)
changes only when a virtual machine is stopped and started.`,
		example: `  atoll vm restart box
  atoll vm restart box --hard`,
		change: func(vm *vmopv1.VirtualMachine, mode vmopv1.VirtualMachinePowerOpMode) error {
			if vm.Spec.PowerState != vmopv1.VirtualMachinePowerStateOn {
				return fmt.Errorf("virtual machine %s is %s; `atoll vm start %s` starts it", vm.Name, state(vm), vm.Name)
			}
			vm.Spec.NextRestartTime, vm.Spec.RestartMode = "now", mode
			return nil
		},
		done: func(before, vm *vmopv1.VirtualMachine) (bool, error) {
			last, was := vm.Status.LastRestartTime, before.Status.LastRestartTime
			if last == nil || was != nil && !was.Before(last) {
				return false, nil
			}
			if c := meta.FindStatusCondition(vm.Status.Conditions, restarted); is(c, metav1.ConditionFalse) {
				return false, fmt.Errorf("%s was not restarted: %s; try again, or `atoll vm restart %s --hard` restarts it without asking the guest", vm.Name, clean(c.Message), vm.Name)
			}
			return vm.Status.PowerState == vmopv1.VirtualMachinePowerStateOn, nil
		},
	})
}

func (c *commands) deleteCommand() *cobra.Command {
	var w waiting
	cmd := &cobra.Command{
		Use:     "delete <name>...",
		Aliases: []string{"rm"},
		Short:   "Delete virtual machines and their boot disks",
		Long: `Deletes virtual machines, the disks that were made for them, their snapshots and their generated secrets. Claims that
a person made and attached stay.`,
		Example: `  atoll vm delete box
  atoll vm rm box-1 box-2 --no-wait`,
		Args:              command.MoreArgs("name"),
		ValidArgsFunction: c.completeMachines(true),
		RunE: c.with(func(s *session, cmd *cobra.Command, args []string) error {
			for _, name := range args {
				vm, err := s.machine(cmd.Context(), name)
				if err != nil {
					return err
				}
				if err := s.Delete(cmd.Context(), vm, client.Preconditions{UID: &vm.UID}, client.PropagationPolicy(metav1.DeletePropagationBackground)); err != nil {
					return fmt.Errorf("deleting virtual machine %s: %w", name, err)
				}
			}
			for _, name := range args {
				if w.no {
					c.Printf("%s is being deleted\n", name)
					continue
				}
				err := c.await(cmd.Context(), name, w, func(ctx context.Context) (bool, string, error) {
					vm, err := s.machine(ctx, name)
					if apierrors.IsNotFound(err) {
						return true, "", nil
					}
					if err != nil {
						return false, "", err
					}
					if vm.DeletionTimestamp.IsZero() {
						return true, "", nil // another of its name
					}
					return false, "is being deleted since " + vm.DeletionTimestamp.Format(time.TimeOnly), nil
				})
				if err != nil {
					return err
				}
				c.Printf("%s is deleted\n", name)
			}
			return nil
		}),
	}
	w.add(cmd, "they are gone")
	return cmd
}
