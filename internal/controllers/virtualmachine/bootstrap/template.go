package bootstrap

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"text/template"
	"text/template/parse"

	"github.com/vmware-tanzu/vm-operator/api/v1alpha1"
	"github.com/vmware-tanzu/vm-operator/api/v1alpha2"
	"github.com/vmware-tanzu/vm-operator/api/v1alpha3"
	"github.com/vmware-tanzu/vm-operator/api/v1alpha4"

	machinev1 "atoll.dev/atoll/api/machine/v1"
)

// Limits of templates, which tenants write and the server executes.
const (
	maxTemplateOutput = 256 << 10
	maxRangeDepth     = 3
)

// templateData is what a template sees: one value per version of the API.
type templateData struct {
	V1alpha1, V1alpha2, V1alpha3, V1alpha4, V1alpha5 versionData
}

// versionData has the field names of the API's VirtualMachineTemplate.
type versionData struct {
	Net templateNetwork
	VM  any
}

type templateNetwork struct {
	Devices     []templateDevice
	Nameservers []string
}

// templateDevice is a network interface. MacAddress is with dashes, as Windows
// wants it; IPAddresses are with prefix length.
type templateDevice struct {
	Gateway4    string
	MacAddress  string
	IPAddresses []string
}

// renderer executes the templates of one virtual machine.
type renderer struct {
	data  templateData
	funcs template.FuncMap
}

func (in *Input) newRenderer() (*renderer, error) {
	network := in.templateNetwork()
	r := &renderer{funcs: template.FuncMap{}}
	old1, old2, old3, old4 := &v1alpha1.VirtualMachine{}, &v1alpha2.VirtualMachine{}, &v1alpha3.VirtualMachine{}, &v1alpha4.VirtualMachine{}
	if err := errors.Join(
		old1.ConvertFrom(in.VM.DeepCopy()), old2.ConvertFrom(in.VM.DeepCopy()),
		old3.ConvertFrom(in.VM.DeepCopy()), old4.ConvertFrom(in.VM.DeepCopy()),
	); err != nil {
		return nil, invalid("spec.bootstrap", "converting the object for templates: %v", err)
	}
	r.data = templateData{
		V1alpha1: versionData{Net: network, VM: old1},
		V1alpha2: versionData{Net: network, VM: old2},
		V1alpha3: versionData{Net: network, VM: old3},
		V1alpha4: versionData{Net: network, VM: old4},
		V1alpha5: versionData{Net: network, VM: in.VM.DeepCopy()},
	}
	for version := 1; version <= 5; version++ {
		for name, function := range templateFunctions(network) {
			r.funcs[fmt.Sprintf("V1alpha%d_%s", version, name)] = function
		}
	}
	return r, nil
}

// templateNetwork is the network as templates see it, with placeholders for what
// only the host knows.
func (in *Input) templateNetwork() templateNetwork {
	out := templateNetwork{Nameservers: []string{machinev1.PlaceholderDNS}}
	if network := in.VM.Spec.Network; network != nil && len(network.Nameservers) > 0 {
		out.Nameservers = network.Nameservers
	}
	for _, nic := range in.NICs {
		device := templateDevice{
			Gateway4: nic.Gateway4, IPAddresses: slices.Clone(nic.Addresses),
			MacAddress: strings.ReplaceAll(nic.MAC, ":", "-"),
		}
		if nic.Pod {
			device.Gateway4, device.IPAddresses = machinev1.PlaceholderGateway, []string{machinev1.PlaceholderCIDR4}
		}
		out.Devices = append(out.Devices, device)
	}
	return out
}

// render returns a template's result. What cannot be parsed or executed stays as
// it is, as with VM Operator, and the error says why. "\{" is a brace.
func (r *renderer) render(name, text string) (string, error) {
	plain := strings.NewReplacer(`\{`, "{", `\}`, "}").Replace
	if !strings.Contains(text, "{{") {
		return plain(text), nil
	}
	parsed, err := template.New(name).Funcs(r.funcs).Parse(text)
	if err != nil {
		return plain(text), err
	}
	for _, t := range parsed.Templates() {
		if err := checkTemplate(t.Root, 0); err != nil {
			return plain(text), err
		}
	}
	var out boundedText
	if err := parsed.Execute(&out, &r.data); err != nil {
		return plain(text), err
	}
	return plain(out.String()), nil
}

// boundedText refuses more than a template may say.
type boundedText struct{ strings.Builder }

func (b *boundedText) Write(data []byte) (int, error) {
	if b.Len()+len(data) > maxTemplateOutput {
		return 0, fmt.Errorf("the result is larger than %d bytes", maxTemplateOutput)
	}
	return b.Builder.Write(data)
}

// checkTemplate refuses what could keep the server busy: a loop over anything but
// the lists of interfaces, addresses and name servers, and templates that call
// templates.
func checkTemplate(node parse.Node, depth int) error {
	switch n := node.(type) {
	case *parse.ListNode:
		if n == nil {
			return nil
		}
		for _, child := range n.Nodes {
			if err := checkTemplate(child, depth); err != nil {
				return err
			}
		}
	case *parse.IfNode:
		return checkBranch(&n.BranchNode, depth)
	case *parse.WithNode:
		return checkBranch(&n.BranchNode, depth)
	case *parse.RangeNode:
		if depth >= maxRangeDepth {
			return errors.New("loops are nested too deeply")
		}
		if !isKnownList(n.Pipe) {
			return fmt.Errorf("a loop over %s is not possible, only over Devices, IPAddresses and Nameservers", n.Pipe)
		}
		return checkBranch(&n.BranchNode, depth+1)
	case *parse.TemplateNode:
		return errors.New("a template cannot call templates")
	}
	return nil
}

