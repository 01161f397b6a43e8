package hardware

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/vm"
	"atoll.dev/atoll/internal/vm/qmp"
)

// setMigration lets the machine stand still before the state of its devices is saved, and reports on the way.
// The bandwidth is no limit; the time is how long the rest of the memory may take while the guest stands still.
var setMigration = qmp.Command{
	Name: "migrate-set-capabilities",
	Args: map[string]any{"capabilities": []map[string]any{
		{"capability": "events", "state": true},
		{"capability": "pause-before-switchover", "state": true},
	}},
}

var setBandwidth = qmp.Command{
	Name: "migrate-set-parameters",
	Args: map[string]any{"max-bandwidth": int64(100 << 30), "downtime-limit": 200},
}

const (
	progressInterval = 200 * time.Millisecond
	// cancelTimeout bounds how long giving up takes.
	cancelTimeout = 60 * time.Second
)

// Saved is what SaveMemory did.
type Saved struct {
	Bytes int64         // written to the file
	Pause time.Duration // how long the guest stood still; with SaveOptions.End, until it was saved
}

// SaveMemory writes the memory and the state of all devices to file, from its current offset on, while the
// guest runs, but for a moment at the end. A guest that changes its memory faster than it can be written is stopped
// earlier, so that no more than SaveBytes is written.
//
// When ctx ends it gives up, and the machine goes on as if nothing had been. ErrUnmigratable if the machine has a
// device whose state cannot be saved. No device can be added or removed meanwhile.
func (m *Machine) SaveMemory(ctx context.Context, file *os.File, o SaveOptions) (Saved, error) {
	const doing = "saving the memory"
	if !m.saving.TryLock() {
		return Saved{}, fmt.Errorf("%s: it is being saved already", doing)
	}
	defer m.saving.Unlock()
	h, err := m.header()
	if err != nil {
		return Saved{}, fmt.Errorf("%s: %w", doing, err)
	}
	begin, err := file.Seek(0, io.SeekCurrent)
	if err != nil {
		return Saved{}, fmt.Errorf("%s: %w", doing, err)
	}
	s := &save{m: m, o: o, limit: SaveBytes(h.Shape.memory()) - saveSlack}
	if err := writeHeader(file, h); err != nil {
		return Saved{}, fmt.Errorf("%s: %w", doing, err)
	}
	m.hold(1)
	err = s.run(ctx, file)
	if err == nil {
		err = file.Sync()
		if errors.Is(err, unix.EINVAL) { // no file that can be flushed
			err = nil
		}
	}
	var end int64
	if err == nil { // QEMU's descriptor has the same offset
		end, err = file.Seek(0, io.SeekCurrent)
	}
	if err == nil && o.End {
		return s.result(end - begin), nil // held for good
	}
	m.hold(-1)
	if err != nil {
		return Saved{}, fmt.Errorf("%s: %w", doing, errors.Join(err, s.recover(ctx)))
	}
	if err := m.goOn(context.WithoutCancel(ctx)); err != nil {
		return Saved{}, fmt.Errorf("%s: %w", doing, err)
	}
	return s.result(end - begin), nil
}

// saveSlack is room for the state of devices, and for what a guest changes until it is stopped.
const saveSlack = 256 << 20

// SaveBytes is the most that SaveMemory writes for a machine with that much memory, and so the size of a volume for
// it.
func SaveBytes(memory int64) int64 { return memory + memory/4 + saveSlack }

// header describes the machine as it is.
func (m *Machine) header() (header, error) {
	m.devices.Lock()
	defer m.devices.Unlock()
	for _, d := range m.disks {
		switch {
		case d.Bus == machinev1.NVMe:
			return header{}, fmt.Errorf("%w: disk %q is on NVMe, whose state QEMU does not save; put it on scsi or sata", ErrUnmigratable, d.Name)
		case d.NonPersistent:
			return header{}, fmt.Errorf("%w: disk %q is non-persistent, and its changes are not kept", ErrUnmigratable, d.Name)
		}
	}
	h := header{Machine: m.machine, Shape: m.shape.clone()}
	h.Machine.Restore, h.Machine.Operations, h.Machine.Seed = nil, nil, nil
	h.Machine.Disks = append([]machinev1.Disk{}, m.machine.Disks...)
	h.Machine.NICs = append([]machinev1.NIC{}, m.machine.NICs...)
	return h, nil
}

// save is one saving of a machine's memory.
type save struct {
	m     *Machine
	o     SaveOptions
	limit int64 // bytes; a guest that would need more is stopped

	begun   bool
	stopped time.Time // when the guest was
}

