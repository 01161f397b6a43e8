// Package rbd is a datastore in a Ceph pool.
//
// Images are qcow2 or raw inside RBD images, which QEMU's own driver opens; nothing is mapped by the kernel.
// Records are keys of one object (omap), which Ceph replaces as a whole; locks are advisory locks of another.
// Everything but the data goes through Ceph's commands, each of which connects anew and takes 50 to 200 ms. The pool, or the RBD namespace in it, belongs to the datastore alone. The caller is the agent.
//
// What can go wrong: no answer from the cluster (ErrUnavailable after the timeout), no room (Ceph lets writers
// wait then, so that too is ErrUnavailable in the end), commands that are missing.
package rbd

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"sync/atomic"
	"time"

	"atoll.dev/atoll/internal/datadir/handover"
	"atoll.dev/atoll/internal/storage/datastore"
	"atoll.dev/atoll/internal/storage/datastore/chain"
	"atoll.dev/atoll/internal/storage/qemuimg"
)

// Config is what a datastore in Ceph is made of.
type Config struct {
	// Pool is the name of the pool, Namespace of an RBD namespace in it that exists, or "".
	Pool, Namespace string
	// Conf is the path of ceph.conf; empty is Ceph's default. User is the Ceph user without "client.".
	Conf, User string
	// ID, if set, is what Init returned.
	ID string
	// Keys wraps keys of encrypted volumes; nil refuses them with ErrKey.
	Keys datastore.Keys
	// Limits says how full it may get.
	Limits datastore.Limits
	// Timeout is how long one command may take; 0 is 30 s.
	Timeout time.Duration
}

// Names in the pool.
const (
	recordsObject = "atoll.records"
	markKey       = "datastore"
	markFormat    = 1
)

