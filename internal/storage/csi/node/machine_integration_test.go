//go:build integration

package node_test

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"atoll.dev/atoll/internal/datadir/attach"
)

// machine asks for volumes as the shim of a virtual machine does.
type machine struct {
	*host
	pod     string
	records attach.Records
}

func (h *host) machine(pod string) *machine {
	return &machine{host: h, pod: pod, records: attach.NewRecords(h.run)}
}

// serveAgent runs the service until the test ends, or the function it returns is called.
func (h *host) serveAgent() (stop func()) {
	h.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	service := h.Service
	go func() { done <- service.Run(ctx) }()
	var once sync.Once
	stop = func() {
		once.Do(func() {
			cancel()
			if err := <-done; err != nil {
				h.t.Error(err)
			}
		})
	}
	h.t.Cleanup(stop)
	for end := time.Now().Add(2 * time.Minute); ; time.Sleep(5 * time.Millisecond) {
		if _, err := os.Stat(attach.AgentSocket(h.run)); err == nil {
			return stop
		}
		if time.Now().After(end) {
			h.t.Fatal("the agent does not listen")
		}
	}
}

func (m *machine) call(method string, r attach.OpenRequest) (attach.Opened, error) {
	m.t.Helper()
	r.Pod = m.pod
	if r.Machine == nil {
		r.Machine = &attach.MachineUse{Namespace: "default", Name: m.pod}
	}
	var o attach.Opened
	err := attach.Call(m.t.Context(), attach.AgentSocket(m.run), method, r, &o)
	return o, err
}

func (m *machine) put(volume, socket string) {
	m.t.Helper()
	must(m.t, m.records.Put(attach.Record{Volume: volume, Pod: m.pod, Socket: socket}))
}

// held tells who has a volume in the engine.
func (h *host) held(id string) string {
	h.t.Helper()
	v, err := h.store.Volume(h.t.Context(), id)
	must(h.t, err)
	var out []string
	for _, a := range v.Attachments {
		out = append(out, a.Holder)
	}
	return strings.Join(out, " ")
}

// TestMachineVolumes: a machine gets what it may have, alone, until it has closed it.
func TestMachineVolumes(t *testing.T) {
	h := newHost(t)
	stop := h.serveAgent()
	v := h.volume("disk", nil)
	a, b := h.machine("a"), h.machine("b")
	h.refuse = errors.New("it is not attached to this node")
	if _, err := a.call(attach.MethodOpen, attach.OpenRequest{Volume: v}); err == nil || !strings.Contains(err.Error(), "not attached") || h.held("disk") != "" {
		t.Errorf("refused: %v, held by %q", err, h.held("disk"))
	}
	h.refuse = nil
	a.put(v, "nobody")
	for range 2 {
		o, err := a.call(attach.MethodOpen, attach.OpenRequest{Volume: v})
		if err != nil || len(o.Disk.Layers) != 1 || h.held("disk") != "host-1/pod/a" {
			t.Errorf("%+v, %v, held by %q", o, err, h.held("disk"))
		}
	}
	if !h.InMachine(v) || h.Live(v) == nil {
		t.Error("nobody knows that a machine has it")
	}
	if _, err := b.call(attach.MethodOpen, attach.OpenRequest{Volume: v}); err == nil {
		t.Error("two machines have one volume")
	}
	if _, err := a.call(attach.MethodClose, attach.OpenRequest{Volume: v}); err == nil {
		t.Error("closed while the shim has it open")
	}
	must(t, a.records.Remove(v, "a"))
	for range 2 {
		if _, err := a.call(attach.MethodClose, attach.OpenRequest{Volume: v}); err != nil || h.held("disk") != "" {
			t.Errorf("closing: %v, held by %q", err, h.held("disk"))
		}
	}
	// A shim that is gone has closed everything, also when the agent was away then.
	b.put(v, "nobody")
	if _, err := b.call(attach.MethodOpen, attach.OpenRequest{Volume: v}); err != nil {
		t.Fatal(err)
	}
	must(t, b.records.Remove(v, "b"))
	stop()
	h.restart()
	h.serveAgent()
	for end := time.Now().Add(2 * time.Minute); h.held("disk") != ""; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("still held by %q", h.held("disk"))
		}
	}
}

