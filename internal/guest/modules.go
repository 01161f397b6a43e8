package guest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/vm/initramfs/modules"
)

// loadModules loads what the host has put into the initramfs for a kernel that is not our own, and
// then lets nobody load more. Of the modules that only containers may want, some find nothing to
// drive; they are left out.
func loadModules(*machine) error {
	insert := func(f *os.File) error { return unix.FinitModule(int(f.Fd()), "", 0) }
	n, err := loadAll(modules.Dir, insert)
	if n == 0 || err != nil {
		return err
	}
	if _, err := loadAll(modules.WantedDir, func(f *os.File) error { _ = insert(f); return nil }); err != nil {
		return err
	}
	return os.WriteFile("/proc/sys/kernel/modules_disabled", []byte("1"), 0o644)
}

// loadAll loads the modules in a directory in the order of their names, which is that of their
// dependencies, and deletes the files: the initial file system is memory. It returns how many files
// there were. A module that is there already is fine.
func loadAll(dir string, load func(*os.File) error) (int, error) {
	names, err := filepath.Glob(filepath.Join(dir, "*.ko")) // sorted
	if err != nil {
		return 0, err
	}
	for _, name := range names {
		err := loadOne(name, load)
		if err != nil && !errors.Is(err, unix.EEXIST) {
			return len(names), fmt.Errorf("loading %s: %w", filepath.Base(name), err)
		}
		if err := os.Remove(name); err != nil {
			return len(names), err
		}
	}
	return len(names), nil
}

func loadOne(name string, load func(*os.File) error) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	return load(f)
}