// New returns the store in a pool. It does not look at it.
func New(c Config) (*chain.Store, error) {
	name := regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,126}$`)
	if !name.MatchString(c.Pool) || c.Namespace != "" && !name.MatchString(c.Namespace) || c.User != "" && !name.MatchString(c.User) {
		return nil, fmt.Errorf("%w: Ceph pool %.80q, namespace %.80q, user %.80q", datastore.ErrInvalid, c.Pool, c.Namespace, c.User)
	}
	if c.Timeout == 0 {
		c.Timeout = 30 * time.Second
	}
	p := &place{Config: c}
	p.store = &imageStore{place: p, qemu: &qemuimg.Tool{}}
	return chain.New(p, chain.Options{Keys: c.Keys, Limits: c.Limits, Timeout: c.Timeout + 5*time.Second, Tool: p.store.qemu})
}

// place is records in a pool.
type place struct {
	Config
	store *imageStore
	// seen is when the mark was last seen, in seconds: a pool does not turn into another one.
	seen atomic.Int64
}

// seenTime is for how long the mark is not looked at again, in seconds.
const seenTime = 30

// run runs rados or rbd. An error of "no such thing" is fs.ErrNotExist.
func (p *place) run(stdin []byte, command string, args ...string) ([]byte, error) {
	return p.runFor(p.Timeout, stdin, command, args...)
}

// runFor is run with a limit of its own.
func (p *place) runFor(limit time.Duration, stdin []byte, command string, args ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	var all []string
	if p.Conf != "" {
		all = append(all, "--conf", p.Conf)
	}
	if p.User != "" {
		all = append(all, "--name", p.user())
	}
	if command == "rados" || args[0] == "ls" || args[0] == "du" { // others name images in full
		all = append(all, "--pool", p.Pool)
		if p.Namespace != "" {
			all = append(all, "--namespace", p.Namespace)
		}
	}
	cmd := exec.CommandContext(ctx, command, append(all, args...)...)
	cmd.WaitDelay = time.Second
	cmd.Env = []string{"LC_ALL=C", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
	cmd.Stdin = bytes.NewReader(stdin)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if err == nil {
		return stdout.Bytes(), nil
	}
	text := strings.TrimSpace(stderr.String() + stdout.String())
	if len(text) > 300 {
		text = text[len(text)-300:]
	}
	what := fmt.Sprintf("%s %s", command, args[0])
	switch {
	case ctx.Err() != nil:
		return nil, fmt.Errorf("%w: %s: no answer for %s", datastore.ErrUnavailable, what, limit)
	case errors.Is(err, exec.ErrNotFound):
		return nil, fmt.Errorf("%w: %w; install the package ceph-common", datastore.ErrUnavailable, err)
	case strings.Contains(text, "couldn't connect") || strings.Contains(text, "error opening pool") ||
		strings.Contains(text, "namespace") && strings.Contains(text, "does not exist"):
		// The reason may read like that of an image that is not there.
		return nil, fmt.Errorf("%w: %s: %s", datastore.ErrUnavailable, what, text)
	case strings.Contains(text, "(2) No such file") || strings.Contains(text, "No such key"):
		return nil, fmt.Errorf("%s: %w", what, fs.ErrNotExist)
	case strings.Contains(text, "(28) No space") || strings.Contains(text, "(122) Disk quota"):
		return nil, fmt.Errorf("%w: %s: %s", datastore.ErrFull, what, text)
	case strings.Contains(text, "(17) File exists"):
		return nil, fmt.Errorf("%s: %w", what, fs.ErrExist)
	case strings.Contains(text, "(16) Device or resource busy"):
		return nil, fmt.Errorf("%w: %s: %s", errBusy, what, text)
	}
	return nil, fmt.Errorf("%w: %s: %w: %s", datastore.ErrUnavailable, what, err, text)
}

// spec is the full name of an image.
func (p *place) spec(name string) string {
	if p.Namespace == "" {
		return p.Pool + "/" + name
	}
	return p.Pool + "/" + p.Namespace + "/" + name
}

// errBusy: somebody has the lock, or the image open.
var errBusy = errors.New("busy")

// mark is what makes a pool a datastore.
type mark struct {
	Format  int       `json:"format"`
	ID      string    `json:"id"`
	Created time.Time `json:"created"`
}

// Init makes a pool a datastore.
func (p *place) Init() (string, error) {
	m, err := p.mark()
	switch {
	case err == nil:
		return m.ID, nil
	case !errors.Is(err, fs.ErrNotExist):
		return "", err
	case p.ID != "":
		return "", fmt.Errorf("%w: pool %s is not datastore %s", datastore.ErrUnavailable, p.Pool, p.ID)
	}
	images, err := p.store.names()
	if err != nil {
		return "", err
	}
	if len(images) > 0 {
		return "", fmt.Errorf("%w: pool %s is not empty and is no datastore: it has %s", datastore.ErrInvalid, p.Pool, images[0])
	}
	m = mark{Format: markFormat, ID: "d" + strings.ToLower(rand.Text()), Created: time.Now().UTC()}
	b, err := json.Marshal(m)
	if err != nil {
		return "", fmt.Errorf("encoding the mark: %w", err)
	}
	_, err = p.run(b, "rados", "setomapval", recordsObject, markKey)
	return m.ID, err
}

func (p *place) mark() (mark, error) {
	var m mark
	b, err := p.value(markKey)
	if err != nil {
		return m, err
	}
	if err := json.Unmarshal(b, &m); err != nil || m.ID == "" || m.Format != markFormat {
		return m, fmt.Errorf("%w: the mark of pool %s", datastore.ErrCorrupt, p.Pool)
	}
	return m, nil
}

// Ready tells whether the pool is the right one.
func (p *place) Ready() error {
	now := time.Now().Unix()
	if now-p.seen.Load() < seenTime {
		return nil
	}
	m, err := p.mark()
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%w: pool %s is no datastore", datastore.ErrUnavailable, p.Pool)
	case err != nil:
		return err
	case p.ID != "" && m.ID != p.ID:
		return fmt.Errorf("%w: pool %s is datastore %s, not %s", datastore.ErrUnavailable, p.Pool, m.ID, p.ID)
	}
	p.seen.Store(now)
	return nil
}

// value reads a key. The command writes values to files only.
func (p *place) value(key string) ([]byte, error) {
	dir, err := os.MkdirTemp("", "atoll-rbd-")
	if err != nil {
		return nil, fmt.Errorf("making a temporary directory: %w", err)
	}
	defer os.RemoveAll(dir)
	file := dir + "/value"
	if _, err := p.run(nil, "rados", "getomapval", recordsObject, key, file); err != nil {
		return nil, err
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("reading a value: %w", err)
	}
	return b, nil
}

// key is the key of a record.
func key(k chain.Kind, id string) string { return string(k) + "/" + id }

// Read reads a record.
func (p *place) Read(k chain.Kind, id string) ([]byte, error) { return p.value(key(k, id)) }

// Write replaces a record.
func (p *place) Write(k chain.Kind, id string, data []byte) error {
	_, err := p.run(data, "rados", "setomapval", recordsObject, key(k, id))
	return err
}

// Remove removes a record.
func (p *place) Remove(k chain.Kind, id string) error {
	_, err := p.run(nil, "rados", "rmomapkey", recordsObject, key(k, id))
	return err
}

// List returns the ids of all records.
func (p *place) List(k chain.Kind) (ids, strays []string, err error) {
	values, strays, err := p.ReadAll(k)
	for id := range values {
		ids = append(ids, id)
	}
	return ids, strays, err
}

// ReadAll reads all records of a kind in one command.
func (p *place) ReadAll(k chain.Kind) (map[string][]byte, []string, error) {
	out, err := p.run(nil, "rados", "listomapvals", recordsObject)
	if err != nil {
		return nil, nil, err
	}
	values, err := parseValues(out)
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %w", datastore.ErrUnavailable, err)
	}
	records := map[string][]byte{}
	var strays []string
	for name, value := range values {
		if id, ok := strings.CutPrefix(name, string(k)+"/"); ok {
			if chain.ValidID(id) {
				records[id] = value
			} else {
				strays = append(strays, name)
			}
		}
	}
	return records, strays, nil
}

// parseValues reads what rados listomapvals prints: each key on a line, then the value as a hex dump.
//
//	volumes/v
//	value (3 bytes) :
//	00000000  7b 22 7d                                          |{"}|
//	00000003
func parseValues(out []byte) (map[string][]byte, error) {
	values := map[string][]byte{}
	lines := strings.Split(string(out), "\n")
	for i := 0; i+1 < len(lines); i++ {
		if lines[i] == "" {
			continue
		}
		name := lines[i]
		var size int
		if _, err := fmt.Sscanf(lines[i+1], "value (%d bytes) :", &size); err != nil || size < 0 || size > 1<<20 {
			return nil, fmt.Errorf("rados printed %.80q for key %.80q", lines[i+1], name)
		}
		value := make([]byte, 0, size)
		var last []byte
		for i += 2; i < len(lines) && len(value) < size; i++ {
			if lines[i] == "*" { // the last line again, until the next address
				var to int
				if _, err := fmt.Sscanf(at(lines, i+1), "%x", &to); err != nil || to > size || len(last) == 0 {
					return nil, fmt.Errorf("rados printed a repetition before %.80q", at(lines, i+1))
				}
				for len(value)+len(last) <= to {
					value = append(value, last...)
				}
				continue
			}
			if len(lines[i]) < 58 {
				return nil, fmt.Errorf("rados printed %.80q", lines[i])
			}
			b, err := hex.DecodeString(strings.ReplaceAll(lines[i][10:58], " ", ""))
			if err != nil {
				return nil, fmt.Errorf("rados printed %.80q", lines[i])
			}
			last = b
			value = append(value, b...)
		}
		if len(value) != size {
			return nil, fmt.Errorf("rados printed %d of %d bytes of key %.80q", len(value), size, name)
		}
		if size > 0 {
			i++ // the length once more
		}
		i-- // the loop goes on by one
		values[name] = value
	}
	return values, nil
}

// at is a line, or nothing.
func at(lines []string, i int) string {
	if i < len(lines) {
		return lines[i]
	}
	return ""
}

// Space returns what the cluster has. What one pool may get of it depends on its replication.
func (p *place) Space() (capacity, free int64, err error) {
	out, err := p.run(nil, "rados", "df", "--format", "json")
	if err != nil {
		return 0, 0, err
	}
	var df struct {
		Avail int64 `json:"total_avail"`
		Space int64 `json:"total_space"`
	}
	if err := json.Unmarshal(out, &df); err != nil {
		return 0, 0, fmt.Errorf("%w: reading what rados df says: %w", datastore.ErrUnavailable, err)
	}
	if df.Space == 0 {
		return 0, 0, fmt.Errorf("%w: the cluster has no storage daemon that has reported its room", datastore.ErrUnavailable)
	}
	return df.Space << 10, df.Avail << 10, nil
}

// Sweep has nothing to do: a value is replaced as a whole.
func (p *place) Sweep() error { return nil }

// Images is where the images are.
func (p *place) Images() chain.Images { return p.store }

// Locker returns locks.
func (p *place) Locker() chain.Locker { return &locks{place: p} }

// located is how QEMU opens an image.
func (p *place) located(name string) *handover.RBD {
	return &handover.RBD{Pool: p.Pool, Namespace: p.Namespace, Image: name, Conf: p.Conf, User: p.User}
}
