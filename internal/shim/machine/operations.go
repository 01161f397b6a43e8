package machine

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"time"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/datadir/attach"
	"atoll.dev/atoll/internal/shim/machine/board"
	"atoll.dev/atoll/internal/shim/machine/guest"
	"atoll.dev/atoll/internal/vm"
	"atoll.dev/atoll/internal/vm/guestagent"
	"atoll.dev/atoll/internal/vm/hardware"
)

const (
	// operationTimeout bounds an operation; saving a large memory takes minutes.
	operationTimeout = 30 * time.Minute
	// snapshotsTimeout bounds the snapshots of all disks, for which the guest stands still.
	snapshotsTimeout = 60 * time.Second
	// defaultQuiesce is how long file systems may take to freeze where nobody says.
	defaultQuiesce = 30 * time.Second
)

// operate does operations that were not done before, in order, and forgets those that are not asked for any more.
func (l *life) operate(m *machinev1.Machine) {
	named := func(id string) bool {
		return slices.ContainsFunc(m.Operations, func(o machinev1.Operation) bool { return o.ID == id })
	}
	l.s.board.Update(func(st *machinev1.State) {
		st.Operations = slices.DeleteFunc(slices.Clone(st.Operations), func(o machinev1.OperationState) bool { return !named(o.ID) })
		if len(st.Operations) == 0 {
			st.Operations = nil
		}
	})
	// Memory that could not be saved may be saved another time, by the same name: had it been, the machine had ended.
	maps.DeleteFunc(l.done, func(id, kind string) bool { return kind == string(machinev1.Suspend) && !named(id) })
	for _, o := range m.Operations {
		if l.done[o.ID] != "" || l.ctx.Err() != nil {
			continue
		}
		l.done[o.ID] = string(o.Kind)
		l.note(machinev1.OperationState{ID: o.ID})
		state, err := l.do(o)
		state.ID, state.Done = o.ID, true
		if err != nil {
			state.Error = board.Cut(err.Error())
			l.warn(fmt.Sprintf("operation %s %s of a virtual machine", o.Kind, o.ID), err)
		}
		l.note(state)
	}
}

// note writes the state of an operation down.
func (l *life) note(o machinev1.OperationState) {
	l.s.board.Update(func(st *machinev1.State) {
		all := slices.Clone(st.Operations)
		if i := slices.IndexFunc(all, func(old machinev1.OperationState) bool { return old.ID == o.ID }); i >= 0 {
			all[i] = o
		} else {
			all = append(all, o)
		}
		st.Operations = all
	})
}

func (l *life) do(o machinev1.Operation) (machinev1.OperationState, error) {
	ctx, cancel := context.WithTimeout(l.ctx, operationTimeout)
	defer cancel()
	switch o.Kind {
	case machinev1.Reset:
		return machinev1.OperationState{}, l.restart(ctx, o)
	case machinev1.Suspend:
		return l.suspend(ctx, o)
	case machinev1.Snapshot:
		return l.snapshot(ctx, o)
	}
	return machinev1.OperationState{}, fmt.Errorf("there is no operation %q", o.Kind)
}

