// Package cniconf is the configuration of the CNI plugin "atoll": what
// `atoll containerd` writes for the container runtime, and what the plugin
// reads back on its standard input.
//
// It validates; it does not touch the network. Bad configuration is refused
// with a message that names the field.
package cniconf

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
)

const (
	// PluginType is the name of the plugin's executable.
	PluginType = "atoll"
	// FileName is the name of the configuration in the runtime's CNI
	// configuration directory.
	FileName = "10-atoll.conflist"
	// DefaultBridge is the pod bridge.
	DefaultBridge = "atoll0"
	// DefaultName is the network's name.
	DefaultName = "atoll"

	// capabilityAnnotations has containerd pass the pod's annotations.
	capabilityAnnotations = "io.kubernetes.cri.pod-annotations"

	// The plugin also speaks 1.1.0, but with that the runtime would execute it
	// for STATUS every few seconds, and there is nothing ADD cannot repair.
	cniVersion = "1.0.0"
)

// Network is the pod network of a node.
type Network struct {
	// Name of the CNI network; DefaultName when empty.
	Name string
	// Bridge is the pod bridge; DefaultBridge when empty.
	Bridge string
	// Subnet is the node's pod CIDR.
	Subnet netip.Prefix
	// Gateway is the bridge's address; the first of Subnet when zero.
	Gateway netip.Addr
	// ClusterCIDR holds the pods of all nodes: they see each other's addresses,
	// everything else sees the node's. Subnet when zero.
	ClusterCIDR netip.Prefix
	// MTU of pod interfaces; 0 means that of the bridge.
	MTU int
	// StateDir holds the plugin's leases.
	StateDir string
}

// Range is a subnet and its gateway.
type Range struct {
	Subnet  netip.Prefix `json:"subnet"`
	Gateway netip.Addr   `json:"gateway,omitzero"`
}

// Plugin is the plugin's own entry of the configuration list, as the runtime
// hands it over.
type Plugin struct {
	CNIVersion string `json:"cniVersion,omitempty"`
	Name       string `json:"name,omitempty"`
	Type       string `json:"type"`

	Bridge   string `json:"bridge"`
	MTU      int    `json:"mtu,omitempty"`
	StateDir string `json:"stateDir"`
	// Ranges has one entry per address family. Only one, of IPv4, is supported.
	Ranges       []Range         `json:"ranges"`
	ClusterCIDRs []netip.Prefix  `json:"clusterCIDRs,omitempty"`
	Capabilities map[string]bool `json:"capabilities,omitempty"`

	RuntimeConfig    RuntimeConfig `json:"runtimeConfig,omitzero"`
	ValidAttachments []Attachment  `json:"cni.dev/valid-attachments,omitempty"`
}

// RuntimeConfig is what the runtime adds for one pod.
type RuntimeConfig struct {
	PortMappings []PortMapping `json:"portMappings,omitempty"`
	Bandwidth    *Bandwidth    `json:"bandwidth,omitempty"`
	// Annotations are those of the pod.
	Annotations map[string]string `json:"io.kubernetes.cri.pod-annotations,omitempty"`
}

// PortMapping is one hostPort of a pod, as CNI defines it.
type PortMapping struct {
	HostPort      int    `json:"hostPort"`
	ContainerPort int    `json:"containerPort"`
	Protocol      string `json:"protocol"`
	HostIP        string `json:"hostIP,omitempty"`
}

// Bandwidth is a pod's limits in bits per second and bits, as CNI defines
// them. Ingress is towards the pod. 0 means unlimited.
type Bandwidth struct {
	IngressRate  uint64 `json:"ingressRate,omitempty"`
	IngressBurst uint64 `json:"ingressBurst,omitempty"`
	EgressRate   uint64 `json:"egressRate,omitempty"`
	EgressBurst  uint64 `json:"egressBurst,omitempty"`
}

// Attachment names a pod interface that is still in use, for GC.
type Attachment struct {
	ContainerID string `json:"containerID"`
	IfName      string `json:"ifname"`
}

// Parse reads the plugin's configuration and checks it. Fields it does not
// know are ignored: runtimes add their own.
func Parse(b []byte) (*Plugin, error) {
	p := new(Plugin)
	if err := json.Unmarshal(b, p); err != nil {
		return nil, fmt.Errorf("parsing network configuration: %w", err)
	}
	if err := p.complete(); err != nil {
		return nil, fmt.Errorf("checking network configuration: %w", err)
	}
	return p, nil
}

// Network returns the network a checked configuration describes.
func (p *Plugin) Network() Network {
	return Network{
		Name: p.Name, Bridge: p.Bridge, MTU: p.MTU, StateDir: p.StateDir,
		Subnet: p.Ranges[0].Subnet, Gateway: p.Ranges[0].Gateway, ClusterCIDR: p.ClusterCIDRs[0],
	}
}

