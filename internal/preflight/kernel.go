package preflight

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// feature is a kernel feature and how to try it.
type feature struct {
	name   string
	use    string
	module string // that has it, where the kernel has modules
	try    func(ctx context.Context) error
}

// features lists what is tried, in a network and mount namespace of its own.
func features() []feature {
	return []feature{
		{"tun", "network cards of micro-VMs", "tun", tryTap},
		{"bridge", "the pod network", "bridge", tryLink(&netlink.Bridge{LinkAttrs: attrs("atollpf0")})},
		{"veth", "the pod network", "veth", tryLink(&netlink.Veth{LinkAttrs: attrs("atollpf1"), PeerName: "atollpf2"})},
		{"tc mirred", "joins micro-VMs to the pod network", "act_mirred", tryMirred},
		{"br_netfilter", "Services between pods of one node", "br_netfilter", tryBridgeNetfilter},
		{"nftables", "Services and NAT", "nf_tables", tryNftables},
		{"overlay", "root file systems of runc pods", "overlay", tryOverlay},
		{"memfd seals", "memory shared between micro-VMs", "", tryMemfd},
	}
}

func attrs(name string) netlink.LinkAttrs {
	a := netlink.NewLinkAttrs()
	a.Name = name
	return a
}

// checkKernel tries the kernel features on a thread that is put into its own
// namespaces.
func checkKernel(ctx context.Context) []Result {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	done := make(chan []Result)
	go onOwnThread(func() { done <- tryFeatures(ctx) })
	return <-done
}

// onOwnThread runs f on a thread that is never used for anything else: it ends
// with the goroutine. The first thread of a process cannot end, and what /proc
// shows of the process is that thread's, so f is kept away from it.
func onOwnThread(f func()) {
	runtime.LockOSThread()
	if unix.Gettid() != unix.Getpid() {
		f()
		return // locked, so the thread ends
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // the first thread is taken, so it is another one
		f()
	}()
	<-done
	runtime.UnlockOSThread()
}

// tryFeatures makes the namespaces and tries everything in them.
func tryFeatures(ctx context.Context) []Result {
	if err := unix.Unshare(unix.CLONE_NEWNET | unix.CLONE_NEWNS); err != nil {
		return []Result{{
			Name: "namespaces", Level: Fail, Detail: fmt.Sprintf("making namespaces: %v", err),
			Fix: "run Atoll where it has all privileges of root, not in a container",
		}}
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return []Result{{
			Name: "namespaces", Level: Fail, Detail: fmt.Sprintf("making mounts private: %v", err),
			Fix: "run Atoll where it has all privileges of root, not in a container",
		}}
	}
	var out []Result
	for _, f := range features() {
		out = append(out, f.check(ctx))
	}
	return out
}

func (f feature) check(ctx context.Context) Result {
	err := f.try(ctx)
	if err == nil {
		return Result{Name: f.name, Level: OK, Detail: "works"}
	}
	r := Result{Name: f.name, Level: Fail, Detail: fmt.Sprintf("does not work, needed for: %s (%v)", f.use, err)}
	if f.module == "" {
		r.Fix = "use a newer kernel"
		return r
	}
	if f.name == "br_netfilter" && moduleExists(f.module) {
		r.Level = Info
		r.Detail = "the module is not loaded yet; `atoll up` loads it"
		return r
	}
	r.Fix = fmt.Sprintf("modprobe %s; if there is no such module, use a kernel that has it (Debian's linux-image-amd64)", f.module)
	return r
}

// moduleExists asks modprobe without loading anything.
func moduleExists(name string) bool {
	modprobe, err := LookPath("modprobe")
	return err == nil && exec.Command(modprobe, "-n", "-q", name).Run() == nil
}

// tryTap makes a tap interface; it goes away with its descriptor.
func tryTap(context.Context) error {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("opening /dev/net/tun: %w", err)
	}
	defer unix.Close(fd)
	req, err := unix.NewIfreq("atollpf3")
	if err != nil {
		return err
	}
	req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
		return fmt.Errorf("making a tap interface: %w", err)
	}
	return nil
}

func tryLink(link netlink.Link) func(context.Context) error {
	return func(context.Context) error {
		if err := netlink.LinkAdd(link); err != nil {
			return fmt.Errorf("making a %s interface: %w", link.Type(), err)
		}
		return nil
	}
}