// restart restarts the guest: by asking it, by force, or by force when asking does not help.
func (l *life) restart(ctx context.Context, o machinev1.Operation) error {
	if o.Mode == machinev1.Hard {
		return l.hw.Reset(ctx)
	}
	for drained := false; !drained; { // an earlier one
		select {
		case <-l.reset:
		default:
			drained = true
		}
	}
	limit := defaultStop
	if o.Mode == machinev1.TrySoft {
		l.s.mu.Lock()
		if n := l.s.machine.Stop.TimeoutSeconds; n > 0 {
			limit = time.Duration(n) * time.Second
		}
		l.s.mu.Unlock()
	}
	asking, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	err := guest.Shutdown(asking, l.hw.Agent(), guestagent.Reboot, guest.Within(l.hw.Agent(), askTimeout))
	if err == nil {
		select {
		case <-l.reset:
			return nil
		case <-asking.Done():
			err = fmt.Errorf("the guest has not restarted within %s", limit)
		}
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if o.Mode == machinev1.Soft {
		return fmt.Errorf("asking the guest to restart: %w; mode TrySoft or Hard restarts it by force", err)
	}
	return l.hw.Reset(ctx)
}

// suspend saves the memory and ends the machine. After an error it goes on.
func (l *life) suspend(ctx context.Context, o machinev1.Operation) (state machinev1.OperationState, err error) {
	f, err := l.openMemory(ctx, o.Memory, os.O_RDWR)
	if err != nil {
		return state, fmt.Errorf("opening the volume for memory: %w", err)
	}
	var saved hardware.Saved
	if err = l.files.Flush(ctx, o.Mode); err == nil {
		saved, err = l.hw.SaveMemory(ctx, f, hardware.SaveOptions{End: true, Progress: l.progress(o)})
	}
	if err == nil {
		err = f.Sync()
	}
	err = errors.Join(err, f.Close())
	l.closeMemory(o.Memory)
	if err != nil {
		if resumed := l.hw.Resume(context.WithoutCancel(ctx)); resumed != nil {
			err = errors.Join(err, resumed)
		}
		return state, err
	}
	state = machinev1.OperationState{Percent: 100, Bytes: saved.Bytes, PauseMillis: saved.Pause.Milliseconds()}
	state.ID, state.Done = o.ID, true
	l.note(state) // before the end is
	l.mu.Lock()
	l.suspended = true
	l.mu.Unlock()
	l.powerOff()
	return state, nil
}

func (l *life) progress(o machinev1.Operation) func(int) {
	return func(percent int) { l.note(machinev1.OperationState{ID: o.ID, Percent: percent}) }
}

// snapshot makes snapshots of disks at one moment, and of the memory at the same if that is wanted.
func (l *life) snapshot(ctx context.Context, o machinev1.Operation) (state machinev1.OperationState, err error) {
	volumes, err := l.snapshotVolumes(o)
	if err != nil {
		return state, err
	}
	l.setBusy(true)
	defer l.setBusy(false)
	if o.Quiesce {
		limit := defaultQuiesce
		if o.QuiesceSeconds > 0 {
			limit = time.Duration(o.QuiesceSeconds) * time.Second
		}
		thaw, err := l.files.Freeze(ctx, limit)
		defer thaw()
		if err != nil {
			return state, fmt.Errorf("freezing the file systems of the guest: %w; without quiesce it is not needed", err)
		}
		state.Quiesced = true
	}
	take := func() error {
		ctx, cancel := context.WithTimeout(ctx, snapshotsTimeout)
		defer cancel()
		return l.s.cfg.Agent.Snapshots(ctx, attach.SnapshotsRequest{Pod: l.s.uid(), Snapshots: volumes})
	}
	if o.Memory == nil {
		began := time.Now()
		if err := l.hw.Pause(ctx); err != nil {
			return state, err
		}
		err := take()
		if resumed := l.hw.Resume(context.WithoutCancel(ctx)); resumed != nil && !errors.Is(resumed, vm.ErrExited) {
			err = errors.Join(err, resumed)
		}
		state.Percent, state.PauseMillis = 100, time.Since(began).Milliseconds()
		return state, err
	}
	f, err := l.openMemory(ctx, o.Memory, os.O_RDWR)
	if err != nil {
		return state, fmt.Errorf("opening the volume for memory: %w", err)
	}
	saved, err := l.hw.SaveMemory(ctx, f, hardware.SaveOptions{AtPause: take, Progress: l.progress(o)})
	if err == nil {
		err = f.Sync()
	}
	err = errors.Join(err, f.Close())
	l.closeMemory(o.Memory)
	state.Percent, state.Bytes, state.PauseMillis = 100, saved.Bytes, saved.Pause.Milliseconds()
	return state, err
}

func (l *life) setBusy(busy bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.busy = busy
}

// snapshotVolumes are the ids that snapshots get, by the handles of the volumes.
func (l *life) snapshotVolumes(o machinev1.Operation) (map[string]string, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := map[string]string{}
	for name, id := range o.Snapshots {
		d := l.disks[name]
		if d == nil || d.spec.Volume == "" {
			return nil, fmt.Errorf("disk %s is not attached", name)
		}
		if d.spec.NonPersistent {
			return nil, fmt.Errorf("disk %s is not persistent and has no snapshots", name)
		}
		out[d.spec.Volume] = id
	}
	return out, nil
}
