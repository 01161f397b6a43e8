package containerd

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"
)

// fakeHost is a directory with a checkpoint whose boot ID the test sets.
func fakeHost(t *testing.T) (*checkpoint, func(id string)) {
	c := newCheckpoint(t.TempDir(), slog.New(slog.DiscardHandler))
	c.boot = filepath.Join(t.TempDir(), "boot")
	boot := func(id string) {
		if err := os.WriteFile(c.boot, []byte(id+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := c.restore(); err != nil {
			t.Fatal(err)
		}
	}
	return c, boot
}

func put(t *testing.T, db *bolt.DB, value string) {
	t.Helper()
	err := db.Update(func(tx *bolt.Tx) error {
		b, err := tx.CreateBucketIfNotExists([]byte("b"))
		if err != nil {
			return err
		}
		return b.Put([]byte("k"), []byte(value))
	})
	if err != nil {
		t.Fatal(err)
	}
}

func get(t *testing.T, path string) string {
	t.Helper()
	db, err := bolt.Open(path, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	value := ""
	if err := db.View(func(tx *bolt.Tx) error {
		if b := tx.Bucket([]byte("b")); b != nil {
			value = string(b.Get([]byte("k")))
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return value
}

func TestCheckpoint(t *testing.T) {
	c, boot := fakeHost(t)
	boot("first")
	db, err := bolt.Open(c.db, 0o600, &bolt.Options{NoSync: true})
	if err != nil {
		t.Fatal(err)
	}
	put(t, db, "saved")
	last := -1
	if err := c.save(db, &last); err != nil {
		t.Fatal(err)
	}
	st, _ := os.Stat(c.saved)
	if err := c.save(db, &last); err != nil {
		t.Fatal(err)
	}
	if again, _ := os.Stat(c.saved); !os.SameFile(st, again) {
		t.Error("an unchanged database was saved again")
	}
	put(t, db, "later")
	db.Close()

	boot("first") // the process died
	if got := get(t, c.db); got != "later" {
		t.Errorf("after the process died: %q, want the last state", got)
	}
	if err := os.WriteFile(c.db, []byte("torn"), 0o600); err != nil {
		t.Fatal(err)
	}
	boot("second") // the host died
	if got := get(t, c.db); got != "saved" {
		t.Errorf("after the host died: %q, want the saved state", got)
	}
}

func TestCheckpointAtEnd(t *testing.T) {
	c, boot := fakeHost(t)
	boot("first")
	db, err := bolt.Open(c.db, 0o600, &bolt.Options{NoSync: true})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { c.run(ctx, db); close(done) }()
	for { // the first save
		if _, err := os.Stat(c.saved); err == nil {
			break
		}
		time.Sleep(time.Millisecond)
	}
	put(t, db, "last words")
	cancel()
	<-done
	if got := get(t, c.saved); got != "last words" {
		t.Errorf("saved at the end: %q", got)
	}
}

func TestCheckpointNeverSaved(t *testing.T) {
	c, boot := fakeHost(t)
	boot("first")
	if err := os.WriteFile(c.db, []byte("torn"), 0o600); err != nil {
		t.Fatal(err)
	}
	boot("second")
	if _, err := os.Stat(c.db); !os.IsNotExist(err) {
		t.Errorf("the torn database is still there: %v", err)
	}
}