// tryMirred redirects one end of the veth pair made before to its peer, the
// way a tap is joined to a pod's interface.
func tryMirred(context.Context) error {
	from, err := netlink.LinkByName("atollpf1")
	if err != nil {
		return fmt.Errorf("finding the test interface: %w", err)
	}
	to, err := netlink.LinkByName("atollpf2")
	if err != nil {
		return fmt.Errorf("finding the test interface: %w", err)
	}
	ingress := &netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: from.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_INGRESS,
	}}
	if err := netlink.QdiscAdd(ingress); err != nil {
		return fmt.Errorf("adding an ingress queue: %w", err)
	}
	filter := &netlink.U32{
		FilterAttrs: netlink.FilterAttrs{
			LinkIndex: from.Attrs().Index, Parent: ingress.Handle, Priority: 1, Protocol: unix.ETH_P_ALL,
		},
		Actions: []netlink.Action{netlink.NewMirredAction(to.Attrs().Index)},
	}
	if err := netlink.FilterAdd(filter); err != nil {
		return fmt.Errorf("adding a redirect: %w", err)
	}
	return nil
}

func tryBridgeNetfilter(context.Context) error {
	_, err := os.Stat("/proc/sys/net/bridge/bridge-nf-call-iptables")
	return err
}

// nftScript uses what kube-proxy and Atoll's own rules use.
const nftScript = `
table inet atollpf {
	map m { type ipv4_addr . inet_proto . inet_service : verdict; }
	set s { type ipv4_addr; flags interval; elements = { 10.0.0.0/8 } }
	chain n { type nat hook postrouting priority srcnat; ip saddr @s masquerade fully-random; }
	chain d { type nat hook prerouting priority dstnat;
		ip daddr . meta l4proto . th dport vmap @m
		numgen random mod 2 vmap { 0 : goto x, 1 : goto x }
		tcp dport 9 dnat ip to 10.0.0.1:9
	}
	chain f { type filter hook forward priority filter; ct state established,related accept; fib daddr type local mark set mark or 0x4000; }
	chain x { }
}
`

func tryNftables(ctx context.Context) error {
	nft, err := LookPath("nft")
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, nft, "-f", "-")
	cmd.Stdin = strings.NewReader(nftScript)
	out, err := cmd.CombinedOutput()
	if err != nil {
		first, _, _ := strings.Cut(strings.TrimSpace(string(out)), "\n")
		return fmt.Errorf("loading rules: %w: %s", err, first)
	}
	return nil
}

// tryOverlay mounts an overlay on a tmpfs that only this thread sees.
func tryOverlay(context.Context) error {
	dir, err := os.MkdirTemp("", "atoll-preflight-")
	if err != nil {
		return err
	}
	defer os.Remove(dir)
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
		return fmt.Errorf("mounting a tmpfs: %w", err)
	}
	defer func() { _ = unix.Unmount(dir, unix.MNT_DETACH) }()
	for _, sub := range []string{"lower", "upper", "work", "merged"} {
		if err := os.Mkdir(filepath.Join(dir, sub), 0o755); err != nil {
			return err
		}
	}
	options := fmt.Sprintf("lowerdir=%[1]s/lower,upperdir=%[1]s/upper,workdir=%[1]s/work", dir)
	if err := unix.Mount("overlay", filepath.Join(dir, "merged"), "overlay", 0, options); err != nil {
		return fmt.Errorf("mounting an overlay: %w", err)
	}
	return nil
}

// tryMemfd checks that a sealed memory file cannot be written any more.
func tryMemfd(context.Context) error {
	fd, err := unix.MemfdCreate("atoll-preflight", unix.MFD_ALLOW_SEALING|unix.MFD_CLOEXEC)
	if err != nil {
		return fmt.Errorf("making a memory file: %w", err)
	}
	defer unix.Close(fd)
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_WRITE|unix.F_SEAL_SHRINK|unix.F_SEAL_GROW); err != nil {
		return fmt.Errorf("sealing a memory file: %w", err)
	}
	if _, err := unix.Write(fd, []byte{0}); !errors.Is(err, unix.EPERM) {
		return errors.New("a sealed memory file can be written")
	}
	return nil
}
