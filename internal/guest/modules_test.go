package guest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func moduleDir(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for i := range 12 { // more than ten: the order is that of the whole number
		name := filepath.Join(dir, fmt.Sprintf("%03d-m%d.ko", i, i))
		if err := os.WriteFile(name, nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestModulesAreLoadedInOrder(t *testing.T) {
	dir := moduleDir(t)
	var got []string
	n, err := loadAll(dir, func(f *os.File) error {
		got = append(got, filepath.Base(f.Name()))
		if len(got) == 3 {
			return unix.EEXIST
		}
		return nil
	})
	if n != 12 || err != nil || !slices.IsSorted(got) || len(got) != 12 {
		t.Errorf("%d modules, %v: %v", n, err, got)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("files left in memory: %v, %v", left, err)
	}
	if n, err := loadAll(dir, nil); n != 0 || err != nil {
		t.Errorf("without modules: %d, %v", n, err)
	}
	if n, err := loadAll(filepath.Join(dir, "none"), nil); n != 0 || err != nil {
		t.Errorf("without a directory: %d, %v", n, err)
	}
}

func TestModuleThatDoesNotLoad(t *testing.T) {
	calls := 0
	_, err := loadAll(moduleDir(t), func(*os.File) error {
		if calls++; calls == 2 {
			return unix.ENOEXEC
		}
		return nil
	})
	if calls != 2 || !errors.Is(err, unix.ENOEXEC) || !strings.Contains(err.Error(), "001-m1.ko") {
		t.Errorf("after %d modules: %v", calls, err)
	}
}
