package guest

import (
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"
)

// TestOpenPort: the port of a guest that starves may appear late, and a guest without one says so.
func TestOpenPort(t *testing.T) {
	for name, c := range map[string]struct {
		after time.Duration
		fails bool
	}{
		"at once": {}, "late": {after: 30 * time.Second}, "never": {after: time.Hour, fails: true},
	} {
		dir := t.TempDir()
		if err := os.Mkdir(filepath.Join(dir, "null"), 0o700); err != nil { // of /dev/null
			t.Fatal(err)
		}
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				timer := time.AfterFunc(c.after, func() {
					if err := os.WriteFile(filepath.Join(dir, "null", "name"), []byte("port\n"), 0o600); err != nil {
						t.Error(err)
					}
				})
				defer timer.Stop()
				f, err := openPort(dir, "port")
				if c.fails != (err != nil) {
					t.Errorf("%v", err)
				}
				if err == nil {
					_ = f.Close()
				}
			})
		})
	}
}
