package handover

import (
	"errors"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestUsage(t *testing.T) {
	file := filepath.Join(t.TempDir(), UsageFile)
	if _, _, err := ReadUsage(file); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("nothing written: %v", err)
	}
	want := Usage{Bytes: Limit(7), Inodes: Limit(math.MaxUint64), Capacity: 9, Available: 2}
	if want.Inodes != maxUsage {
		t.Errorf("limited to %d", want.Inodes)
	}
	if err := want.Write(file); err != nil {
		t.Fatal(err)
	}
	got, at, err := ReadUsage(file)
	if err != nil || got != want || time.Since(at) > time.Hour {
		t.Errorf("got %+v of %s, %v", got, at, err)
	}
	if err := want.Write(filepath.Join(t.TempDir(), "gone", UsageFile)); err != nil {
		t.Errorf("the pod is gone: %v", err)
	}
	if err := want.Write(filepath.Join(file, UsageFile)); err == nil {
		t.Error("wrote below a file")
	}
}

func TestReadUsage(t *testing.T) {
	for text, want := range map[string]Usage{
		`{"bytes":12345,"inodes":6}`:                      {Bytes: 12345, Inodes: 6},
		`{"bytes":-5,"capacity":9223372036854775807}`:     {Capacity: maxUsage},
		`{"bytes":1,"unknown":{}, "available": 3}` + "\n": {Bytes: 1, Available: 3},
	} {
		if got, err := read(t, text); err != nil || got != want {
			t.Errorf("%s: got %+v, %v", text, got, err)
		}
	}
	for _, text := range []string{"", "{", `{"bytes":1e99}`, strings.Repeat(" ", 2*maxUsageFile) + "{}"} {
		if got, err := read(t, text); err == nil {
			t.Errorf("%.20q: got %+v", text, got)
		}
	}
}

func FuzzReadUsage(f *testing.F) {
	f.Add(`{"bytes":12345,"inodes":6}`)
	f.Fuzz(func(t *testing.T, text string) {
		if u, err := read(t, text); err == nil && min(u.Bytes, u.Inodes, u.Capacity, u.Available) < 0 {
			t.Errorf("%q: %+v", text, u)
		}
	})
}

func read(t *testing.T, text string) (Usage, error) {
	t.Helper()
	file := filepath.Join(t.TempDir(), UsageFile)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	u, _, err := ReadUsage(file)
	return u, err
}

func TestPaths(t *testing.T) {
	if got := EmptyDirUsage("/k/pods/u", "cache"); got != "/k/pods/u/plugins/kubernetes.io~empty-dir/cache/usage.json" {
		t.Errorf("emptyDir: %s", got)
	}
	if got := LayerUsage("/s/snapshots/7/meta"); got != "/s/snapshots/7/usage.json" {
		t.Errorf("layer: %s", got)
	}
	if got := ImagePath([]string{"ro", "atoll.image=/a.erofs"}); got != "/a.erofs" {
		t.Errorf("image: %s", got)
	}
	if got := ImagePath([]string{"ro"}); got != "" {
		t.Errorf("no image: %s", got)
	}
}
