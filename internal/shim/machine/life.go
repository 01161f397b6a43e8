package machine

import (
	"cmp"
	"context"
	"errors"
	"io"
	"log/slog"
	"os"
	"slices"
	"sync"
	"time"

	apievents "github.com/containerd/containerd/api/events"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/network"
	"atoll.dev/atoll/internal/shim/machine/board"
	"atoll.dev/atoll/internal/shim/machine/freeze"
	"atoll.dev/atoll/internal/shim/machine/guest"
	"atoll.dev/atoll/internal/shim/machine/health"
	"atoll.dev/atoll/internal/vm"
	"atoll.dev/atoll/internal/vm/guestagent"
	"atoll.dev/atoll/internal/vm/hardware"
)

const (
	// killTimeout bounds how long QEMU may write and end after a power cut.
	killTimeout = 15 * time.Second
	// releaseTimeout bounds the giving back of what the machine had.
	releaseTimeout = 30 * time.Second
	// askTimeout bounds how long the guest agent may take to hear that it is to shut down.
	askTimeout = 3 * time.Second
	// askAgain is the pause before a guest that has not shut down is asked again.
	askAgain = 15 * time.Second
	// defaultStop is how long a guest may take to shut down where nobody says.
	defaultStop = 5 * time.Minute
)

// life is one machine from the start of its container to its end.
type life struct {
	s       *Service
	process *process
	// ctx ends with the machine, starting with what starts it; giveUp ends only that.
	ctx    context.Context
	cancel context.CancelFunc
	giveUp context.CancelFunc
	wake   chan struct{} // buffered: there may be something to do for the worker
	gone   chan struct{} // closed when QEMU has ended
	ended  chan struct{} // closed when everything is given back and the exit is reported
	reset  chan struct{} // buffered: the guest was restarted

	askAgain time.Duration
	health   *health.Health

	mu        sync.Mutex // guards the fields below, not held over calls
	hw        Hardware   // nil until it runs, as the next
	files     *freeze.Guest
	tpm       TPM
	spec      *machinev1.Machine // as QEMU was started
	guest     network.Guest      // the pod's interface
	disks     map[string]*disk
	nics      map[string]*nic
	dropped   []string          // handles of volumes that the agent must be told are closed
	asked     bool              // the end was asked for
	crash     string            // why it was ended without being asked for
	cut       bool              // by force
	suspended bool              // the memory is saved
	done      map[string]string // operations that were begun, by id
	busy      bool              // an operation is under way, in which disks are snapshotted
	taps      int               // made so far, for their names
}

// begin starts the machine in the background.
func (s *Service) begin(p *process, e ends) {
	l := &life{
		s: s, process: p, wake: make(chan struct{}, 1), gone: make(chan struct{}), ended: make(chan struct{}), reset: make(chan struct{}, 1),
		askAgain: askAgain, disks: map[string]*disk{}, nics: map[string]*nic{}, done: map[string]string{},
	}
	l.health = health.New(health.Config{Board: s.board, Keep: l.keepCrashed, End: l.crashed})
	l.ctx, l.cancel = context.WithCancel(s.background)
	var starting context.Context
	starting, l.giveUp = context.WithCancel(l.ctx)
	s.mu.Lock()
	s.life = l
	s.mu.Unlock()
	s.running.Go(func() {
		defer close(l.ended)
		defer l.cancel()
		err := l.boot(starting)
		if err == nil {
			l.run(e)
		}
		l.finish(e, err)
	})
}

// hardware is the machine, nil as long as there is none.
func (l *life) hardware() Hardware {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.hw
}

// run is what goes on while the machine runs.
func (l *life) run(e ends) {
	hw := l.hardware()
	l.s.cfg.Started(hw.PID())
	l.s.board.Update(func(st *machinev1.State) {
		st.Phase, st.Reason, st.Message, st.Started = machinev1.Running, "", "", board.Now()
		st.Accelerator = string(hw.Accelerator())
	})
	var background sync.WaitGroup
	l.console(&background, hw, e)
	background.Go(l.worker)
	background.Go(l.watchGuest)
	l.serveNetwork(&background)
	<-hw.Done()
	l.health.Stop()
	close(l.gone)
	l.cancel()
	e.close()
	background.Wait()
}

