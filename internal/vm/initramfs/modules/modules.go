// Package modules picks kernel modules for an initramfs, for kernels that do not have everything a
// pod needs built in, such as a distribution's.
//
// It reads the dependencies from the module files themselves, so it needs no depmod. Modules land
// in Dir and WantedDir under names that sort in load order; guest init loads them in that order.
// Package podkernel calls it; the pod kernel of our own needs none.
//
// What can go wrong: a module that is needed is missing (ErrNotFound) or compressed
// (ErrCompressed), or a file is no kernel module.
package modules

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"atoll.dev/atoll/internal/vm/initramfs"
)

// Where the modules are in the initramfs: first those a guest cannot do without, then others.
const (
	Dir       = "/lib/modules/atoll"
	WantedDir = "/lib/modules/atoll-wanted"
)

// ForPods are the modules a micro-VM needs: its devices and its file systems.
func ForPods() []string {
	return []string{
		"virtio_pci", "virtio_console", "virtio_blk", "virtio_net", "virtio_scsi", "sd_mod",
		"ext4", "erofs", "overlay", "quota_v2",
	}
}

// ForContainers are the modules that programs in containers may want. Nothing in a guest can load
// them later, so all that the kernel has are loaded while the template boots.
func ForContainers() []string {
	return []string{
		"binfmt_misc", "loop", "fuse", "xfs", "virtio_rng", "crc32c_intel", "ptp_kvm",
		"unix_diag", "tcp_diag", "udp_diag", "tcp_bbr", "vmw_vsock_virtio_transport",
		"dummy", "veth", "bridge", "tun",
		"sch_htb", "sch_tbf", "sch_fq", "sch_netem", "sch_ingress", "cls_u32", "cls_bpf", "act_mirred",
		"nf_conntrack", "nf_conntrack_netlink", "nf_tables", "nft_ct", "nft_chain_nat", "nft_nat", "nft_masq",
		"nft_redir", "nft_limit", "nft_log", "nft_reject", "nft_reject_inet", "nft_numgen", "nft_hash", "nft_fib",
		"nft_fib_ipv4", "nft_fib_ipv6", "nft_fib_inet", "nft_socket", "nft_tproxy", "nft_compat",
		"x_tables", "xt_mark", "xt_connmark", "xt_nat", "xt_addrtype", "xt_comment", "xt_conntrack", "xt_limit",
		"xt_multiport", "xt_owner", "xt_socket", "xt_state", "xt_statistic", "xt_tcpudp", "xt_CT", "xt_LOG",
		"xt_MASQUERADE", "xt_REDIRECT", "xt_TCPMSS", "xt_TPROXY", "nf_log_syslog",
		"ip_tables", "iptable_filter", "iptable_nat", "iptable_mangle", "iptable_raw", "ipt_REJECT",
		"ip6_tables", "ip6table_filter", "ip6table_nat", "ip6table_mangle", "ip6table_raw", "ip6t_REJECT",
	}
}

var (
	// ErrNotFound says that the kernel has no such module, neither as a file nor built in.
	ErrNotFound = errors.New("no such kernel module")
	// ErrCompressed says that the module is there in a form that is not read here.
	ErrCompressed = errors.New("the kernel module is compressed")
)

// Entries returns initramfs entries for the modules needed and for those wanted, and for all they
// depend on. dir is the kernel's module directory, for example /lib/modules/6.1.0-56-cloud-amd64.
// Modules that are built into the kernel need no file and make no entry; wanted ones that the
// kernel does not have are left out.
func Entries(dir string, needed, wanted []string) ([]initramfs.Entry, error) {
	p := picker{
		files: make(map[string]string), builtin: make(map[string]bool),
		compressed: make(map[string]string), state: make(map[string]int), dir: Dir,
	}
	if err := p.scan(dir); err != nil {
		return nil, fmt.Errorf("looking for kernel modules: %w", err)
	}
	for _, n := range needed {
		if err := p.add(canonical(n)); err != nil {
			return nil, fmt.Errorf("adding kernel module %s: %w", n, err)
		}
	}
	p.dir = WantedDir
	for _, n := range wanted {
		err := p.add(canonical(n))
		if err != nil && !errors.Is(err, ErrNotFound) {
			return nil, fmt.Errorf("adding kernel module %s: %w", n, err)
		}
	}
	return p.entries, nil
}

// picker collects modules in load order.
type picker struct {
	files      map[string]string // path by canonical name
	builtin    map[string]bool
	compressed map[string]string // path by canonical name
	state      map[string]int    // 1 being added, 2 added
	dir        string            // where new entries go
	entries    []initramfs.Entry
}

func (p *picker) scan(dir string) error {
	list, err := os.ReadFile(filepath.Join(dir, "modules.builtin"))
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(list)) {
		p.builtin[canonical(strings.TrimSpace(line))] = true
	}
	return filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		switch filepath.Ext(name) {
		case ".ko":
			p.files[canonical(name)] = name
		case ".xz", ".zst", ".gz":
			if plain := strings.TrimSuffix(name, filepath.Ext(name)); filepath.Ext(plain) == ".ko" {
				p.compressed[canonical(plain)] = name
			}
		}
		return nil
	})
}

// add adds a module after those it depends on.
func (p *picker) add(name string) error {
	switch {
	case p.state[name] == 2 || p.builtin[name]:
		return nil
	case p.state[name] == 1:
		return fmt.Errorf("%s depends on itself", name)
	}
	file, ok := p.files[name]
	if !ok {
		if c, ok := p.compressed[name]; ok {
			return fmt.Errorf("%w: %s", ErrCompressed, c)
		}
		return fmt.Errorf("%w: %s", ErrNotFound, name)
	}
	p.state[name] = 1
	defer func() {
		if p.state[name] == 1 {
			delete(p.state, name)
		}
	}()
	needs, err := depends(file)
	if err != nil {
		return fmt.Errorf("reading %s: %w", file, err)
	}
	for _, n := range needs {
		if err := p.add(canonical(n)); err != nil {
			return err
		}
	}
	p.state[name] = 2
	p.entries = append(p.entries, initramfs.Entry{
		Path: path.Join(p.dir, fmt.Sprintf("%03d-%s.ko", len(p.entries), name)), Mode: 0o644, File: file,
	})
	return nil
}

// depends reads the names of the modules that must be loaded before.
func depends(file string) ([]string, error) {
	f, err := elf.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	section := f.Section(".modinfo")
	if section == nil {
		return nil, errors.New("not a kernel module")
	}
	data, err := section.Data()
	if err != nil {
		return nil, err
	}
	for field := range bytes.SplitSeq(data, []byte{0}) {
		if list, ok := strings.CutPrefix(string(field), "depends="); ok && list != "" {
			return strings.Split(list, ","), nil
		}
	}
	return nil, nil
}

// canonical is the name by which the kernel knows a module: no directory, no ending, no dashes.
func canonical(name string) string {
	return strings.ReplaceAll(strings.TrimSuffix(path.Base(name), ".ko"), "-", "_")
}
