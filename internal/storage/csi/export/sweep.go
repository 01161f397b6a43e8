package export

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Sweep ends what nobody needs, with what it has left: daemons and mounts of volumes for which needed is false.
// It is for the start of the process that drives them: one before it may have died in the middle of something.
// A daemon whose mount is gone takes a good part of a processor for nothing.
func (s *Set) Sweep(ctx context.Context, needed func(name string, mounted bool) bool) error {
	names, err := s.names()
	if err != nil {
		return fmt.Errorf("looking for exported volumes: %w", err)
	}
	var errs []error
	for _, name := range names {
		errs = append(errs, s.sweep(ctx, name, needed))
	}
	return errors.Join(errs...)
}

func (s *Set) sweep(ctx context.Context, name string, needed func(name string, mounted bool) bool) error {
	unlock, err := s.lock(ctx, name)
	if err != nil {
		return fmt.Errorf("ending unused export: %w", err)
	}
	defer unlock()
	if needed(name, s.isMounted(name)) {
		return nil
	}
	if err := s.remove(name); err != nil {
		return fmt.Errorf("ending unused export: %w", err)
	}
	return nil
}

// RemoveAll ends what is exported, with whoever still uses it.
func (s *Set) RemoveAll() error {
	err := s.Sweep(context.Background(), func(string, bool) bool { return false })
	if err != nil {
		return fmt.Errorf("removing exported volumes: %w", err)
	}
	return nil
}

// names are the volumes of which there is anything: a directory or a daemon.
func (s *Set) names() ([]string, error) {
	found := map[string]bool{}
	entries, err := os.ReadDir(s.cfg.Dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for _, e := range entries {
		found[e.Name()] = true
	}
	err = s.daemons(func(_ int, name string) { found[name] = true })
	names := make([]string, 0, len(found))
	for name := range found {
		names = append(names, name)
	}
	return names, err
}

// daemons goes through the daemons of this set, known by what they call themselves.
func (s *Set) daemons(f func(pid int, name string)) error {
	all, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return err
	}
	for _, file := range all {
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		if err != nil {
			continue
		}
		if name, ok := s.calledBy(pid); ok {
			f(pid, name)
		}
	}
	return nil
}

// calledBy tells the volume of a daemon of this set.
func (s *Set) calledBy(pid int) (name string, ok bool) {
	args, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil { // it has ended
		return "", false
	}
	first, _, _ := bytes.Cut(args, []byte{0})
	path, ok := strings.CutPrefix(string(first), argumentPrefix)
	if !ok || filepath.Dir(path) != filepath.Clean(s.cfg.Dir) {
		return "", false
	}
	// One in a container may have the same directory, of its own.
	own, err := os.Readlink("/proc/self/ns/pid")
	if err != nil {
		return "", false
	}
	its, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", pid))
	return filepath.Base(path), err == nil && its == own
}

// exported finds the daemon of a volume that is exported. Its id is noted when that is done.
func (s *Set) exported(name string) (pid int, ok bool) {
	if pid, ok = s.noted(name); !ok {
		return 0, false
	}
	n, ok := s.calledBy(pid)
	return pid, ok && n == name
}

// noted is the process that a volume was exported by. It may have ended.
func (s *Set) noted(name string) (pid int, ok bool) {
	data, err := os.ReadFile(s.pid(name))
	if err != nil {
		return 0, false
	}
	pid, err = strconv.Atoi(strings.TrimSpace(string(data)))
	return pid, err == nil
}

// running finds the daemon of a volume, also one whose start somebody died in the middle of.
func (s *Set) running(name string) (pid int, ok bool) {
	if pid, ok := s.exported(name); ok {
		return pid, true
	}
	err := s.daemons(func(p int, n string) {
		if n == name {
			pid = p
		}
	})
	return pid, err == nil && pid > 0
}

// isMounted does not ask the daemon, which may not answer.
func (s *Set) isMounted(name string) bool {
	var st unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, s.file(name), unix.AT_SYMLINK_NOFOLLOW|unix.AT_STATX_DONT_SYNC, 0, &st)
	return err == nil && st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0
}
