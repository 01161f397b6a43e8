package hostcgroup

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"testing"
)

func TestHierarchies(t *testing.T) {
	name := filepath.Join(t.TempDir(), "mountinfo")
	err := os.WriteFile(name, []byte(`30 24 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw
31 30 0:27 / /sys/fs/cgroup/memory rw shared:4 - cgroup cgroup rw,memory
32 30 0:28 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset
33 30 0:29 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
34 30 0:27 /docker/x /mnt/part rw - cgroup cgroup rw,memory
35 30 0:27 / /mnt/again rw - cgroup cgroup rw,memory
`), 0o600)
	if err != nil {
		t.Fatal(err)
	}
	got, err := hierarchies(name)
	want := []hierarchy{{"/sys/fs/cgroup/memory", false}, {"/sys/fs/cgroup/cpuset", true}, {"/sys/fs/cgroup/unified", false}}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, %v", got, err)
	}
	if _, err := create(name, "/no/such/parent", "x"); !errors.Is(err, ErrNoParent) {
		t.Errorf("missing parent: %v", err)
	}
}

func TestRemoveMissing(t *testing.T) {
	if err := Remove(t.Context(), []string{filepath.Join(t.TempDir(), "none")}); err != nil {
		t.Error(err)
	}
}

func TestSustain(t *testing.T) {
	for name, c := range map[string]struct{ file, before, period, after string }{
		"v2, small":     {"cpu.max", "1200 100000\n", "", "25000 100000"},
		"v2, unlimited": {"cpu.max", "max 100000\n", "", "max 100000\n"},
		"v2, enough":    {"cpu.max", "50000 100000\n", "", "50000 100000\n"},
		"v1, small":     {"cpu.cfs_quota_us", "1200\n", "50000\n", "12500"},
		"v1, unlimited": {"cpu.cfs_quota_us", "-1\n", "100000\n", "-1\n"},
		"v1, enough":    {"cpu.cfs_quota_us", "25000\n", "100000\n", "25000\n"},

		"v2, little memory":    {"memory.max", "218103808\n", "", "738197504"},
		"v2, unlimited memory": {"memory.max", "max\n", "", "max\n"},
		"v2, enough memory":    {"memory.max", "1073741824\n", "", "1073741824\n"},
		"v1, little memory":    {"memory.limit_in_bytes", "218103808\n", "", "738197504"},
		"v1, unlimited memory": {"memory.limit_in_bytes", "9223372036854771712\n", "", "9223372036854771712\n"},
	} {
		parent := t.TempDir()
		g := Group{Dirs: []string{filepath.Join(parent, "vm-1"), filepath.Join(t.TempDir(), "vm-1")}}
		file := filepath.Join(parent, c.file)
		err := os.WriteFile(file, []byte(c.before), 0o600)
		if c.period != "" {
			err = errors.Join(err, os.WriteFile(filepath.Join(parent, "cpu.cfs_period_us"), []byte(c.period), 0o600))
		}
		if err != nil {
			t.Fatal(err)
		}
		if err := g.Sustain(512 << 20); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if got, err := os.ReadFile(file); err != nil || string(got) != c.after {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	odd := t.TempDir()
	if err := os.WriteFile(filepath.Join(odd, "cpu.max"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := (Group{Dirs: []string{filepath.Join(odd, "vm-1")}}).Sustain(512 << 20); err == nil {
		t.Error("an odd limit is understood")
	}
	if err := (Group{}).Sustain(512 << 20); err != nil {
		t.Error(err)
	}
}
