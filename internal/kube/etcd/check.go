package etcd

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"time"

	"go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
	"go.etcd.io/etcd/server/v3/storage/wal"
	"go.uber.org/zap"
)

// ErrDamaged is in the chain of every error about data that exists but cannot be
// trusted. The way out is to restore the directory from a backup or, giving up
// the cluster, to purge it.
var ErrDamaged = errors.New("etcd data is damaged and was left untouched; restore it from a backup, or start over with `atoll down --purge`")

// fullCheckLimit is the database size up to which every page is read at start.
const fullCheckLimit = 256 << 20

// checkData decides before etcd opens the directory whether it can be trusted.
// A directory that was never used is fine.
func checkData(dir, marker string) (err error) {
	// A page beyond the end of a mapped file is a fault; make it an error.
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("%w: %v", ErrDamaged, r)
		}
	}()
	database := filepath.Join(dir, "member", "snap", "db")
	walDir := filepath.Join(dir, "member", "wal")
	logs, err := walFiles(walDir)
	if err != nil {
		return err
	}
	created, markerErr := os.ReadFile(marker)
	used := markerErr == nil
	info, err := os.Stat(database)
	switch {
	case errors.Is(err, fs.ErrNotExist) && len(logs) == 0 && used:
		return fmt.Errorf("%w: %s and %s are gone, but a cluster was created here at %s", ErrDamaged, database, walDir, strings.TrimSpace(string(created)))
	case errors.Is(err, fs.ErrNotExist) && used:
		return fmt.Errorf("%w: %s is gone", ErrDamaged, database)
	case errors.Is(err, fs.ErrNotExist):
		// Never used, or the first start was cut short: etcd replays its log.
		return nil
	case err != nil:
		return err
	case info.Size() == 0 && used:
		return fmt.Errorf("%w: %s is empty", ErrDamaged, database)
	case len(logs) == 0 && used:
		return fmt.Errorf("%w: %s exists but %s holds no log", ErrDamaged, database, walDir)
	case info.Size() == 0 || len(logs) == 0:
		return nil
	}
	applied, err := checkDatabase(database, info.Size())
	if err != nil {
		return err
	}
	return checkLog(walDir, applied)
}

// walFiles lists the segments of the write-ahead log.
func walFiles(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), ".wal") {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// checkDatabase opens the database read-only and returns the index of the last
// log entry that is in it.
func checkDatabase(path string, size int64) (applied uint64, err error) {
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{ReadOnly: true, Timeout: 5 * time.Second})
	if errors.Is(err, bolterrors.ErrTimeout) {
		return 0, fmt.Errorf("%s is in use by another process", path)
	}
	if err != nil {
		return 0, fmt.Errorf("%w: opening %s: %w", ErrDamaged, path, err)
	}
	defer db.Close()
	err = db.View(func(tx *bbolt.Tx) error {
		if tx.Size() > size {
			return fmt.Errorf("%s has %d bytes of at least %d: it was truncated", path, size, tx.Size())
		}
		if size <= fullCheckLimit {
			if err := tx.ForEach(walkBucket); err != nil {
				return fmt.Errorf("%s: %w", path, err)
			}
		}
		if meta := tx.Bucket([]byte("meta")); meta != nil {
			if v := meta.Get([]byte("consistent_index")); len(v) == 8 {
				applied = binary.BigEndian.Uint64(v)
			}
		}
		return nil
	})
	if err != nil {
		return 0, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return applied, nil
}

// walkBucket reads every key. Pages that are not what they should be make bbolt
// panic or fault, which checkData turns into an error; the order of keys catches
// most of the rest.
func walkBucket(name []byte, b *bbolt.Bucket) error {
	var last []byte
	return b.ForEach(func(key, value []byte) error {
		if last != nil && bytes.Compare(last, key) >= 0 {
			return fmt.Errorf("keys of bucket %s are out of order", name)
		}
		last = key
		if value == nil {
			return walkBucket(key, b.Bucket(key))
		}
		return nil
	})
}

// checkLog makes sure that the log reaches at least to what the database holds.
// A log that ends within an entry is fine as long as that entry was not applied:
// that is how a crash looks.
func checkLog(dir string, applied uint64) error {
	lg := zap.NewNop()
	snapshots, err := wal.ValidSnapshotEntries(lg, dir)
	if err != nil {
		return fmt.Errorf("%w: reading the log in %s: %w", ErrDamaged, dir, err)
	}
	if len(snapshots) == 0 {
		return fmt.Errorf("%w: the log in %s has no start", ErrDamaged, dir)
	}
	snapshot := snapshots[len(snapshots)-1]
	log, err := wal.OpenForRead(lg, dir, snapshot)
	if err != nil {
		return fmt.Errorf("%w: opening the log in %s: %w", ErrDamaged, dir, err)
	}
	defer log.Close()
	_, _, entries, err := log.ReadAll()
	if err != nil {
		return fmt.Errorf("%w: reading the log in %s: %w", ErrDamaged, dir, err)
	}
	last := snapshot.Index
	if len(entries) > 0 {
		last = entries[len(entries)-1].Index
	}
	if last < applied {
		return fmt.Errorf("%w: the log in %s ends at entry %d, but the database holds entry %d: the log was truncated", ErrDamaged, dir, last, applied)
	}
	return nil
}
