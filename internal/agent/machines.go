package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"k8s.io/client-go/tools/clientcmd"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	controller "atoll.dev/atoll/internal/controllers/machine"
	"atoll.dev/atoll/internal/datadir/attach"
	"atoll.dev/atoll/internal/datadir/pki"
	"atoll.dev/atoll/internal/kube/machines"
	"atoll.dev/atoll/internal/network/lease"
)

const (
	// stateWait is how long a shim may let the controller wait for a change, stateTimeout how long it may take to
	// say that there is none.
	stateWait    = 60 * time.Second
	stateTimeout = stateWait + 10*time.Second
	applyTimeout = 30 * time.Second
	// keyPrefix precedes the uid of a machine in the key of its address.
	keyPrefix = "vm-"
)

// runMachines passes what the pods of virtual machines say to their shims and back. It has the identity of the node,
// which may change its pods' status; the machines there are it lists with that of the storage part.
func (a *Agent) runMachines(ctx context.Context) error {
	node, err := clientcmd.BuildConfigFromFlags("", a.files.Kubeconfig(pki.Kubelet))
	if err != nil {
		return fmt.Errorf("configuring virtual machines: %w", err)
	}
	node.QPS, node.Burst, node.UserAgent = 50, 100, "atoll-machines"
	storage, err := clientcmd.BuildConfigFromFlags("", a.files.Kubeconfig(pki.Storage))
	if err != nil {
		return fmt.Errorf("configuring virtual machines: %w", err)
	}
	vms, err := machines.New(storage, a.cfg.NodeName)
	if err != nil {
		return fmt.Errorf("configuring virtual machines: %w", err)
	}
	c, err := controller.New(controller.Config{
		Client: node, Node: a.cfg.NodeName, Machines: vms.All, Logger: a.cfg.Logger,
		Host: &machineHost{records: attach.NewRecords(a.cfg.RunDir), dir: a.cfg.MachinesDir, leases: a.cfg.LeaseDir},
	})
	if err != nil {
		return fmt.Errorf("configuring virtual machines: %w", err)
	}
	return c.Run(ctx)
}

// machineHost is the Host of the machine controller.
type machineHost struct {
	records     attach.Records
	dir, leases string
}

// call calls the shim of a pod.
func (h *machineHost) call(ctx context.Context, pod, method string, timeout time.Duration, params, result any) error {
	found, err := h.records.Find(attach.Machine(pod))
	if err != nil {
		return err
	}
	if len(found) == 0 {
		return controller.ErrNoShim
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	err = attach.Call(ctx, found[0].Socket, method, params, result)
	var refused *attach.Error
	if err == nil || errors.As(err, &refused) {
		return err
	}
	if again, findErr := h.records.Find(attach.Machine(pod)); findErr == nil && len(again) == 0 {
		return controller.ErrNoShim // it has ended meanwhile
	}
	return err
}

// State implements controller.Host.
func (h *machineHost) State(ctx context.Context, pod string, seen int64) (machinev1.State, error) {
	var st machinev1.State
	err := h.call(ctx, pod, machinev1.MethodState, stateTimeout, machinev1.StateRequest{Seen: seen, WaitMillis: stateWait.Milliseconds()}, &st)
	return st, err
}

// Apply implements controller.Host.
func (h *machineHost) Apply(ctx context.Context, pod string, m *machinev1.Machine) error {
	return h.call(ctx, pod, machinev1.MethodApply, applyTimeout, m, nil)
}

// Keepsakes implements controller.Host.
func (h *machineHost) Keepsakes() ([]string, error) {
	entries, err := os.ReadDir(h.dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("listing what virtual machines keep: %w", err)
	}
	var out []string
	for _, e := range entries {
		if e.IsDir() {
			out = append(out, e.Name())
		}
	}
	store, err := lease.Open(h.leases)
	if err != nil {
		return nil, err
	}
	keys, err := store.Kept()
	if err != nil {
		return nil, err
	}
	for _, key := range keys {
		if uid, ok := strings.CutPrefix(key, keyPrefix); ok && !slices.Contains(out, uid) {
			out = append(out, uid)
		}
	}
	return out, nil
}

// Forget implements controller.Host.
func (h *machineHost) Forget(uid string) error {
	if uid == "" || filepath.Base(uid) != uid || uid == "." || uid == ".." {
		return fmt.Errorf("%q is no uid", uid)
	}
	store, err := lease.Open(h.leases)
	if err != nil {
		return err
	}
	if err := store.Release(keyPrefix + uid); err != nil {
		return err
	}
	if err := os.RemoveAll(filepath.Join(h.dir, uid)); err != nil {
		return fmt.Errorf("removing what a virtual machine has kept: %w", err)
	}
	return nil
}
