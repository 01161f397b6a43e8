package virtualmachine

import (
	"context"
	"fmt"
	"strings"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/client"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	netop "atoll.dev/atoll/api/netoperator/v1alpha1"
	"atoll.dev/atoll/internal/controllers/condition"
	"atoll.dev/atoll/internal/controllers/virtualmachine/machine"
	"atoll.dev/atoll/internal/controllers/virtualmachine/netinterface"
	"atoll.dev/atoll/internal/controllers/virtualmachine/netstatus"
)

const (
	// DefaultInterface is the interface of a machine that names none.
	DefaultInterface = "eth0"
	nicModel         = "virtio-net-pci"
)

// network finds what each interface is connected to.
func (r *Reconciler) network(ctx context.Context, v *view) error {
	vm := v.vm
	v.networks = map[string]string{}
	n := vm.Spec.Network
	if n == nil {
		n = &vmopv1.VirtualMachineNetworkSpec{}
	}
	interfaces := n.Interfaces
	if len(interfaces) == 0 {
		interfaces = []vmopv1.VirtualMachineNetworkInterfaceSpec{{Name: DefaultInterface}}
	}
	if n.Disabled {
		interfaces = nil
	}
	pod := ""
	for i := range interfaces {
		nic, problem, err := r.nic(ctx, v, n, &interfaces[i])
		if err != nil {
			return err
		}
		if problem == "" && nic.Pod && pod != "" {
			problem = fmt.Sprintf("interfaces %s and %s are both on the pod network, and a machine has one interface there: name a Network with spec.bridge for one of them", pod, nic.Name)
		}
		if problem != "" {
			v.lacks(vmopv1.VirtualMachineConditionNetworkReady, reasonOf(problem), "spec.network.interfaces[%d]: %s", i, problem)
			return nil
		}
		if nic.Pod {
			pod = nic.Name
		}
		v.nics = append(v.nics, nic)
	}
	condition.True(&vm.Status.Conditions, vmopv1.VirtualMachineConditionNetworkReady)
	var wanted []netinterface.Wanted
	for _, nic := range v.nics {
		if network := v.networks[nic.Name]; network != "" {
			wanted = append(wanted, netinterface.Wanted{NIC: nic, Network: network, Addresses: netstatus.Addresses(v.live(), nic.Name), Connected: v.alive()})
		}
	}
	return netinterface.Keep(ctx, r.Client, vm, wanted, r.Clock.Now())
}

func reasonOf(problem string) string {
	switch {
	case strings.Contains(problem, "does not exist"):
		return reasonNotFound
	case strings.Contains(problem, "kind"):
		return reasonUnknownKind
	}
	return reasonInvalid
}

// nic is one interface, or why there cannot be such.
func (r *Reconciler) nic(ctx context.Context, v *view, n *vmopv1.VirtualMachineNetworkSpec, i *vmopv1.VirtualMachineNetworkInterfaceSpec) (machinev1.NIC, string, error) {
	nic := machinev1.NIC{
		Name: i.Name, Model: nicModel, MAC: strings.ToLower(i.MACAddr), Pod: true, GuestDevice: i.GuestDeviceName,
		DHCP4: i.DHCP4, DHCP6: i.DHCP6, MTU: int(ptr.Deref(i.MTU, 0)),
		Nameservers: first(i.Nameservers, n.Nameservers), Search: first(i.SearchDomains, n.SearchDomains),
	}
	if nic.MAC == "" {
		nic.MAC = machine.MAC(v.vm, i.Name)
	}
	for _, route := range i.Routes {
		nic.Routes = append(nic.Routes, machinev1.Route{To: route.To, Via: route.Via, Metric: int(route.Metric)})
	}
	if i.Network != nil && i.Network.Name != "" {
		if kind := i.Network.Kind; kind != "" && kind != "Network" {
			return nic, fmt.Sprintf("networks of kind %s are not available: name a Network of %s", kind, netop.Group), nil
		}
		network := &netop.Network{}
		err := r.Get(ctx, client.ObjectKey{Namespace: v.vm.Namespace, Name: i.Network.Name}, network)
		if apierrors.IsNotFound(err) {
			return nic, fmt.Sprintf("Network %s does not exist: make it, name another, or name none for the pod network", i.Network.Name), nil
		}
		if err != nil {
			return nic, "", err
		}
		v.networks[i.Name] = network.Name
		nic.Nameservers, nic.Search = first(nic.Nameservers, network.Spec.DNS), first(nic.Search, network.Spec.DNSSearchDomains)
		switch b := network.Spec.Bridge; {
		case b != nil && network.Spec.Type != netop.NetworkTypePod:
			nic.Pod, nic.Bridge, nic.VLAN = false, b.Name, int(b.VLAN)
		case network.Spec.Type == netop.NetworkTypeBridge:
			return nic, fmt.Sprintf("Network %s is of type bridge, but has no spec.bridge: set it", network.Name), nil
		}
	}
	if nic.Pod {
		return nic, "", nil // the shim knows the address
	}
	nic.Addresses, nic.Gateway4, nic.Gateway6 = i.Addresses, netstatus.Gateway(i.Gateway4), netstatus.Gateway(i.Gateway6)
	if len(nic.Addresses) == 0 && !nic.DHCP4 && !nic.DHCP6 {
		nic.DHCP4 = true
	}
	return nic, "", nil
}

func first(a, b []string) []string {
	if len(a) > 0 {
		return a
	}
	return b
}
