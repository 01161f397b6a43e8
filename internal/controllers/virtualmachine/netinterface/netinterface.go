// Package netinterface keeps the NetworkInterfaces of a VirtualMachine: one for each of its interfaces that is on a
// Network, with the address of the hardware and, while the machine runs, those of the network.
//
// They are made for clients of VMware's API; nothing here reads them. Called by the controller of VirtualMachines. What
// can go wrong: the API server.
package netinterface

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	netop "atoll.dev/atoll/api/netoperator/v1alpha1"
	"atoll.dev/atoll/internal/controllers/virtualmachine/fields"
)

// Labels of NetworkInterfaces, as VM Operator sets them.
const (
	vmNameLabel    = "vmoperator.vmware.com/vm-name"
	interfaceLabel = "vmoperator.vmware.com/vm-interface-name"
)

// Wanted is one interface.
type Wanted struct {
	NIC     machinev1.NIC
	Network string
	// Addresses that it has now, with prefix length.
	Addresses []string
	// Connected: the machine runs.
	Connected bool
}

// Keep makes the NetworkInterfaces that are wanted, writes how they are, and deletes all others of the machine.
func Keep(ctx context.Context, c client.Client, vm *vmopv1.VirtualMachine, wanted []Wanted, now time.Time) error {
	var have netop.NetworkInterfaceList
	if err := c.List(ctx, &have, client.InNamespace(vm.Namespace), client.MatchingLabels{vmNameLabel: vm.Name}); err != nil {
		return fmt.Errorf("listing NetworkInterfaces: %w", err)
	}
	known := map[string]*netop.NetworkInterface{}
	for i := range have.Items {
		ni := &have.Items[i]
		if !metav1.IsControlledBy(ni, vm) {
			continue
		}
		name := ni.Labels[interfaceLabel]
		if slices.ContainsFunc(wanted, func(w Wanted) bool { return w.NIC.Name == name && w.Network == ni.Spec.NetworkName }) {
			known[name] = ni
			continue
		}
		if err := c.Delete(ctx, ni); err != nil && !apierrors.IsNotFound(err) {
			return fmt.Errorf("deleting NetworkInterface %s: %w", ni.Name, err)
		}
	}
	for _, w := range wanted {
		ni := known[w.NIC.Name]
		if ni == nil {
			ni = object(vm, w)
			if err := c.Create(ctx, ni); apierrors.IsAlreadyExists(err) {
				continue // not in the cache yet, or somebody else's
			} else if err != nil {
				return fmt.Errorf("making NetworkInterface %s: %w", ni.Name, err)
			}
		}
		if err := write(ctx, c, ni, status(w, ni, now)); err != nil {
			return err
		}
	}
	return nil
}

func object(vm *vmopv1.VirtualMachine, w Wanted) *netop.NetworkInterface {
	return &netop.NetworkInterface{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: vm.Namespace, Name: name(vm.Name, w.Network, w.NIC.Name),
			Labels:          map[string]string{vmNameLabel: vm.Name, interfaceLabel: w.NIC.Name},
			OwnerReferences: []metav1.OwnerReference{*metav1.NewControllerRef(vm, vmopv1.GroupVersion.WithKind("VirtualMachine"))},
		},
		Spec: netop.NetworkInterfaceSpec{NetworkName: w.Network, Type: netop.NetworkInterfaceTypeVMXNet3},
	}
}

// name is VM Operator's: of machine, network and interface. One that is too long ends in a sum of the whole.
func name(parts ...string) string {
	const most = 63
	text := strings.Join(parts, "-")
	if len(text) <= most {
		return text
	}
	sum := fmt.Sprintf("%x", sha256.Sum256([]byte(text)))[:10]
	return strings.TrimRight(text[:most-len(sum)-1], "-.") + "-" + sum
}

func status(w Wanted, ni *netop.NetworkInterface, now time.Time) netop.NetworkInterfaceStatus {
	s := netop.NetworkInterfaceStatus{MacAddress: w.NIC.MAC, NetworkID: "pod"}
	if !w.NIC.Pod {
		s.NetworkID = fmt.Sprintf("%s/%d", w.NIC.Bridge, w.NIC.VLAN)
	}
	for _, address := range w.Addresses {
		if p, err := netip.ParsePrefix(address); err == nil {
			s.IPConfigs = append(s.IPConfigs, ipConfig(p, w.NIC))
		}
	}
	ready := netop.NetworkCondition{Type: netop.ConditionReady, Status: metav1.ConditionTrue, Reason: "True"}
	if !w.Connected {
		ready.Status, ready.Reason, ready.Message = metav1.ConditionFalse, "NotConnected", "the virtual machine is powered off"
	}
	for _, c := range ni.Status.Conditions {
		if c.Type == ready.Type && c.Status == ready.Status {
			ready.LastTransitionTime = c.LastTransitionTime
		}
	}
	if ready.LastTransitionTime.IsZero() {
		ready.LastTransitionTime = metav1.NewTime(now.Truncate(time.Second))
	}
	s.Conditions = []netop.NetworkCondition{ready}
	for _, c := range ni.Status.Conditions {
		if c.Type == fields.Condition {
			s.Conditions = append(s.Conditions, c)
		}
	}
	s.Conditions = fields.WithCondition(s.Conditions, fields.OfNetworkInterface(&ni.Spec), now)
	return s
}

// ipConfig is an address as a NetworkInterface has it.
func ipConfig(p netip.Prefix, nic machinev1.NIC) netop.IPConfig {
	c := netop.IPConfig{IP: p.Addr().String(), IPFamily: corev1.IPv6Protocol, Gateway: nic.Gateway6}
	if p.Addr().Is4() {
		c.IPFamily, c.Gateway = corev1.IPv4Protocol, nic.Gateway4
		mask := ^uint32(0) << (32 - p.Bits())
		c.SubnetMask = netip.AddrFrom4([4]byte{byte(mask >> 24), byte(mask >> 16), byte(mask >> 8), byte(mask)}).String()
	}
	return c
}

// write writes a status that has changed.
func write(ctx context.Context, c client.Client, ni *netop.NetworkInterface, s netop.NetworkInterfaceStatus) error {
	was, errWas := json.Marshal(ni.Status)
	now, errNow := json.Marshal(s)
	if errWas == nil && errNow == nil && string(was) == string(now) {
		return nil
	}
	before := ni.DeepCopy()
	ni.Status = s
	if err := c.Status().Patch(ctx, ni, client.MergeFrom(before)); client.IgnoreNotFound(err) != nil {
		return fmt.Errorf("writing the status of NetworkInterface %s: %w", ni.Name, err)
	}
	return nil
}
