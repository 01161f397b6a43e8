package container

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/guest/cgroup"
	"atoll.dev/atoll/internal/guest/program"
	"atoll.dev/atoll/internal/guest/usage"
)

const (
	// readyShells is how many shells are made in the template: for the rehearsals of a clone and for the
	// containers of most pods. New ones are made when all are taken, so that most pods never run that code.
	readyShells = 6
	// refillDelay keeps the making of new shells out of the way of a pod that is starting.
	refillDelay = 2 * time.Second
)

// shell is what a container needs that does not depend on the container: the directories of its
// writable layer, a cgroup, and for most a helper that waits in both cgroup and pid namespace for
// its program, with the usual mounts made. Making these is a third of a container start under emulation, so some are kept
// ready.
type shell struct {
	name   string
	dir    string
	upper  string
	work   string
	usage  *usage.Dir
	group  *cgroup.Group
	helper *helper // nil: none
}

// FillShells makes shells until enough are ready.
func (r *Runtime) FillShells() error {
	for len(r.shells) < cap(r.shells) {
		s, err := r.makeShell(true)
		if err != nil {
			return fmt.Errorf("preparing for a container: %w", err)
		}
		select {
		case r.shells <- s:
		default:
			r.dropShell(s)
		}
	}
	return nil
}

// takeShell returns a shell that was ready, or makes one without a helper.
func (r *Runtime) takeShell() (*shell, error) {
	select {
	case s := <-r.shells:
		return s, nil
	default:
	}
	select {
	case r.missed <- struct{}{}:
	default:
	}
	return r.makeShell(false)
}

func (r *Runtime) makeShell(withHelper bool) (_ *shell, err error) {
	r.mu.Lock()
	r.shellCount++
	name := strconv.Itoa(r.shellCount)
	r.mu.Unlock()
	dir := filepath.Join(r.cfg.Scratch, name)
	s := &shell{name: name, dir: dir, upper: filepath.Join(dir, "upper"), work: filepath.Join(dir, "work")}
	defer func() {
		if err != nil {
			r.dropShell(s)
		}
	}()
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, fmt.Errorf("making writable layer: %w", err)
	}
	if s.usage, err = r.cfg.Meter.Track(dir, 0); err != nil {
		return nil, err
	}
	for _, d := range []string{s.upper, s.work} {
		if err := os.Mkdir(d, 0o755); err != nil {
			return nil, fmt.Errorf("making writable layer: %w", err)
		}
	}
	if s.group, err = r.cfg.Tree.Create(name); err != nil {
		return nil, err
	}
	if withHelper {
		s.helper, err = r.waitingHelper(s.group)
	}
	return s, err
}

// waitingHelper forks a helper for an ordinary first process: own pid namespace, no terminal, no
// stdin.
func (r *Runtime) waitingHelper(group *cgroup.Group) (*helper, error) {
	cg, err := group.Open()
	if err != nil {
		return nil, err
	}
	defer cg.Close()
	io, err := openStdio(false, false)
	if err != nil {
		return nil, err
	}
	prog, err := program.Furnish()
	if err != nil {
		io.close()
		return nil, err
	}
	h, err := newHelper(r.cfg.Reaper, launch{helper: r.cfg.Helper, flags: unix.CLONE_NEWPID, cgroup: cg}, io)
	if err != nil {
		return nil, err
	}
	if _, err := h.program.Write(prog.Code); err != nil {
		h.close()
		return nil, fmt.Errorf("furnishing: %w", err)
	}
	return h, nil
}

// dropHelper ends the helper of a shell that cannot use it.
func (s *shell) dropHelper() {
	if s.helper != nil {
		s.helper.close()
		s.helper = nil
	}
}

// dropShell takes down what a container left, or what was never used.
func (r *Runtime) dropShell(s *shell) {
	s.dropHelper()
	ctx, cancel := context.WithTimeout(context.Background(), deleteTimeout)
	defer cancel()
	if s.group != nil {
		_ = s.group.Delete(ctx) //nolint:errcheck // the error that led here is the one to report
	}
	_ = os.RemoveAll(s.dir)
}

// prepareLayer gives the upper directory the attributes of the image's root, which are what the
// root of the overlay shows.
func (s *shell) prepareLayer(image string) error {
	var st unix.Stat_t
	if err := unix.Stat(image, &st); err != nil {
		return fmt.Errorf("reading image root: %w", err)
	}
	if st.Uid != 0 || st.Gid != 0 {
		if err := unix.Chown(s.upper, int(st.Uid), int(st.Gid)); err != nil {
			return fmt.Errorf("making writable layer: %w", err)
		}
	}
	if st.Mode&0o7777 == 0o755 {
		return nil
	}
	if err := unix.Chmod(s.upper, st.Mode&0o7777); err != nil {
		return fmt.Errorf("making writable layer: %w", err)
	}
	return nil
}

// removeLayer hands the writable layer to Run to be deleted.
func (r *Runtime) removeLayer(ctx context.Context, dir string) error {
	select {
	case r.remove <- dir:
		return nil
	case <-ctx.Done():
		return errors.Join(errors.New("removing writable layer"), ctx.Err())
	}
}