func checkBranch(branch *parse.BranchNode, depth int) error {
	if err := checkTemplate(branch.List, depth); err != nil {
		return err
	}
	return checkTemplate(branch.ElseList, depth)
}

// isKnownList tells whether a loop is over one of the short lists.
func isKnownList(pipe *parse.PipeNode) bool {
	if len(pipe.Cmds) != 1 || len(pipe.Cmds[0].Args) == 0 {
		return false
	}
	args := pipe.Cmds[0].Args
	last := ""
	switch n := args[0].(type) {
	case *parse.FieldNode:
		last = n.Ident[len(n.Ident)-1]
	case *parse.ChainNode:
		last = n.Field[len(n.Field)-1]
	case *parse.VariableNode:
		if len(n.Ident) > 1 {
			last = n.Ident[len(n.Ident)-1]
		}
	case *parse.IdentifierNode:
		return strings.HasPrefix(n.Ident, "V1alpha") && strings.HasSuffix(n.Ident, "_IPsFromNIC")
	}
	return len(args) == 1 && (last == "Devices" || last == "IPAddresses" || last == "Nameservers")
}

// templateFunctions are VM Operator's, by their names without the version.
func templateFunctions(network templateNetwork) template.FuncMap {
	device := func(index int) (templateDevice, error) {
		if index < 0 || index >= len(network.Devices) {
			return templateDevice{}, fmt.Errorf("there is no network interface %d", index)
		}
		return network.Devices[index], nil
	}
	firstIP := func(index int) (string, error) {
		d, err := device(index)
		if err == nil && len(d.IPAddresses) == 0 {
			err = fmt.Errorf("network interface %d has no address", index)
		}
		if err != nil {
			return "", err
		}
		return d.IPAddresses[0], nil
	}
	return template.FuncMap{
		"FirstIP":        func() (string, error) { return firstIP(0) },
		"FirstIPFromNIC": firstIP,
		"FirstNicMacAddr": func() (string, error) {
			d, err := device(0)
			return d.MacAddress, err
		},
		"IPsFromNIC": func(index int) ([]string, error) {
			d, err := device(index)
			return d.IPAddresses, err
		},
		"FormatNameservers": func(count int, delimiter string) (string, error) {
			list := network.Nameservers
			if len(list) == 0 {
				return "", errors.New("there are no name servers")
			}
			if count >= 0 && count < len(list) {
				list = list[:count]
			}
			return strings.Join(list, delimiter), nil
		},
		"SubnetMask": subnetMask,
		"IP":         withDefaultMask,
		"FormatIP":   formatIP,
	}
}

// subnetMask is the mask of an address with prefix length.
func subnetMask(cidr string) (string, error) {
	if cidr == machinev1.PlaceholderCIDR4 {
		return machinev1.PlaceholderNetmask4, nil
	}
	if length, ok := strings.CutPrefix(cidr, machinev1.PlaceholderIP4+"/"); ok {
		cidr = "192.0.2.1/" + length
	}
	prefix, err := netip.ParsePrefix(cidr)
	if err != nil || !prefix.Addr().Is4() {
		return "", fmt.Errorf("%q is not an IPv4 address with prefix length", cidr)
	}
	return net.IP(net.CIDRMask(prefix.Bits(), 32)).String(), nil
}

// withDefaultMask adds the prefix length of the address's class. That of the
// pod's own address is the real one.
func withDefaultMask(address string) (string, error) {
	if address == machinev1.PlaceholderIP4 {
		return machinev1.PlaceholderCIDR4, nil
	}
	ip := net.ParseIP(address)
	if ip == nil || ip.DefaultMask() == nil {
		return "", fmt.Errorf("%q is not an IPv4 address", address)
	}
	ones, _ := ip.DefaultMask().Size()
	return fmt.Sprintf("%s/%d", address, ones), nil
}

// formatIP replaces the prefix length of an address; the mask is "/24",
// "255.255.255.0" or empty for none.
func formatIP(address, mask string) (string, error) {
	ip := machinev1.PlaceholderIP4
	bits := 32
	if address != machinev1.PlaceholderIP4 && address != machinev1.PlaceholderCIDR4 {
		host, _, _ := strings.Cut(address, "/")
		parsed, err := netip.ParseAddr(host)
		if err != nil {
			return "", fmt.Errorf("%q is not an address", address)
		}
		ip, bits = parsed.String(), parsed.BitLen()
	}
	if mask == "" {
		return ip, nil
	}
	length := 0
	if text, ok := strings.CutPrefix(mask, "/"); ok {
		if _, err := fmt.Sscanf(text+" ", "%d ", &length); err != nil || length < 0 || length > bits {
			return "", fmt.Errorf("%q is not a prefix length", mask)
		}
		return fmt.Sprintf("%s/%d", ip, length), nil
	}
	dotted := net.ParseIP(mask)
	if dotted == nil {
		return "", fmt.Errorf("%q is not a mask", mask)
	}
	raw := net.IPMask(dotted.To4())
	if dotted.To4() == nil {
		raw = net.IPMask(dotted)
	}
	ones, size := raw.Size()
	if size != bits {
		return "", fmt.Errorf("%q is not a mask of %s", mask, address)
	}
	return fmt.Sprintf("%s/%d", ip, ones), nil
}