// console joins the serial line to the container's standard streams. Output of a guest that nobody reads is lost.
func (l *life) console(wg *sync.WaitGroup, hw Hardware, e ends) {
	line := hw.Serial()
	wg.Go(func() {
		_, _ = io.Copy(e.out, line)
		_ = line.Close()
	})
	if e.in == nil {
		return
	}
	wg.Go(func() { _, _ = io.Copy(line, e.in) })
}

// finish gives everything back and reports the end.
func (l *life) finish(e ends, failure error) {
	end, status := l.outcome(failure)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(l.ctx), releaseTimeout)
	defer cancel()
	l.release(ctx)
	slog.Info("virtual machine ended", "sandbox", l.s.ID(), "reason", end.Reason, "message", end.Message)
	l.s.mu.Lock()
	words := l.s.lastWords
	l.s.mu.Unlock()
	if words != "" && end.Message != "" {
		if err := os.WriteFile(words, []byte(end.Message), 0o644); err != nil {
			slog.Warn("writing termination message", "error", err)
		}
	}
	l.s.board.Update(func(st *machinev1.State) {
		st.Phase, st.End, st.Reason, st.Message, st.Trouble = machinev1.Ended, end, "", "", nil
		st.Disks = slices.Clone(st.Disks)
		for i := range st.Disks {
			st.Disks[i].Attached = false
		}
	})
	e.close()
	if l.s.cfg.Cgroups.OOMKilled() && end.Reason == machinev1.EndCrashed {
		l.s.cfg.Events.Publish(&apievents.TaskOOM{ContainerID: l.process.id})
	}
	l.s.exited(l.process, status)
}

// outcome says how the machine has ended and what the container exits with.
func (l *life) outcome(failure error) (machinev1.End, uint32) {
	l.mu.Lock()
	hw, asked, suspended, crash := l.hw, l.asked, l.suspended, l.crash
	l.mu.Unlock()
	end := machinev1.End{At: board.Now()}
	switch {
	case failure != nil && asked:
		end.Reason = machinev1.EndStopped
		return end, 0
	case failure != nil:
		end.Reason, end.Message = machinev1.EndFailed, board.Cut(failure.Error())
		return end, statusFailed
	}
	exit := hw.Exit()
	crashed := exit.Reason == vm.ExitFailed
	switch {
	case suspended:
		end.Reason = machinev1.EndSuspended
	case crash != "":
		end.Reason, end.Message = machinev1.EndPanicked, crash
	case asked:
		end.Reason = machinev1.EndStopped
	case crashed && l.s.cfg.Cgroups.OOMKilled():
		end.Reason = machinev1.EndCrashed
		end.Message = "the kernel of the host has killed the machine since memory ran out: of the host, or of the pod's limit"
	case crashed:
		end.Reason, end.Message = machinev1.EndCrashed, board.Cut("the machine was not shut down, qemu has ended: "+exit.String())
	default:
		end.Reason = machinev1.EndShutdown
	}
	if end.Message != "" {
		return end, statusKilled
	}
	return end, 0
}

// release gives back volumes, networks and the TPM. QEMU has ended, or was never started.
func (l *life) release(ctx context.Context) {
	l.mu.Lock()
	hw, tpm, disks := l.hw, l.tpm, l.disks
	l.disks, l.nics, l.tpm = map[string]*disk{}, map[string]*nic{}, nil
	l.mu.Unlock()
	if hw != nil {
		if err := hw.Close(); err != nil {
			slog.Warn("closing virtual machine", "error", err)
		}
	}
	if tpm != nil {
		if err := tpm.Close(); err != nil {
			slog.Warn("closing TPM", "error", err)
		}
	}
	for _, d := range disks {
		l.forget(ctx, d)
	}
	l.tellClosed(ctx)
}