// complete fills in defaults and validates.
func (p *Plugin) complete() error {
	if p.Bridge == "" {
		p.Bridge = DefaultBridge
	}
	if len(p.Bridge) > 15 || strings.ContainsAny(p.Bridge, "/: \t\n\x00") || p.Bridge == "." || p.Bridge == ".." {
		return fmt.Errorf("bridge: %q is no interface name", p.Bridge)
	}
	if p.MTU != 0 && (p.MTU < 576 || p.MTU > 65535) {
		return fmt.Errorf("mtu: %d is not between 576 and 65535", p.MTU)
	}
	if !filepath.IsAbs(p.StateDir) {
		return fmt.Errorf("stateDir: %q is not an absolute path", p.StateDir)
	}
	if len(p.Ranges) == 0 {
		return errors.New("ranges: none given")
	}
	for i := range p.Ranges {
		if err := p.Ranges[i].complete(); err != nil {
			return fmt.Errorf("ranges[%d]: %w", i, err)
		}
	}
	if len(p.Ranges) > 1 {
		return errors.New("ranges: more than one is not supported")
	}
	if len(p.ClusterCIDRs) == 0 {
		p.ClusterCIDRs = []netip.Prefix{p.Ranges[0].Subnet}
	}
	if len(p.ClusterCIDRs) > 1 || !p.ClusterCIDRs[0].Addr().Is4() {
		return errors.New("clusterCIDRs: one IPv4 network is supported, no more and no IPv6")
	}
	c := p.ClusterCIDRs[0].Masked()
	if !c.Contains(p.Ranges[0].Subnet.Addr()) || c.Bits() > p.Ranges[0].Subnet.Bits() {
		return fmt.Errorf("clusterCIDRs: %s does not hold the node's %s", c, p.Ranges[0].Subnet)
	}
	p.ClusterCIDRs[0] = c
	return nil
}

func (r *Range) complete() error {
	if !r.Subnet.IsValid() {
		return errors.New("subnet: missing or invalid")
	}
	if !r.Subnet.Addr().Is4() {
		return fmt.Errorf("subnet: %s: IPv6 pod networks are not supported; configure an IPv4 subnet", r.Subnet)
	}
	r.Subnet = r.Subnet.Masked()
	if r.Subnet.Bits() < 8 || r.Subnet.Bits() > 29 {
		return fmt.Errorf("subnet: the prefix of %s is not between /8 and /29", r.Subnet)
	}
	if !r.Gateway.IsValid() {
		r.Gateway = r.Subnet.Addr().Next()
	}
	if !r.Subnet.Contains(r.Gateway) || r.Gateway == r.Subnet.Addr() || !r.Subnet.Contains(r.Gateway.Next()) {
		return fmt.Errorf("gateway: %s is no host address of %s", r.Gateway, r.Subnet)
	}
	return nil
}

// list is the file the runtime reads.
type list struct {
	CNIVersion string   `json:"cniVersion"`
	Name       string   `json:"name"`
	Plugins    []Plugin `json:"plugins"`
}

// Complete returns the network with its defaults filled in, or an error that
// names the field that is wrong.
func (n Network) Complete() (Network, error) {
	p, err := n.plugin()
	if err != nil {
		return Network{}, err
	}
	out := p.Network()
	if out.Name = n.Name; out.Name == "" {
		out.Name = DefaultName
	}
	return out, nil
}

func (n Network) plugin() (Plugin, error) {
	p := Plugin{
		Type: PluginType, Bridge: n.Bridge, MTU: n.MTU, StateDir: n.StateDir,
		Ranges:       []Range{{Subnet: n.Subnet, Gateway: n.Gateway}},
		Capabilities: map[string]bool{"portMappings": true, "bandwidth": true, capabilityAnnotations: true},
	}
	if n.ClusterCIDR.IsValid() {
		p.ClusterCIDRs = []netip.Prefix{n.ClusterCIDR}
	}
	if err := p.complete(); err != nil {
		return Plugin{}, fmt.Errorf("checking network configuration: %w", err)
	}
	return p, nil
}

// Render returns the configuration list for a network.
func Render(n Network) ([]byte, error) {
	n, err := n.Complete()
	if err != nil {
		return nil, err
	}
	p, err := n.plugin()
	if err != nil {
		return nil, err
	}
	l := list{CNIVersion: cniVersion, Name: n.Name, Plugins: []Plugin{p}}
	b, err := json.MarshalIndent(l, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("encoding network configuration: %w", err)
	}
	return append(b, '\n'), nil
}

// Write puts the configuration list of a network into dir under FileName. The
// file is replaced in one step, and only when it differs: the runtime reloads
// its configuration on every change of the directory.
func Write(dir string, n Network) error {
	b, err := Render(n)
	if err != nil {
		return err
	}
	path := filepath.Join(dir, FileName)
	if old, err := os.ReadFile(path); err == nil && bytes.Equal(old, b) {
		return nil
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("writing network configuration: %w", err)
	}
	tmp := filepath.Join(dir, "."+FileName+".tmp")
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return fmt.Errorf("writing network configuration: %w", err)
	}
	if err := os.Rename(tmp, path); err != nil {
		return fmt.Errorf("writing network configuration: %w", err)
	}
	return nil
}
