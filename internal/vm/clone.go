package vm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/linux/memfd"
	"atoll.dev/atoll/internal/vm/block"
	"atoll.dev/atoll/internal/vm/qemu"
	"atoll.dev/atoll/internal/vm/qmp"
)

// The barrier handshake on the control port.
const (
	barrierReady = "ATOLLRDY"  // guest to host
	barrierGo    = "ATOLLGO\n" // host to guest
)

// cloneTimeout is far above what the busiest host needs to load a state.
const cloneTimeout = 3 * time.Minute

// Clone makes a new machine from the template and returns when the state is loaded. Unless
// cfg.Paused, it runs from then on. The guest has been told to leave the barrier; Channel carries
// whatever protocol follows.
//
// Needs CAP_SETUID and CAP_SETGID; without cfg.Tap also CAP_NET_ADMIN and CAP_SYS_ADMIN. An error
// wraps ErrTemplate when the template itself is to blame.
func (t *Template) Clone(ctx context.Context, cfg CloneConfig) (*Machine, error) {
	m, err := t.clone(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("cloning a micro-VM: %w", err)
	}
	return m, nil
}

func (t *Template) clone(ctx context.Context, cfg CloneConfig) (*Machine, error) {
	if err := checkUser(cfg.UID, cfg.GID); err != nil {
		return nil, err
	}
	if err := checkScratch(cfg.Scratch, t.meta.ScratchBytes); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, cloneTimeout)
	defer cancel()
	// A file of its own for each clone, since QEMU reads it from its current offset.
	state, err := memfd.Reopen(t.state)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrTemplate, err)
	}
	defer state.Close()
	q := t.meta.machine()
	q.RAM, q.State, q.Scratch, q.Paused = t.ram, state, cfg.Scratch, cfg.Paused
	m, err := launch(q, launchConfig{uid: cfg.UID, gid: cfg.GID, tap: cfg.Tap})
	if err != nil {
		return nil, err
	}
	m.meta = t.meta
	if err := m.load(ctx); err != nil {
		err = withOutput(err, m.proc.Stderr(), m.Console())
		return nil, errors.Join(err, m.Close())
	}
	return m, nil
}

// load restores the state of the template and releases the guest from the barrier.
func (m *Machine) load(ctx context.Context) error {
	loaded := m.qmp.Expect(migrationEnd)
	err := m.qmp.Run(
		ctx,
		qmp.Command{Name: "qmp_capabilities"},
		setCapabilities,
		qmp.Command{Name: "migrate-incoming", Args: map[string]any{"uri": qemu.IncomingURI}},
	)
	if err != nil {
		return m.blame(ctx, err)
	}
	if err := m.release(); err != nil {
		return m.blame(ctx, err)
	}
	e, err := loaded.Wait(ctx)
	if err != nil {
		return m.blame(ctx, err)
	}
	if !completed(e) {
		return fmt.Errorf("%w: qemu could not load its state", ErrTemplate)
	}
	g, err := m.qmp.Greeting(ctx)
	if err != nil {
		return m.blame(ctx, err)
	}
	if g.Version() != m.meta.QEMUVersion {
		return fmt.Errorf("%w: made by QEMU %s, not %s", ErrTemplate, m.meta.QEMUVersion, g.Version())
	}
	return nil
}

// blame says whether a clone that did not come up is the template's fault. QEMU ends with status 1
// both for a command line it does not take and for a state it cannot load.
func (m *Machine) blame(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return fmt.Errorf("waiting for the state to load: %w", err)
	}
	select {
	case <-m.done:
	case <-ctx.Done():
		return err
	}
	if e := m.Exit(); e.Reason == ExitFailed && e.Status.Exited() {
		return fmt.Errorf("%w: %s", ErrTemplate, e)
	}
	return fmt.Errorf("%w: %s", ErrExited, m.Exit())
}

// release lets the guest leave the barrier.
func (m *Machine) release() error {
	if _, err := io.WriteString(m.channel, barrierGo); err != nil {
		return fmt.Errorf("releasing the guest: %w", err)
	}
	return nil
}