func (s *save) result(bytes int64) Saved { return Saved{Bytes: bytes, Pause: time.Since(s.stopped)} }

// run saves; the guest stands still afterwards.
//
//	setup, active --(guest stops)--> pre-switchover --AtPause--> device --> completed
//	   any of them --> failed, cancelled
func (s *save) run(ctx context.Context, file *os.File) error {
	m := s.m
	status := make(chan string, 16)
	events := m.qmp.Expect(func(e qmp.Event) bool {
		if st := migrationStatus(e); st != "" {
			select {
			case status <- st:
			default:
			}
		}
		return false
	})
	defer events.Forget()
	err := m.do(
		ctx, "beginning",
		setMigration, setBandwidth,
		qmp.Command{Name: "getfd", Args: map[string]any{"fdname": "memory"}, File: file},
		qmp.Command{Name: "migrate", Args: map[string]any{"uri": "fd:memory"}},
	)
	if err != nil {
		return unmigratable(err)
	}
	s.begun = true
	tick := time.NewTicker(progressInterval)
	defer tick.Stop()
	for {
		select {
		case st := <-status:
			if done, err := s.step(ctx, st); done || err != nil {
				return err
			}
		case <-tick.C:
			if err := s.look(ctx); err != nil {
				return err
			}
		case <-m.done:
			return vm.ErrExited
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// step takes one change of QEMU's status.
func (s *save) step(ctx context.Context, status string) (done bool, err error) {
	switch status {
	case "pre-switchover":
		if s.stopped.IsZero() {
			s.stopped = time.Now()
		}
		if s.o.AtPause != nil {
			if err := s.o.AtPause(); err != nil {
				return false, err
			}
		}
		return false, s.m.do(ctx, "going on", qmp.Command{Name: "migrate-continue", Args: map[string]any{"state": "pre-switchover"}})
	case "completed":
		return true, s.look(ctx)
	case "failed", "cancelled":
		return true, fmt.Errorf("qemu could not write it: %s", s.reason(ctx))
	}
	return false, nil
}

// info is the answer to query-migrate.
type info struct {
	Status string `json:"status"`
	Error  string `json:"error-desc"`
	RAM    struct {
		Transferred int64 `json:"transferred"`
		Remaining   int64 `json:"remaining"`
		Total       int64 `json:"total"`
	} `json:"ram"`
}

func (s *save) query(ctx context.Context) (i info, err error) {
	return i, s.m.do(ctx, "looking", qmp.Command{Name: "query-migrate", Result: &i})
}

// reason is why it failed, as far as QEMU says so.
func (s *save) reason(ctx context.Context) string {
	i, err := s.query(ctx)
	switch {
	case err != nil:
		return err.Error()
	case i.Error != "":
		return i.Error
	}
	return "is the volume for the memory full? " + i.Status
}

// look reports the progress, and stops a guest that changes its memory too fast.
func (s *save) look(ctx context.Context) error {
	i, err := s.query(ctx)
	if err != nil {
		return err
	}
	if s.o.Progress != nil && i.RAM.Total > 0 {
		s.o.Progress(int(max(min(100-i.RAM.Remaining*100/i.RAM.Total, 100), 0)))
	}
	if i.RAM.Transferred+i.RAM.Remaining > s.limit && s.stopped.IsZero() && i.Status == "active" {
		s.stopped = time.Now()
		return s.m.do(ctx, "stopping a guest that changes its memory too fast", qmp.Command{Name: "stop"})
	}
	return nil
}

// recover makes the machine go on after a failure.
func (s *save) recover(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cancelTimeout)
	defer cancel()
	if s.begun {
		if err := s.abort(ctx); err != nil {
			return err
		}
	}
	return s.m.goOn(ctx)
}

// abort gives up and waits until QEMU has.
func (s *save) abort(ctx context.Context) error {
	if err := s.m.do(ctx, "giving up", qmp.Command{Name: "migrate_cancel"}); err != nil {
		return err
	}
	tick := time.NewTicker(progressInterval / 10)
	defer tick.Stop()
	for {
		i, err := s.query(ctx)
		if err != nil {
			return err
		}
		switch i.Status {
		case "cancelled", "failed", "completed", "":
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("giving up: %w", ctx.Err())
		}
	}
}

// unmigratable tells that a device is in the way from other failures.
func unmigratable(err error) error {
	var q *qmp.Error
	if errors.As(err, &q) && (strings.Contains(q.Desc, "non-migratable") || strings.Contains(q.Desc, "blocked")) {
		return fmt.Errorf("%w: %w", ErrUnmigratable, err)
	}
	return err
}
