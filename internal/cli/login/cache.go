package login

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/datadir/atomicfile"
	wire "atoll.dev/atoll/internal/identity/login"
)

// cached is one login on this machine. Its file is for its owner alone.
type cached struct {
	// Server is HOST:PORT of the portal.
	Server string `json:"server"`
	Trust  trust  `json:"trust"`
	// User is NAME@DOMAIN.
	User string `json:"user"`
	// Issuer is set for a login at a foreign issuer.
	Issuer *wire.Issuer `json:"issuer,omitempty"`

	Token          string    `json:"token"`
	Expires        time.Time `json:"expires"`
	RefreshToken   string    `json:"refreshToken,omitempty"`
	SessionExpires time.Time `json:"sessionExpires,omitzero"`
}

// dir is where logins and confirmed servers are kept.
func (c *commands) dir() string { return filepath.Join(c.Home, ".kube", "atoll") }

// fileName makes a file name of a text.
func fileName(text string) string {
	return strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("-._@", r) {
			return r
		}
		return '_'
	}, strings.TrimLeft(text, "."))
}

// cacheFile is the file of a login.
func (c *commands) cacheFile(server, user string) string {
	return filepath.Join(c.dir(), fileName(server+"_"+user)+".json")
}

// save writes a login.
func save(file string, l cached) error {
	b, err := json.MarshalIndent(l, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		return fmt.Errorf("keeping the login: %w", err)
	}
	if err := atomicfile.Write(file, append(b, '\n'), 0o600); err != nil {
		return fmt.Errorf("keeping the login: %w", err)
	}
	return nil
}

// load reads a login.
func load(file string) (cached, error) {
	var l cached
	b, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return l, errors.New("you are not logged in; run: atoll login --server ADDRESS")
	}
	if err != nil {
		return l, fmt.Errorf("reading the login: %w", err)
	}
	if err := json.Unmarshal(b, &l); err != nil {
		return l, fmt.Errorf("reading the login %s: %w; log in again", file, err)
	}
	return l, nil
}

// logins lists the files of all logins at a server, the newest first. An empty server means any.
func (c *commands) logins(server string) ([]string, error) {
	files, err := filepath.Glob(filepath.Join(c.dir(), "*.json"))
	if err != nil {
		return nil, err
	}
	age := map[string]time.Time{}
	files = slices.DeleteFunc(files, func(file string) bool {
		l, err := load(file)
		if info, statErr := os.Stat(file); statErr == nil {
			age[file] = info.ModTime()
		}
		return err != nil || server != "" && l.Server != server
	})
	slices.SortFunc(files, func(a, b string) int { return age[b].Compare(age[a]) })
	return files, nil
}

// locked runs what refreshes a login while no other process does.
func locked(file string, run func() error) error {
	lock, err := os.OpenFile(file+".lock", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return fmt.Errorf("locking the login: %w", err)
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return fmt.Errorf("locking the login: %w", err)
	}
	return run()
}