// stop ends the machine: as its Stop says, or by force.
func (l *life) stop(force bool) {
	l.mu.Lock()
	again := l.asked && (l.cut || !force)
	l.asked, l.cut = true, l.cut || force
	hw := l.hw
	l.mu.Unlock()
	l.giveUp()
	if again || hw == nil {
		return // it is ending, or the start notices
	}
	if force {
		l.s.running.Go(l.powerOff)
		return
	}
	l.s.running.Go(func() { l.shutdown(hw) })
}

// shutdown asks the guest to end and, where that is wanted, makes it end after a while.
func (l *life) shutdown(hw Hardware) {
	l.s.mu.Lock()
	how := l.s.machine.Stop
	l.s.mu.Unlock()
	if how.Mode == machinev1.Hard {
		l.powerOff()
		return
	}
	limit := cmp.Or(time.Duration(how.TimeoutSeconds)*time.Second, defaultStop)
	cut := time.After(limit)
	if how.Mode == machinev1.Soft {
		cut = nil // whoever deletes the pod decides how long to wait
	}
	// A guest that is still booting hears neither its agent nor the button, so it is asked again. An agent that is slow
	// keeps nobody from pressing the button.
	answer := make(chan error, 1)
	ask := func() {
		answer <- guest.Shutdown(l.ctx, hw.Agent(), guestagent.PowerDown, guest.Within(hw.Agent(), askTimeout))
	}
	var again <-chan time.Time
	l.s.running.Go(ask)
	slow := time.After(guest.Timeout)
	for {
		select {
		case <-hw.Done():
			return
		case <-cut:
			slog.Warn("the guest does not shut down and is powered off", "sandbox", l.s.ID(), "after", limit)
			l.powerOff()
			return
		case err := <-answer:
			if err != nil {
				l.pressButton(hw)
			}
			slow, again = nil, time.After(l.askAgain)
		case <-slow:
			l.pressButton(hw)
			slow = time.After(l.askAgain)
		case <-again:
			l.s.running.Go(ask)
			slow = time.After(guest.Timeout)
		}
	}
}

// pressButton is for a guest whose agent does not answer.
func (l *life) pressButton(hw Hardware) {
	ctx, cancel := context.WithTimeout(l.ctx, askTimeout)
	defer cancel()
	if err := hw.PowerDown(ctx); err != nil && !errors.Is(err, vm.ErrExited) {
		slog.Warn("pressing the power button", "sandbox", l.s.ID(), "error", err)
	}
}

// powerOff cuts the power.
func (l *life) powerOff() {
	l.mu.Lock()
	l.asked, l.cut = true, true
	hw := l.hw
	l.mu.Unlock()
	l.giveUp()
	if hw == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(l.ctx), killTimeout)
	defer cancel()
	if err := hw.PowerOff(ctx); err != nil && !errors.Is(err, vm.ErrExited) {
		slog.Warn("powering off", "sandbox", l.s.ID(), "error", err)
		if err := hw.Kill(); err != nil {
			slog.Error("killing qemu", "sandbox", l.s.ID(), "error", err)
		}
	}
}

// keepCrashed tells whether a guest that has crashed is left as it is.
func (l *life) keepCrashed() bool {
	l.s.mu.Lock()
	defer l.s.mu.Unlock()
	return l.s.machine.KeepCrashed
}

// crashed ends a machine whose guest has crashed, unless its end was asked for.
func (l *life) crashed(message string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.asked {
		l.crash = message
		l.s.running.Go(l.powerOff)
	}
}

// event hears what happens to the machine. It must not block.
func (l *life) event(e hardware.Event) {
	l.health.Event(e)
	switch e.Kind {
	case hardware.EventReset:
		l.mu.Lock()
		l.files.Reset()
		l.mu.Unlock()
		poke(l.reset)
	case hardware.EventShutdown, hardware.EventTray, hardware.EventSuspend, hardware.EventWakeup, hardware.EventUnplug, hardware.EventRefused:
		poke(l.wake)
	}
}

// poke leaves a token in a buffered channel.
func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
