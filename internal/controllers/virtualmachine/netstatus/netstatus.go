// Package netstatus is what the status of a VirtualMachine says of its network: which addresses it has, and which it was
// told to have.
//
// The State comes from a host and holds words of the guest: addresses that are none are left out. Called by the controller
// of VirtualMachines; it cannot fail.
package netstatus

import (
	"net/netip"
	"slices"
	"strings"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/controllers/virtualmachine/health"
	"atoll.dev/atoll/internal/controllers/virtualmachine/machine"
)

// firstDeviceKey is VMware's number of a machine's first network interface.
const firstDeviceKey = 4000

// Addresses of an interface with their prefix length: what its host gave it, then what its guest has.
func Addresses(state machinev1.State, nic string) []string {
	var out []string
	mac := ""
	for _, n := range state.NICs {
		if n.Name == nic {
			mac = n.MAC
			out = append(out, n.Addresses...)
		}
	}
	if g := state.Guest; g != nil && mac != "" {
		for _, i := range g.Interfaces {
			if strings.EqualFold(i.MAC, mac) {
				out = append(out, i.Addresses...)
			}
		}
	}
	var valid []string
	for _, a := range out {
		p, err := netip.ParsePrefix(a)
		if err != nil || p.Addr().IsLoopback() || p.Addr().IsUnspecified() || p.Addr().IsMulticast() {
			continue
		}
		if text := p.String(); !slices.Contains(valid, text) && len(valid) < 64 {
			valid = append(valid, text)
		}
	}
	return valid
}

// Of is the status of a machine with interfaces, nil for one without. A machine that does not run has the zero State.
func Of(vm *vmopv1.VirtualMachine, nics []machinev1.NIC, state machinev1.State) *vmopv1.VirtualMachineNetworkStatus {
	if len(nics) == 0 {
		return nil
	}
	s := &vmopv1.VirtualMachineNetworkStatus{HostName: machine.Hostname(vm)}
	if g := state.Guest; g != nil && g.Hostname != "" {
		s.HostName = health.Clean(g.Hostname)
	}
	s.Config = &vmopv1.VirtualMachineNetworkConfigStatus{DNS: &vmopv1.VirtualMachineNetworkConfigDNSStatus{HostName: machine.Hostname(vm)}}
	if n := vm.Spec.Network; n != nil {
		s.Config.DNS.DomainName, s.Config.DNS.Nameservers, s.Config.DNS.SearchDomains = n.DomainName, n.Nameservers, n.SearchDomains
	}
	for i, nic := range nics {
		addresses := Addresses(state, nic.Name)
		is := vmopv1.VirtualMachineNetworkInterfaceStatus{
			Name: nic.Name, DeviceKey: firstDeviceKey + int32(i),
			IP: &vmopv1.VirtualMachineNetworkInterfaceIPStatus{MACAddr: nic.MAC},
		}
		for _, a := range addresses {
			is.IP.Addresses = append(is.IP.Addresses, vmopv1.VirtualMachineNetworkInterfaceIPAddrStatus{Address: a, State: "preferred"})
			addr := netip.MustParsePrefix(a).Addr()
			switch {
			case addr.IsLinkLocalUnicast():
			case addr.Is4() && s.PrimaryIP4 == "":
				s.PrimaryIP4 = addr.String()
			case addr.Is6() && s.PrimaryIP6 == "":
				s.PrimaryIP6 = addr.String()
			}
		}
		s.Interfaces = append(s.Interfaces, is)
		s.Config.Interfaces = append(s.Config.Interfaces, config(nic, state))
	}
	return s
}

// config is what an interface was told to be.
func config(nic machinev1.NIC, state machinev1.State) vmopv1.VirtualMachineNetworkConfigInterfaceStatus {
	c := vmopv1.VirtualMachineNetworkConfigInterfaceStatus{
		Name: nic.Name,
		IP:   &vmopv1.VirtualMachineNetworkConfigInterfaceIPStatus{Addresses: nic.Addresses, Gateway4: nic.Gateway4, Gateway6: nic.Gateway6},
	}
	if nic.DHCP4 || nic.DHCP6 {
		c.IP.DHCP = &vmopv1.VirtualMachineNetworkConfigDHCPStatus{
			IP4: &vmopv1.VirtualMachineNetworkConfigDHCPOptionsStatus{Enabled: nic.DHCP4},
			IP6: &vmopv1.VirtualMachineNetworkConfigDHCPOptionsStatus{Enabled: nic.DHCP6},
		}
	}
	if len(nic.Nameservers)+len(nic.Search) > 0 {
		c.DNS = &vmopv1.VirtualMachineNetworkConfigDNSStatus{Nameservers: nic.Nameservers, SearchDomains: nic.Search}
	}
	for _, n := range state.NICs {
		if n.Name == nic.Name && nic.Pod {
			c.IP.Addresses, c.IP.Gateway4 = n.Addresses, Gateway(n.Gateway4)
		}
	}
	return c
}

// Gateway is an address; VM Operator also knows the word None.
func Gateway(text string) string {
	if addr, err := netip.ParseAddr(text); err == nil {
		return addr.String()
	}
	return ""
}
