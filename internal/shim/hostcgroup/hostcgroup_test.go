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
	if err := Remove([]string{filepath.Join(t.TempDir(), "none")}); err != nil {
		t.Error(err)
	}
}
