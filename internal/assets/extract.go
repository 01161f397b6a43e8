package assets

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"

	"atoll.dev/atoll/internal/datadir/atomicfile"
)

// Target is where one file of a set is to be.
type Target struct {
	Name string
	Path string
	Mode os.FileMode
	// Links are further names of the file on disk. They are hard links: a
	// program that looks up its own name must find the one it was started by.
	Links []string
}

// Extract writes the files that are not there or differ, each in one step, so
// that programs that run from the old file are not disturbed. Record is a file
// in which Extract remembers what it wrote: with it, it can tell a new version
// from a damaged file, which is also logged as a warning.
func (s *Set) Extract(targets []Target, record string, logger *slog.Logger) error {
	written := readRecord(record)
	for _, t := range targets {
		want, err := s.Entry(t.Name)
		if err != nil {
			return err
		}
		have, err := hashFile(t.Path)
		switch {
		case errors.Is(err, os.ErrNotExist):
		case err != nil:
			return fmt.Errorf("checking %s: %w", t.Path, err)
		case have == want.SHA256:
			if err := settle(t); err != nil {
				return err
			}
			written[t.Name] = want.SHA256
			continue
		case written[t.Name] == want.SHA256:
			logger.Warn("a file was damaged and is written again", "path", t.Path, "want", want.SHA256, "have", have)
		}
		if err := s.write(t); err != nil {
			return err
		}
		written[t.Name] = want.SHA256
		logger.Info("file written", "path", t.Path, "bytes", want.Size)
	}
	b, err := json.Marshal(written)
	if err != nil {
		return fmt.Errorf("encoding the record of written files: %w", err)
	}
	if _, err := atomicfile.WriteIfChanged(record, b, 0o600); err != nil {
		return fmt.Errorf("writing the record of written files: %w", err)
	}
	return nil
}

// write replaces the file of a target and its links.
func (s *Set) write(t Target) error {
	f, err := os.CreateTemp(filepath.Dir(t.Path), "."+filepath.Base(t.Path)+".*")
	if err != nil {
		return fmt.Errorf("writing %s: %w", t.Path, err)
	}
	defer os.Remove(f.Name()) // fails when all went well
	err = s.copyTo(f, t.Name)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("writing %s: %w", t.Path, err)
	}
	if err := os.Rename(f.Name(), t.Path); err != nil {
		return fmt.Errorf("writing %s: %w", t.Path, err)
	}
	return settle(t)
}

// settle gives a target that has the right content its mode and links.
func settle(t Target) error {
	if err := os.Chmod(t.Path, t.Mode); err != nil {
		return fmt.Errorf("setting the mode of %s: %w", t.Path, err)
	}
	file, err := os.Stat(t.Path)
	if err != nil {
		return fmt.Errorf("looking at %s: %w", t.Path, err)
	}
	for _, link := range t.Links {
		if have, err := os.Lstat(link); err == nil && os.SameFile(file, have) {
			continue
		}
		tmp := link + ".new"
		if err := os.Remove(tmp); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("linking %s: %w", link, err)
		}
		if err := os.Link(t.Path, tmp); err != nil {
			return fmt.Errorf("linking %s: %w", link, err)
		}
		if err := os.Rename(tmp, link); err != nil {
			return fmt.Errorf("linking %s: %w", link, err)
		}
	}
	return nil
}

// readRecord returns what an earlier Extract wrote. A record that cannot be
// read costs only a warning that would have been right, so it counts as empty.
func readRecord(path string) map[string]string {
	written := map[string]string{}
	b, err := os.ReadFile(path)
	if err == nil && json.Unmarshal(b, &written) != nil {
		return map[string]string{}
	}
	return written
}

func hashFile(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	sum := sha256.New()
	if _, err := io.Copy(sum, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(sum.Sum(nil)), nil
}
