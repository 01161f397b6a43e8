package disk

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"
)

// TestFindWaits: on a busy host a disk that was added takes seconds to appear.
func TestFindWaits(t *testing.T) {
	sys := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		d := New(sys, t.TempDir())
		if _, err := d.Find(t.Context(), "v1"); !errors.Is(err, ErrNotFound) {
			t.Errorf("a disk that never comes: %v", err)
		}
		go func() {
			time.Sleep(10 * time.Second)
			dir := filepath.Join(sys, "vdz")
			if err := errors.Join(os.Mkdir(dir, 0o700), os.WriteFile(filepath.Join(dir, "serial"), []byte("v1"), 0o600)); err != nil {
				t.Error(err)
			}
		}()
		if device, err := d.Find(t.Context(), "v1"); device != "/dev/vdz" || err != nil {
			t.Errorf("%q, %v", device, err)
		}
	})
}
