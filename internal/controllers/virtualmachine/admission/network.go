package admission

import (
	"net"
	"net/netip"
	"regexp"
	"strings"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	"k8s.io/apimachinery/pkg/util/sets"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/apimachinery/pkg/util/validation/field"
)

const (
	maxInterfaces = 10
	minMTU        = 576
	maxMTU        = 65535
	maxFQDN       = 255
	none          = "None"
)

// networks checks spec.network.
func networks(vm *vmopv1.VirtualMachine) field.ErrorList {
	n := vm.Spec.Network
	if n == nil {
		return nil
	}
	path := field.NewPath("spec", "network")
	var errs field.ErrorList
	if n.HostName != "" {
		if _, err := netip.ParseAddr(n.HostName); err != nil {
			for _, problem := range validation.IsDNS1123Label(strings.ToLower(n.HostName)) {
				errs = append(errs, field.Invalid(path.Child("hostName"), n.HostName, problem))
			}
		}
	}
	if n.DomainName != "" {
		for _, problem := range validation.IsDNS1123Subdomain(strings.ToLower(n.DomainName)) {
			errs = append(errs, field.Invalid(path.Child("domainName"), n.DomainName, problem))
		}
		if host := max(len(n.HostName), 1); host+1+len(n.DomainName) > maxFQDN {
			errs = append(errs, field.TooLong(path.Child("domainName"), n.DomainName, maxFQDN-host-1))
		}
	}
	errs = append(errs, nameservers(path.Child("nameservers"), n.Nameservers)...)
	if len(n.Interfaces) > maxInterfaces {
		errs = append(errs, field.TooMany(path.Child("interfaces"), len(n.Interfaces), maxInterfaces))
	}
	names, macs := sets.New[string](), sets.New[string]()
	pattern := regexp.MustCompile(`^[a-z0-9]{2,}$`)
	for i := range n.Interfaces {
		at, nic := path.Child("interfaces").Index(i), &n.Interfaces[i]
		switch {
		case !pattern.MatchString(nic.Name) || len(nic.Name) > validation.DNS1123LabelMaxLength:
			errs = append(errs, field.Invalid(at.Child("name"), nic.Name, "must be at least two of a-z and 0-9"))
		case names.Has(nic.Name):
			errs = append(errs, field.Duplicate(at.Child("name"), nic.Name))
		}
		names.Insert(nic.Name)
		mac := strings.ToLower(nic.MACAddr)
		if mac != "" && macs.Has(mac) {
			errs = append(errs, field.Duplicate(at.Child("macAddr"), nic.MACAddr))
		}
		macs.Insert(mac)
		errs = append(errs, nicErrors(at, nic)...)
	}
	return errs
}

// nicErrors checks one interface.
func nicErrors(at *field.Path, nic *vmopv1.VirtualMachineNetworkInterfaceSpec) field.ErrorList {
	var errs field.ErrorList
	if nic.MACAddr != "" {
		mac, err := net.ParseMAC(nic.MACAddr)
		if err != nil || len(mac) != 6 || mac[0]&1 != 0 || strings.Trim(nic.MACAddr, "0:") == "" {
			errs = append(errs, field.Invalid(at.Child("macAddr"), nic.MACAddr, "must be the address of one interface, such as 02:00:00:12:34:56"))
		}
	}
	four, six := false, false
	for i, text := range nic.Addresses {
		p, err := netip.ParsePrefix(text)
		if err != nil {
			errs = append(errs, field.Invalid(at.Child("addresses").Index(i), text, "must be an address with its prefix length, such as 192.168.1.5/24"))
			continue
		}
		four, six = four || p.Addr().Is4(), six || p.Addr().Is6()
	}
	if nic.DHCP4 && four {
		errs = append(errs, field.Invalid(at.Child("dhcp4"), true, "dhcp4 cannot be used with IPv4 addresses in addresses field"))
	}
	if nic.DHCP6 && six {
		errs = append(errs, field.Invalid(at.Child("dhcp6"), true, "dhcp6 cannot be used with IPv6 addresses in addresses field"))
	}
	if gw := nic.Gateway4; gw != "" && gw != none {
		if a, err := netip.ParseAddr(gw); err != nil || !a.Is4() {
			errs = append(errs, field.Invalid(at.Child("gateway4"), gw, "must be None or an IPv4 address"))
		}
	}
	if gw := nic.Gateway6; gw != "" && gw != none {
		if a, err := netip.ParseAddr(gw); err != nil || !a.Is6() {
			errs = append(errs, field.Invalid(at.Child("gateway6"), gw, "must be None or an IPv6 address"))
		}
	}
	if m := nic.MTU; m != nil && (*m < minMTU || *m > maxMTU) {
		errs = append(errs, field.Invalid(at.Child("mtu"), *m, "must be 576 to 65535"))
	}
	errs = append(errs, nameservers(at.Child("nameservers"), nic.Nameservers)...)
	for i, r := range nic.Routes {
		to := at.Child("routes").Index(i)
		if _, err := netip.ParsePrefix(r.To); err != nil && r.To != "default" {
			errs = append(errs, field.Invalid(to.Child("to"), r.To, `must be "default" or a network with its prefix length`))
		}
		if _, err := netip.ParseAddr(r.Via); err != nil {
			errs = append(errs, field.Invalid(to.Child("via"), r.Via, "must be an address"))
		}
	}
	return errs
}

func nameservers(path *field.Path, list []string) field.ErrorList {
	var errs field.ErrorList
	for i, text := range list {
		if _, err := netip.ParseAddr(text); err != nil {
			errs = append(errs, field.Invalid(path.Index(i), text, "must be an address"))
		}
	}
	return errs
}
