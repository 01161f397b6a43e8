package supervise

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"time"
)

// Rotator bounds the size of log files that other processes hold open for
// appending. A file that is too big is copied to <name>.1 (older copies move
// up) and truncated, so its writers need not be told. Lines written between
// the end of the copy and the truncation are lost; it is a matter of
// microseconds, and the price for logs that outlive the supervisor.
type Rotator struct {
	// Dir is the directory whose *.log files are watched.
	Dir string
	// MaxBytes is the size from which a file is rotated.
	MaxBytes int64
	// Keep is the number of old copies per file.
	Keep int
	// Every is the time between looks.
	Every  time.Duration
	Logger *slog.Logger
}

// Run watches the directory until ctx ends.
func (r *Rotator) Run(ctx context.Context) error {
	for sleep(ctx, r.Every) {
		if err := r.rotateAll(); err != nil {
			r.Logger.Warn("log rotation failed", "error", err)
		}
	}
	return nil
}

func (r *Rotator) rotateAll() error {
	files, err := filepath.Glob(filepath.Join(r.Dir, "*.log"))
	if err != nil {
		return fmt.Errorf("listing %s: %w", r.Dir, err)
	}
	var errs []error
	for _, path := range files {
		info, err := os.Stat(path)
		if err != nil || info.Size() < r.MaxBytes {
			continue
		}
		if err := r.rotate(path); err != nil {
			errs = append(errs, fmt.Errorf("rotating %s: %w", path, err))
		}
	}
	return errors.Join(errs...)
}

// rotate copies and truncates one file. When the disk is too full for the
// copy, the file is truncated all the same: bounded logs matter more then.
func (r *Rotator) rotate(path string) error {
	for i := r.Keep - 1; i >= 1; i-- {
		err := os.Rename(numbered(path, i), numbered(path, i+1))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_APPEND, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	old, err := os.OpenFile(numbered(path, 1), os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o640)
	if err != nil {
		return err
	}
	_, copyErr := io.Copy(old, f)
	return errors.Join(copyErr, old.Close(), f.Truncate(0))
}

func numbered(path string, i int) string { return fmt.Sprintf("%s.%d", path, i) }
