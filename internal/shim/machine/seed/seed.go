// Package seed makes the disk from which a guest reads its configuration (cloud-init's NoCloud, an OVF environment,
// an answer file): an ISO 9660 image of the files of a Secret, in which placeholders are replaced by what only the
// host knows, the addresses of the pod.
//
// It does not know what the files mean; the controller of virtual machines writes them. internal/shim/machine is its
// caller. The image is in memory only, since there are passwords and keys in it. What can go wrong: the files are
// too large, or have names that a file system cannot have; errors name the file.
package seed

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/linux/memfd"
	"atoll.dev/atoll/internal/shim/machine/iso"
)

// Bounds of the files.
const (
	maxFiles = 256
	maxFile  = 4 << 20
)

// Network is what the host knows of the pod's own interface.
type Network struct {
	MAC       string
	MTU       int
	Addresses []netip.Prefix
	Gateway4  netip.Addr
	Gateway6  netip.Addr
	// Nameservers and Search are the pod's.
	Nameservers []string
	Search      []string
}

// Read reads the files of a directory that the kubelet mounted for a Secret. In their names "__" stands for a
// slash.
func Read(dir string) (map[string][]byte, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("reading seed files: %w", err)
	}
	files := map[string][]byte{}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), "..") { // of the kubelet, for replacing all files at once
			continue
		}
		data, err := readFile(filepath.Join(dir, e.Name()))
		if err != nil {
			return nil, fmt.Errorf("reading seed file %s: %w", e.Name(), err)
		}
		if files[strings.ReplaceAll(e.Name(), "__", "/")] = data; len(files) > maxFiles {
			return nil, fmt.Errorf("reading seed files: there are more than %d", maxFiles)
		}
	}
	return files, nil
}

func readFile(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err == nil && len(data) > maxFile {
		err = fmt.Errorf("it has more than %d bytes", maxFile)
	}
	return data, err
}

// Image makes the image. The file is open for reading only and belongs to the caller.
func Image(m *machinev1.Machine, files map[string][]byte, pod Network) (*os.File, error) {
	if len(files) == 0 {
		return nil, fmt.Errorf("making seed disk: the pod has no files below %s", machinev1.SeedDir)
	}
	out, err := Fill(m, files, pod)
	if err != nil {
		return nil, err
	}
	data, err := iso.Make(m.Seed.Label, out)
	if err != nil {
		return nil, fmt.Errorf("making seed disk: %w", err)
	}
	f, err := memfd.Create("seed", 0)
	if err != nil {
		return nil, fmt.Errorf("making seed disk: %w", err)
	}
	defer f.Close()
	if _, err := f.Write(data); err != nil {
		return nil, fmt.Errorf("making seed disk: %w", err)
	}
	return memfd.Reopen(f)
}

// Fill replaces the placeholders in all files.
func Fill(m *machinev1.Machine, files map[string][]byte, pod Network) (map[string][]byte, error) {
	netplan, err := Netplan(m, pod)
	if err != nil {
		return nil, err
	}
	values := first(m, pod)
	values[machinev1.PlaceholderNetplan] = string(netplan)
	out := make(map[string][]byte, len(files))
	for name, data := range files {
		for placeholder, value := range values {
			data = bytes.ReplaceAll(data, []byte(placeholder), []byte(value))
		}
		out[name] = data
	}
	return out, nil
}

// first is what the placeholders for the first network interface stand for.
func first(m *machinev1.Machine, pod Network) map[string]string {
	values := map[string]string{
		machinev1.PlaceholderIP4: "", machinev1.PlaceholderCIDR4: "", machinev1.PlaceholderNetmask4: "", machinev1.PlaceholderGateway: "",
		machinev1.PlaceholderMAC: "", machinev1.PlaceholderDNS: "", machinev1.PlaceholderSearch: "",
	}
	if len(m.NICs) == 0 {
		return values
	}
	n := resolve(m.NICs[0], pod)
	for _, a := range n.Addresses {
		if p, err := netip.ParsePrefix(a); err == nil && p.Addr().Is4() {
			values[machinev1.PlaceholderIP4], values[machinev1.PlaceholderCIDR4] = p.Addr().String(), p.String()
			values[machinev1.PlaceholderNetmask4] = net.IP(net.CIDRMask(p.Bits(), 32)).String()
			break
		}
	}
	values[machinev1.PlaceholderGateway], values[machinev1.PlaceholderMAC] = n.Gateway4, n.MAC
	values[machinev1.PlaceholderDNS] = strings.Join(n.Nameservers, ", ")
	values[machinev1.PlaceholderSearch] = strings.Join(n.Search, ", ")
	return values
}

