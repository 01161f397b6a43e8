// Package cpumodel chooses the model of processor that a virtual machine has where nobody says: a baseline that many
// generations of hosts have, so that any of them can take a saved or moved machine on, and what the host has against
// attacks like Spectre besides. Package hardware calls it.
//
// A host supports a model if QEMU says so, which knows what of the processor its kernel passes on. What can go wrong: QEMU
// cannot be asked; then, and on a host that has none of the baselines, there is no choice.
package cpumodel

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"atoll.dev/atoll/internal/vm/monitor"
	"atoll.dev/atoll/internal/vm/qemu"
	"atoll.dev/atoll/internal/vm/qmp"
)

// askTimeout bounds how long QEMU may take to list its models. It takes a tenth of a second.
const askTimeout = 2 * time.Minute

// baselines are what machines get, by maker of the host's processor, the best first. These versions of QEMU's models never
// change, have what guests need against the first variants of Spectre (spec-ctrl or ibpb), and no TSX. For the rest, see guards.
func baselines(vendor string) []string {
	switch vendor {
	case "GenuineIntel":
		return []string{
			"Haswell-v4",  // x86-64-v3; servers from 2014 on
			"Westmere-v2", // x86-64-v2 with AES; from 2010 on
		}
	case "AuthenticAMD":
		return []string{
			"EPYC-v2", // x86-64-v3; all servers of the Zen family, from 2017 on
		}
	}
	return nil
}

// guards are the features by which a guest defends itself against attacks on its processor, or learns that it need not.
// The baselines lack them, since they are older. QEMU can save all of them.
//
// Guests of AMD get no arch-capabilities, which AMD's processors do not have: KVM makes them up, and Windows stops at them.
func guards(vendor string) []string {
	switch vendor {
	case "GenuineIntel":
		return []string{
			"ssbd", "stibp", "md-clear",
			// arch-capabilities is the register that the rest is in.
			"arch-capabilities", "rdctl-no", "ibrs-all", "skip-l1dfl-vmentry", "ssb-no", "mds-no", "pschange-mc-no", "taa-no",
			"sbdr-ssdp-no", "fbsdp-no", "psdp-no", "fb-clear", "bhi-no", "gds-no", "rfds-no", "rfds-clear",
		}
	case "AuthenticAMD":
		return []string{"ibrs", "amd-stibp", "stibp-always-on", "amd-ssbd", "virt-ssbd", "amd-no-ssb"}
	}
	return nil
}

// Offer is what machines can have on a host.
type Offer struct {
	Models   map[string]bool // false for those that QEMU knows and the host does not support
	Features map[string]bool
}

// Baseline tells whether a model is one that Choose can return, on this host or another one.
func Baseline(model string) bool {
	name, features, some := strings.Cut(model, ",")
	for _, vendor := range []string{"GenuineIntel", "AuthenticAMD"} {
		if !slices.Contains(baselines(vendor), name) {
			continue
		}
		known := guards(vendor)
		return !some || !slices.ContainsFunc(strings.Split(features, ","), func(f string) bool {
			feature, on := strings.CutSuffix(f, "=on")
			return !on || !slices.Contains(known, feature)
		})
	}
	return false
}

// Choose returns the best baseline that a host supports with the guards that it has, as QEMU's -cpu wants it. It is "" if
// the host supports none.
func Choose(vendor string, o Offer) string {
	for _, model := range baselines(vendor) {
		if !o.Models[model] {
			continue
		}
		for _, feature := range guards(vendor) {
			if o.Features[feature] {
				model += "," + feature + "=on"
			}
		}
		return model
	}
	return ""
}

// Vendor reads the maker of the processor from what /proc/cpuinfo says.
func Vendor(cpuinfo []byte) string {
	for line := range bytes.Lines(cpuinfo) {
		if key, value, _ := strings.Cut(string(line), ":"); strings.TrimSpace(key) == "vendor_id" {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

// Supported asks a QEMU, which runs as cred, for what machines with an accelerator can have here.
func Supported(ctx context.Context, path, accel string, cred qemu.Credential) (_ Offer, err error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	conn, theirs, err := qemu.SocketPair()
	if err != nil {
		return Offer{}, err
	}
	p, err := qemu.Spawn(qemu.Spec{
		Args: []string{
			path, "-nodefaults", "-no-user-config", "-display", "none", "-machine", "none", "-accel", accel, "-S",
			"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
			"-chardev", "socket,id=qmp,fd=3", "-mon", "chardev=qmp,mode=control",
		},
		Files: []*os.File{theirs}, Credential: cred,
	})
	_ = theirs.Close()
	if err != nil {
		return Offer{}, errors.Join(fmt.Errorf("asking qemu for its models of processors: %w", err), conn.Close())
	}
	m := monitor.New(conn, p.Done(), nil)
	defer func() {
		err = errors.Join(err, p.Kill(), m.Close())
		<-p.Done()
		err = errors.Join(err, p.Close())
	}()
	var list []struct {
		Name    string   `json:"name"`
		Missing []string `json:"unavailable-features"`
	}
	// The model max is all that the accelerator offers.
	var all struct {
		Model struct {
			Props map[string]any `json:"props"`
		} `json:"model"`
	}
	expand := map[string]any{"type": "full", "model": map[string]any{"name": "max"}}
	if err := m.Do(
		ctx, "asking qemu for its models of processors", qmp.Command{Name: "qmp_capabilities"}, qmp.Command{Name: "query-cpu-definitions", Result: &list},
		qmp.Command{Name: "query-cpu-model-expansion", Args: expand, Result: &all},
	); err != nil {
		return Offer{}, fmt.Errorf("%w: %s", err, qemu.LastLines(p.Stderr(), 3))
	}
	out := Offer{Models: map[string]bool{}, Features: map[string]bool{}}
	for _, model := range list {
		out.Models[model.Name] = len(model.Missing) == 0
	}
	for name, value := range all.Model.Props {
		if value == true {
			out.Features[name] = true
		}
	}
	return out, nil
}
