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
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"atoll.dev/atoll/internal/cli/command"
	"atoll.dev/atoll/internal/cli/text"
)

func (c *commands) eventsCommand() *cobra.Command {
	return &cobra.Command{
		Use:               "events <name>",
		Short:             "Show what has happened to a virtual machine, its pod, disks and snapshots",
		Example:           `  atoll vm events box`,
		Args:              command.ExactArgs("name"),
		ValidArgsFunction: c.completeMachines(false),
		RunE: c.with(func(s *session, cmd *cobra.Command, args []string) error {
			list, err := s.events(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if len(list) == 0 {
				c.Tell("nothing is known of %s; events are kept for an hour\n", args[0])
				return nil
			}
			c.printEvents(list)
			return nil
		}),
	}
}

// event is one thing that has happened.
type event struct {
	last                          time.Time
	count                         int32
	kind, reason, object, message string
}

// events collects those of a virtual machine and of what is named after it or used by it, oldest first.
func (s *session) events(ctx context.Context, name string) ([]event, error) {
	about := map[string]bool{"VirtualMachine/" + name: true, "Pod/" + name: true, "VirtualMachineWebConsoleRequest/" + name: true}
	vm, err := s.machine(ctx, name)
	if err == nil {
		for _, v := range vm.Spec.Volumes {
			if v.PersistentVolumeClaim != nil {
				about["PersistentVolumeClaim/"+v.PersistentVolumeClaim.ClaimName] = true
			}
		}
		var claims corev1.PersistentVolumeClaimList
		if s.List(ctx, &claims, s.here()) == nil {
			for _, claim := range claims.Items {
				if slices.ContainsFunc(claim.OwnerReferences, func(o metav1.OwnerReference) bool { return o.UID == vm.UID }) {
					about["PersistentVolumeClaim/"+claim.Name] = true
				}
			}
		}
	}
	var snaps vmopv1.VirtualMachineSnapshotList
	if s.List(ctx, &snaps, s.here()) == nil {
		for _, x := range snaps.Items {
			if x.Spec.VMName == name {
				about["VirtualMachineSnapshot/"+x.Name] = true
			}
		}
	}
	var list corev1.EventList
	if listErr := s.List(ctx, &list, s.here()); listErr != nil {
		return nil, fmt.Errorf("listing events: %w", errors.Join(listErr, err))
	}
	var out []event
	for _, e := range list.Items {
		if !about[e.InvolvedObject.Kind+"/"+e.InvolvedObject.Name] {
			continue
		}
		last, count := e.LastTimestamp.Time, max(e.Count, 1)
		if e.Series != nil {
			last, count = e.Series.LastObservedTime.Time, e.Series.Count
		}
		if last.IsZero() {
			last = cmp.Or(e.EventTime.Time, e.CreationTimestamp.Time)
		}
		out = append(out, event{last: last, count: count, kind: e.Type, reason: e.Reason, object: e.InvolvedObject.Kind + "/" + e.InvolvedObject.Name, message: clean(e.Message)})
	}
	slices.SortStableFunc(out, func(a, b event) int { return a.last.Compare(b.last) })
	if len(out) == 0 && err != nil {
		return nil, err
	}
	return out, nil
}

func (c *commands) printEvents(list []event) {
	rows := [][]string{{"AGE", "TYPE", "REASON", "OBJECT", "MESSAGE"}}
	for _, e := range list {
		message := e.message
		if e.count > 1 {
			message = fmt.Sprintf("%s (%d times)", message, e.count)
		}
		rows = append(rows, []string{text.Age(e.last), e.kind, e.reason, e.object, message})
	}
	c.Table(rows)
}

func (c *commands) describeCommand() *cobra.Command {
	return &cobra.Command{
		Use:               "describe <name>",
		Aliases:           []string{"show"},
		Short:             "Show everything about a virtual machine",
		Example:           `  atoll vm describe box`,
		Args:              command.ExactArgs("name"),
		ValidArgsFunction: c.completeMachines(false),
		RunE: c.with(func(s *session, cmd *cobra.Command, args []string) error {
			vm, err := s.machine(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			class := &vmopv1.VirtualMachineClass{}
			if err := s.Get(cmd.Context(), client.ObjectKey{Namespace: s.namespace, Name: vm.Spec.ClassName}, class); err != nil {
				class = nil // it may be gone, or not ours to read
			}
			c.describe(vm, class)
			list, err := s.events(cmd.Context(), vm.Name)
			if err != nil {
				return err
			}
			if len(list) > 0 {
				c.Printf("\nEvents:\n")
				c.printEvents(list)
			}
			return nil
		}),
	}
}

// describe prints a virtual machine in paragraphs.
func (c *commands) describe(vm *vmopv1.VirtualMachine, class *vmopv1.VirtualMachineClass) {
	size := cmp.Or(vm.Spec.ClassName, "-")
	if class != nil {
		size += fmt.Sprintf(" (%d CPUs, %s)", class.Spec.Hardware.Cpus, text.Size(class.Spec.Hardware.Memory.Value()))
	}
	rows := [][]string{
		{"Name:", vm.Namespace + "/" + vm.Name},
		{"State:", state(vm)},
		{"Class:", size},
		{"Image:", image(vm)},
		{"Node:", cmp.Or(vm.Status.NodeName, "-")},
		{"Address:", cmp.Or(address(vm), "-")},
		{"BIOS UUID:", cmp.Or(vm.Status.BiosUUID, vm.Spec.BiosUUID, "-")},
	}
	if why := problem(vm); why != "" {
		rows = slices.Insert(rows, 2, []string{"", why})
	}
	if vm.Status.Network != nil {
		rows = append(rows, []string{"Host name:", cmp.Or(clean(vm.Status.Network.HostName), "-")})
	}
	if vm.Status.Guest != nil {
		rows = append(rows, []string{"Guest:", cmp.Or(clean(vm.Status.Guest.GuestFullName), vm.Status.Guest.GuestID, "-")})
	}
	if vm.Spec.GroupName != "" {
		rows = append(rows, []string{"Group:", vm.Spec.GroupName})
	}
	if at := vm.Status.CurrentSnapshot; at != nil {
		rows = append(rows, []string{"Snapshot:", cmp.Or(at.Name, string(at.Type))})
	}
	rows = append(rows, []string{"Made:", text.Age(vm.CreationTimestamp.Time) + " ago"})
	c.Table(rows)
	c.describeDevices(vm)
	if len(vm.Status.Conditions) > 0 {
		rows := [][]string{{"CONDITION", "STATUS", "SINCE", "REASON", "MESSAGE"}}
		for _, cond := range vm.Status.Conditions {
			rows = append(rows, []string{cond.Type, string(cond.Status), text.Age(cond.LastTransitionTime.Time), cond.Reason, cmp.Or(clean(cond.Message), "-")})
		}
		c.Printf("\nConditions:\n")
		c.Table(rows)
	}
}

func (c *commands) describeDevices(vm *vmopv1.VirtualMachine) {
	if len(vm.Status.Volumes) > 0 {
		rows := [][]string{{"NAME", "ATTACHED", "SIZE", "PLACE", "UUID", "ERROR"}}
		for _, v := range vm.Status.Volumes {
			size, place := "-", "-"
			if v.Limit != nil {
				size = text.Size(v.Limit.Value())
			}
			if v.ControllerBusNumber != nil && v.UnitNumber != nil {
				place = fmt.Sprintf("%s %d:%d", v.ControllerType, *v.ControllerBusNumber, *v.UnitNumber)
			}
			rows = append(rows, []string{v.Name, map[bool]string{true: "yes", false: "no"}[v.Attached], size, place, cmp.Or(v.DiskUUID, "-"), cmp.Or(clean(v.Error), "-")})
		}
		c.Printf("\nVolumes:\n")
		c.Table(rows)
	}
	if vm.Status.Network != nil && len(vm.Status.Network.Interfaces) > 0 {
		rows := [][]string{{"NAME", "MAC", "ADDRESSES"}}
		for _, i := range vm.Status.Network.Interfaces {
			mac, addresses := "-", []string(nil)
			if i.IP != nil {
				mac = cmp.Or(i.IP.MACAddr, "-")
				for _, a := range i.IP.Addresses {
					addresses = append(addresses, clean(a.Address))
				}
			}
			rows = append(rows, []string{cmp.Or(i.Name, "-"), clean(mac), cmp.Or(strings.Join(addresses, ", "), "-")})
		}
		c.Printf("\nNetwork interfaces:\n")
		c.Table(rows)
	}
}
