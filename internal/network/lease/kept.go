package lease

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"atoll.dev/atoll/internal/datadir/atomicfile"
)

// ErrHeld says that a kept address is in use.
var ErrHeld = errors.New("the address is still in use")

// keyText is what a key may be: a file name without surprises.
var keyText = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9-]{0,127}$`)

// maxKept bounds the file with an address.
const maxKept = 64

// kept returns the addresses that are kept, by key. A file that cannot be read keeps nothing.
func (s *Store) kept() (map[string]netip.Addr, error) {
	entries, err := os.ReadDir(s.path("kept"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("listing kept addresses: %w", err)
	}
	out := map[string]netip.Addr{}
	for _, e := range entries {
		if !keyText.MatchString(e.Name()) {
			continue
		}
		b, err := os.ReadFile(s.path("kept", e.Name()))
		if err != nil {
			return nil, fmt.Errorf("reading kept address: %w", err)
		}
		if a, err := netip.ParseAddr(strings.TrimSpace(string(b[:min(len(b), maxKept)]))); err == nil {
			out[e.Name()] = a
		}
	}
	return out, nil
}

// again gives a key the address that it had, if that is kept and still in the range.
func (s *Store) again(key, name string, r Range, kept map[string]netip.Addr) (netip.Addr, bool, error) {
	a, ok := kept[key]
	if first, last := hosts(r.Subnet); !ok || a == r.Gateway || a.Less(first) || last.Less(a) {
		return netip.Addr{}, false, nil
	}
	taken, err := s.take(a, name)
	if err != nil {
		return netip.Addr{}, false, err
	}
	if !taken {
		holder := "another pod"
		if l, err := s.Holder(a); err == nil && l.Pod != "" {
			holder = "pod " + l.Pod
		}
		return netip.Addr{}, false, fmt.Errorf("address %s, which is kept for %s: %w by %s", a, key, ErrHeld, holder)
	}
	return a, true, nil
}

// keep notes an address under a key, so that it survives everything but Release.
func (s *Store) keep(key string, a netip.Addr) error {
	if err := os.MkdirAll(s.path("kept"), 0o700); err != nil {
		return fmt.Errorf("keeping address: %w", err)
	}
	if err := atomicfile.Write(s.path("kept", key), []byte(a.String()+"\n"), 0o600); err != nil {
		return fmt.Errorf("keeping address: %w", err)
	}
	return nil
}

// Kept returns the keys under which addresses are kept.
func (s *Store) Kept() ([]string, error) {
	kept, err := s.kept()
	if err != nil {
		return nil, err
	}
	out := make([]string, 0, len(kept))
	for key := range kept {
		out = append(out, key)
	}
	return out, nil
}

// Release gives the address of a key to others, once the pod that has it now, if any, is gone. A key that there
// is not is no error.
func (s *Store) Release(key string) error {
	if !keyText.MatchString(key) {
		return fmt.Errorf("releasing address: %q is no key", key)
	}
	unlock, err := s.lock()
	if err != nil {
		return err
	}
	defer unlock()
	if err := os.Remove(s.path("kept", key)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("releasing address: %w", err)
	}
	return nil
}

// Clear removes everything in a directory of leases but the addresses that are kept, and without any the
// directory.
func Clear(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("removing leases: %w", err)
	}
	var errs []error
	for _, e := range entries {
		if e.Name() != "kept" {
			errs = append(errs, os.RemoveAll(filepath.Join(dir, e.Name())))
		}
	}
	_ = os.Remove(filepath.Join(dir, "kept")) // fails while there are any
	_ = os.Remove(dir)
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("removing leases: %w", err)
	}
	return nil
}