// Boot starts a machine without a template, for a kernel that cannot be cloned or to try one out.
// It returns when the guest has left the barrier.
func Boot(ctx context.Context, cfg Config, own CloneConfig) (*Machine, error) {
	m, err := bootMachine(ctx, cfg, own)
	if err != nil {
		return nil, fmt.Errorf("booting a micro-VM: %w", err)
	}
	return m, nil
}

func bootMachine(ctx context.Context, cfg Config, own CloneConfig) (_ *Machine, err error) {
	cfg.UID, cfg.GID = own.UID, own.GID
	if cfg, err = cfg.withDefaults(); err != nil {
		return nil, err
	}
	if err := checkScratch(own.Scratch, cfg.ScratchBytes); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, cfg.BootTimeout)
	defer cancel()
	q, err := bootConfig(cfg)
	if err != nil {
		return nil, err
	}
	defer closeFiles(q.Kernel, q.Initrd)
	q.Scratch = own.Scratch
	m, err := launch(q, launchConfig{uid: own.UID, gid: own.GID, tap: own.Tap})
	if err != nil {
		return nil, err
	}
	m.meta = cfg.meta()
	defer func() {
		if err != nil {
			_ = m.Close()
		}
	}()
	if err := m.boot(ctx); err != nil {
		return nil, err
	}
	if own.Paused {
		if err := m.Pause(ctx); err != nil {
			return nil, err
		}
	}
	return m, m.release()
}

// boot waits until a machine that boots a kernel has reached the barrier.
func (m *Machine) boot(ctx context.Context) error {
	if err := m.negotiate(ctx); err != nil {
		return err
	}
	return m.reach(ctx)
}

// negotiate makes the monitor take commands.
func (m *Machine) negotiate(ctx context.Context) error {
	if err := m.qmp.Run(ctx, qmp.Command{Name: "qmp_capabilities"}); err != nil {
		return m.bootError(ctx)
	}
	return nil
}

// reach waits for the barrier.
func (m *Machine) reach(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { _ = m.channel.SetReadDeadline(time.Unix(1, 0)) })
	buf := make([]byte, len(barrierReady))
	_, err := io.ReadFull(m.channel, buf)
	if !stop() || err != nil {
		return m.bootError(ctx)
	}
	if string(buf) != barrierReady {
		return fmt.Errorf("%w: init said %q instead of %q", ErrKernel, buf, barrierReady)
	}
	return nil
}

// bootError finds out why a boot failed: QEMU did not start, or the guest did not come up.
func (m *Machine) bootError(ctx context.Context) error {
	if ctxErr := ctx.Err(); ctxErr != nil {
		err := fmt.Errorf("waiting for init to reach the barrier: %w", ctxErr)
		if errors.Is(ctxErr, context.DeadlineExceeded) {
			err = fmt.Errorf("%w: %w", ErrKernel, err)
		}
		return withOutput(err, m.proc.Stderr(), m.Console())
	}
	select {
	case <-m.done:
	case <-ctx.Done():
		return m.bootError(ctx)
	}
	e := m.Exit()
	cause := ErrKernel
	if e.Reason == ExitFailed && !strings.Contains(e.Detail, "kernel") && !strings.Contains(e.Detail, "initrd") {
		cause = ErrQEMU
	}
	return withOutput(fmt.Errorf("%w: %s", cause, e), "", m.Console())
}

// checkScratch refuses a scratch image that does not fit the disk the guest already knows.
func checkScratch(f *os.File, want int64) error {
	if f == nil {
		return nil
	}
	st, err := f.Stat()
	if err != nil {
		return fmt.Errorf("reading the size of the scratch image: %w", err)
	}
	if !st.Mode().IsRegular() || st.Size() != want {
		return fmt.Errorf("scratch image has %d bytes instead of %d", st.Size(), want)
	}
	return block.CheckAccess(f, unix.O_RDWR)
}
