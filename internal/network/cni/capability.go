package cni

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/linux/rtnl"
	"atoll.dev/atoll/internal/network/cniconf"
	"atoll.dev/atoll/internal/network/lease"
	"atoll.dev/atoll/internal/network/nat"
)

// hostPorts checks the port mappings of a pod. Mappings without a host port
// are none.
func hostPorts(in []cniconf.PortMapping) ([]lease.HostPort, error) {
	var out []lease.HostPort
	for _, m := range in {
		if m.HostPort == 0 {
			continue
		}
		if m.HostPort < 1 || m.HostPort > 65535 || m.ContainerPort < 1 || m.ContainerPort > 65535 {
			return nil, fmt.Errorf("port mapping %d to %d: ports are between 1 and 65535", m.HostPort, m.ContainerPort)
		}
		p := lease.HostPort{Protocol: strings.ToLower(m.Protocol), Port: uint16(m.HostPort), PodPort: uint16(m.ContainerPort)}
		switch p.Protocol {
		case "":
			p.Protocol = "tcp"
		case "tcp", "udp", "sctp":
		default:
			return nil, fmt.Errorf("port mapping %d: protocol %q is not tcp, udp or sctp", m.HostPort, m.Protocol)
		}
		if m.HostIP != "" {
			ip, err := netip.ParseAddr(m.HostIP)
			if err != nil {
				return nil, fmt.Errorf("port mapping %d: host address: %w", m.HostPort, err)
			}
			ip = ip.Unmap()
			if ip.Is6() && ip != netip.IPv6Unspecified() {
				return nil, fmt.Errorf("port mapping %d: host address %s: IPv6 is not supported", m.HostPort, ip)
			}
			if !ip.IsUnspecified() {
				p.HostIP = ip
			}
		}
		out = append(out, p)
	}
	return out, nil
}

// dropStale removes the wanted hostPorts of pods whose lease is gone; it
// reports whether it removed any. Only a call killed at the wrong moment
// leaves one.
func (c *call) dropStale(cfg nat.Config, want []lease.HostPort) bool {
	dropped := false
	for _, p := range want {
		holder, ok, err := nat.Lookup(cfg, p)
		if err != nil || !ok {
			continue
		}
		if _, err := c.store.Holder(holder); !errors.Is(err, lease.ErrNotFound) {
			continue
		}
		if nat.Remove(cfg, nat.Pod{Address: holder, Ports: []lease.HostPort{p}}) == nil {
			dropped = true
		}
	}
	return dropped
}

// podName is the pod's name in the arguments of a Kubernetes runtime, for
// messages.
func podName(args string) string {
	namespace, name := podArg(args, "K8S_POD_NAMESPACE"), podArg(args, "K8S_POD_NAME")
	if namespace == "" || name == "" {
		return ""
	}
	return namespace + "/" + name
}

// podArg is what the runtime says about a pod under a key.
func podArg(args, key string) string {
	found := ""
	for pair := range strings.SplitSeq(args, ";") {
		if k, value, _ := strings.Cut(pair, "="); k == key {
			found = value
		}
	}
	return found
}

// limits are a pod's rates in bytes per second; 0 is unlimited.
type limits struct {
	ingress, egress rate
}

type rate struct {
	bytesPerSecond uint64
	burst          uint64 // bytes
}

func limitsOf(b *cniconf.Bandwidth) limits {
	if b == nil {
		return limits{}
	}
	return limits{
		ingress: rate{b.IngressRate / 8, b.IngressBurst / 8},
		egress:  rate{b.EgressRate / 8, b.EgressBurst / 8},
	}
}

// towardsPod shapes what the host's end sends to the pod.
func (l limits) towardsPod(s *rtnl.Socket, index, mtu int) error {
	return l.ingress.shape(s, index, mtu, "ingress")
}

// fromPod shapes what the pod's end sends: everything a micro-VM sends passes
// it, out of the guest's reach. A pod that runs without a micro-VM and has
// CAP_NET_ADMIN could remove it; such pods are trusted.
func (l limits) fromPod(s *rtnl.Socket, index, mtu int) error {
	return l.egress.shape(s, index, mtu, "egress")
}

const (
	// maxBurstTime bounds the bucket to what the rate fills in this time (in
	// milliseconds): runtimes ask for the largest burst there is when the user
	// named none, which would leave short transfers unlimited.
	maxBurstTime = 100
	// maxQueueTime is how long a packet may wait, in milliseconds, before the
	// queue is full and packets are dropped.
	maxQueueTime = 50
	// minBurst lets one segment of generic segmentation offload pass whole.
	minBurst = 64 << 10
)

// shape puts a token bucket on an interface's way out.
func (r rate) shape(s *rtnl.Socket, index, mtu int, what string) error {
	if r.bytesPerSecond == 0 {
		return nil
	}
	burst := max(min(r.burst, r.bytesPerSecond/1000*maxBurstTime), minBurst, uint64(mtu))
	if r.burst == 0 {
		burst = max(r.bytesPerSecond/1000*maxBurstTime, minBurst)
	}
	burst = min(burst, 1<<30)
	limit := min(burst+r.bytesPerSecond/1000*maxQueueTime, 1<<31)
	err := s.QdiscReplace(&netlink.Tbf{
		QdiscAttrs: netlink.QdiscAttrs{LinkIndex: index, Parent: netlink.HANDLE_ROOT, Handle: netlink.MakeHandle(1, 0)},
		Rate:       r.bytesPerSecond,
		Limit:      uint32(limit),
		Buffer:     ticks(burst, r.bytesPerSecond),
	})
	if errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("limiting %s: the kernel has no token bucket filter (sch_tbf)", what)
	}
	if err != nil {
		return fmt.Errorf("limiting %s: %w", what, err)
	}
	return nil
}

// ticks is the time it takes to send size bytes, in the packet scheduler's
// unit.
func ticks(size, bytesPerSecond uint64) uint32 {
	return uint32(min(float64(size)/float64(bytesPerSecond)*1e6*netlink.TickInUsec(), 1<<31))
}

// machineMAC is the hardware address that a virtual machine has on the pod network. Its pod's interface gets the
// same, so that frames find it. "" leaves it to the plugin.
func machineMAC(annotation string) (string, error) {
	if annotation == "" {
		return "", nil
	}
	m, err := machinev1.Parse([]byte(annotation))
	if err != nil {
		return "", fmt.Errorf("annotation %s: %w", machinev1.Annotation, err)
	}
	for _, n := range m.NICs {
		if n.Pod {
			return n.MAC, nil
		}
	}
	return "", nil
}