// resolve fills in what the host knows of the pod's interface.
func resolve(n machinev1.NIC, pod Network) machinev1.NIC {
	if !n.Pod {
		return n
	}
	n.Addresses = nil
	for _, a := range pod.Addresses {
		n.Addresses = append(n.Addresses, a.String())
	}
	n.Gateway4, n.Gateway6 = text(pod.Gateway4), text(pod.Gateway6)
	if n.MAC == "" {
		n.MAC = pod.MAC
	}
	if n.MTU == 0 {
		n.MTU = pod.MTU
	}
	if len(n.Nameservers) == 0 {
		n.Nameservers = pod.Nameservers
	}
	if len(n.Search) == 0 {
		n.Search = pod.Search
	}
	return n
}

func text(a netip.Addr) string {
	if !a.IsValid() {
		return ""
	}
	return a.String()
}

// The parts of a network configuration that are used, as netplan and cloud-init (version 2) spell them.
type (
	netplan struct {
		Version   int                 `json:"version"`
		Ethernets map[string]ethernet `json:"ethernets"`
	}
	ethernet struct {
		Match       match        `json:"match"`
		SetName     string       `json:"set-name,omitempty"`
		DHCP4       bool         `json:"dhcp4"`
		DHCP6       bool         `json:"dhcp6"`
		Addresses   []string     `json:"addresses,omitempty"`
		MTU         int          `json:"mtu,omitempty"`
		Nameservers *nameservers `json:"nameservers,omitempty"`
		Routes      []route      `json:"routes,omitempty"`
	}
	match struct {
		MACAddress string `json:"macaddress"`
	}
	nameservers struct {
		Addresses []string `json:"addresses,omitempty"`
		Search    []string `json:"search,omitempty"`
	}
	route struct {
		To     string `json:"to"`
		Via    string `json:"via"`
		OnLink bool   `json:"on-link,omitempty"`
		Metric int    `json:"metric,omitempty"`
	}
)

// Netplan is the network configuration of the guest as one line of JSON: what in netplan's files is below
// "network".
func Netplan(m *machinev1.Machine, pod Network) ([]byte, error) {
	out := netplan{Version: 2, Ethernets: map[string]ethernet{}}
	for _, n := range m.NICs {
		n = resolve(n, pod)
		e := ethernet{
			Match: match{MACAddress: strings.ToLower(n.MAC)}, SetName: n.GuestDevice, DHCP4: n.DHCP4, DHCP6: n.DHCP6, MTU: n.MTU,
		}
		for _, a := range n.Addresses {
			p, err := netip.ParsePrefix(a)
			if err != nil {
				return nil, fmt.Errorf("address of network interface %s: %w", n.Name, err)
			}
			if p.Addr().Is4() && n.DHCP4 || p.Addr().Is6() && n.DHCP6 {
				continue // it comes by DHCP
			}
			e.Addresses = append(e.Addresses, a)
		}
		e.Routes = routes(n)
		if len(n.Nameservers)+len(n.Search) > 0 {
			e.Nameservers = &nameservers{Addresses: n.Nameservers, Search: n.Search}
		}
		out.Ethernets[n.Name] = e
	}
	data, err := json.Marshal(out)
	if err != nil {
		return nil, fmt.Errorf("encoding network configuration: %w", err)
	}
	return data, nil
}

// routes are the static routes of an interface.
func routes(n machinev1.NIC) []route {
	var out []route
	if n.Gateway4 != "" && !n.DHCP4 {
		out = append(out, route{To: "0.0.0.0/0", Via: n.Gateway4, OnLink: !reaches(n, n.Gateway4)})
	}
	if n.Gateway6 != "" && !n.DHCP6 {
		out = append(out, route{To: "::/0", Via: n.Gateway6, OnLink: !reaches(n, n.Gateway6)})
	}
	for _, r := range n.Routes {
		to := r.To
		if to == "default" {
			to = "0.0.0.0/0"
			if strings.Contains(r.Via, ":") {
				to = "::/0"
			}
		}
		out = append(out, route{To: to, Via: r.Via, Metric: r.Metric})
	}
	return out
}

// reaches tells whether a gateway is in a network of the interface.
func reaches(n machinev1.NIC, gateway string) bool {
	g, err := netip.ParseAddr(gateway)
	return err == nil && (g.IsLinkLocalUnicast() || slices.ContainsFunc(n.Addresses, func(a string) bool {
		p, err := netip.ParsePrefix(a)
		return err == nil && p.Contains(g)
	}))
}