// TestMachineMemory: a volume for memory is one file, whatever it is made of.
func TestMachineMemory(t *testing.T) {
	h := newHost(t)
	h.serveAgent()
	v := h.volume("memory", nil)
	m := h.machine("a")
	r := attach.OpenRequest{Volume: v, Machine: &attach.MachineUse{Namespace: "default", Name: "a", Memory: true}}
	for i, want := range []string{"", "saved"} {
		m.put(v, "nobody")
		o, err := m.call(attach.MethodOpen, r)
		must(t, err)
		f, err := os.OpenFile(o.File, os.O_RDWR, 0)
		must(t, err)
		buf := make([]byte, len(want))
		if _, err := io.ReadFull(f, buf); err != nil || string(buf) != want {
			t.Errorf("attempt %d: %q, %v", i, buf, err)
		}
		_, err = f.WriteAt([]byte("saved"), 0)
		must(t, errors.Join(err, f.Sync(), f.Close()))
		must(t, m.records.Remove(v, "a"))
		if _, err := m.call(attach.MethodClose, r); err != nil || h.held("memory") != "" {
			t.Errorf("closing: %v, held by %q", err, h.held("memory"))
		}
		if left, _ := filepath.Glob(filepath.Join(h.run, "exports/*")); len(left) > 0 {
			t.Errorf("left: %v", left)
		}
	}
}

// TestMachineSnapshots: all disks or none.
func TestMachineSnapshots(t *testing.T) {
	h := newHost(t)
	h.serveAgent()
	m := h.machine("a")
	var mu sync.Mutex
	failing := ""
	socket := filepath.Join(h.run, "shim")
	l, err := attach.Listen(socket)
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	go func() {
		_ = attach.Serve(ctx, l, map[string]attach.Handler{
			attach.MethodSnapshot: attach.Handle(func(_ context.Context, r attach.SnapshotRequest) (struct{}, error) {
				mu.Lock()
				defer mu.Unlock()
				if r.Volume == failing {
					return struct{}{}, errors.New("the machine has crashed")
				}
				return struct{}{}, nil
			}),
		})
	}()
	volumes := map[string]string{}
	for _, id := range []string{"one", "two"} {
		v := h.volume(id, nil)
		m.put(v, socket)
		_, err := m.call(attach.MethodOpen, attach.OpenRequest{Volume: v})
		must(t, err)
		volumes[v] = "first-" + id
	}
	take := func() error {
		return attach.Call(t.Context(), attach.AgentSocket(h.run), attach.MethodSnapshots, attach.SnapshotsRequest{Pod: "a", Snapshots: volumes}, nil)
	}
	for range 2 { // it is asked again after a crash
		must(t, take())
	}
	for _, id := range volumes {
		if _, err := h.store.SnapshotByID(t.Context(), id); err != nil {
			t.Error(err)
		}
	}
	mu.Lock()
	failing = "default/two"
	mu.Unlock()
	volumes = map[string]string{"default/one": "second-one", "default/two": "second-two"}
	if err := take(); err == nil || !strings.Contains(err.Error(), "crashed") {
		t.Errorf("half of it: %v", err)
	}
	if _, err := h.store.SnapshotByID(t.Context(), "second-one"); err == nil {
		t.Error("one of two snapshots is left")
	}
	if err := attach.Call(t.Context(), attach.AgentSocket(h.run), attach.MethodSnapshots, attach.SnapshotsRequest{Pod: "b", Snapshots: volumes}, nil); !errors.Is(err, attach.ErrNotFound) {
		t.Errorf("of another machine's disks: %v", err)
	}
}
