package attach

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Record says which shim has a volume open.
type Record struct {
	Volume string `json:"volume"`
	Pod    string `json:"pod"`
	Socket string `json:"socket"` // of the shim
	PID    int    `json:"pid"`    // of the shim
	Start  uint64 `json:"start"`  // time of its start, which tells it from a later process with its pid
}

// Records are the records below a run directory. A shim writes one before it opens a volume and removes it
// after it has closed it; the record of a shim that was killed stays, and does not count.
type Records struct{ dir string }

// NewRecords returns the records of a run directory.
func NewRecords(runDir string) Records { return Records{filepath.Join(runDir, "attached")} }

const maxRecord = 16 << 10

// ErrRecord is wrapped when a record is not what it should be.
var ErrRecord = errors.New("record of an open volume is damaged")

// prefix starts the names of all records of a volume.
func prefix(volume string) string {
	sum := sha256.Sum256([]byte(volume))
	return hex.EncodeToString(sum[:16]) + "."
}

func (r Records) file(volume, pod string) string {
	sum := sha256.Sum256([]byte(pod))
	return filepath.Join(r.dir, prefix(volume)+hex.EncodeToString(sum[:16]))
}

// Put writes a record for this process.
func (r Records) Put(rec Record) (err error) {
	rec.PID = os.Getpid()
	if rec.Start, err = started(rec.PID); err != nil {
		return fmt.Errorf("recording open volume: %w", err)
	}
	if err := os.MkdirAll(r.dir, 0o700); err != nil {
		return fmt.Errorf("recording open volume: %w", err)
	}
	data, err := json.Marshal(rec)
	if err != nil {
		return fmt.Errorf("recording open volume: %w", err)
	}
	file := r.file(rec.Volume, rec.Pod)
	next := fmt.Sprintf("%s.%d.new", file, os.Getpid())
	if err := os.WriteFile(next, data, 0o600); err != nil {
		return fmt.Errorf("recording open volume: %w", err)
	}
	if err := os.Rename(next, file); err != nil {
		return fmt.Errorf("recording open volume: %w", err)
	}
	return nil
}

// Remove forgets that a pod's shim, which is this process, has a volume. A record of another process stays.
func (r Records) Remove(volume, pod string) error {
	file := r.file(volume, pod)
	if rec, err := read(file); err == nil && rec.PID != os.Getpid() {
		return nil
	}
	if err := os.Remove(file); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("forgetting open volume: %w", err)
	}
	return nil
}

// Find returns who has a volume open. Records of processes that have ended do not count, and stay: the next
// shim of the pod may be replacing its one at this moment.
func (r Records) Find(volume string) ([]Record, error) {
	entries, err := os.ReadDir(r.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("looking for open volume: %w", err)
	}
	var out []Record
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), prefix(volume)) || strings.HasSuffix(e.Name(), ".new") {
			continue
		}
		rec, err := read(filepath.Join(r.dir, e.Name()))
		switch {
		case errors.Is(err, fs.ErrNotExist):
			continue
		case err != nil:
			return nil, fmt.Errorf("looking for open volume: %w", err)
		case !alive(rec):
			continue
		}
		out = append(out, rec)
	}
	return out, nil
}

func read(file string) (Record, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return Record{}, err
	}
	var rec Record
	if len(data) > maxRecord || json.Unmarshal(data, &rec) != nil || rec.Volume == "" {
		return Record{}, fmt.Errorf("%s: %w", file, ErrRecord)
	}
	return rec, nil
}

// alive tells whether a record's process still runs.
func alive(rec Record) bool {
	start, err := started(rec.PID)
	return err == nil && start == rec.Start
}

// started is when a process that runs was started, in clock ticks after boot; see proc(5).
func started(pid int) (uint64, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	_, after, _ := strings.Cut(string(stat[bytes.LastIndexByte(stat, ')')+1:]), " ")
	const state, start = 0, 19
	fields := strings.Fields(after)
	if len(fields) <= start || fields[state] == "Z" || fields[state] == "X" {
		return 0, fs.ErrNotExist
	}
	return strconv.ParseUint(fields[start], 10, 64)
}
