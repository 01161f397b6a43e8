// Package registry is the record of running shim daemons on disk, by which they are found again after
// the pool or containerd has restarted, and by which what a dead one left is cleaned up.
//
//	<run>/pods/<member>/         the daemon's directory: shim.sock, state.json
//	<run>/sandboxes/<id>         link to the daemon that serves the sandbox
//
// A daemon writes its own record; the pool reads all of them at start; "shim delete" ends the daemon of
// one sandbox. A record may outlive its daemon: a process counts only if it still runs with the
// member's id in its arguments.
package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"atoll.dev/atoll/internal/linux/process"
	"atoll.dev/atoll/internal/shim/hostcgroup"
)

// Role is the argument by which a shim daemon is known, before its member id.
const Role = "shim-daemon"

// maxState bounds a record.
const maxState = 1 << 20

// endTimeout bounds how long a daemon may take to end before it is killed.
const endTimeout = 2 * time.Second

// Entry is the record of a daemon.
type Entry struct {
	Member  string   `json:"member"`
	PID     int      `json:"pid"`
	QEMU    int      `json:"qemu,omitempty"`
	UID     uint32   `json:"uid"`
	Sandbox string   `json:"sandbox,omitempty"` // "" while it waits in the pool
	Cgroups []string `json:"cgroups,omitempty"` // directories to remove
}

// Registry is the records below a run directory.
type Registry struct {
	pods, sandboxes string
}

// New returns the registry of a run directory, which need not exist.
func New(runDir string) Registry {
	return Registry{pods: filepath.Join(runDir, "pods"), sandboxes: filepath.Join(runDir, "sandboxes")}
}

// Create makes the directories.
func (r Registry) Create() error {
	for _, d := range []string{r.pods, r.sandboxes} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return fmt.Errorf("making registry: %w", err)
		}
	}
	return nil
}

// Dir is the directory of a member.
func (r Registry) Dir(member string) string { return filepath.Join(r.pods, member) }

// Socket is the ttrpc socket of a member.
func (r Registry) Socket(member string) string { return filepath.Join(r.pods, member, "shim.sock") }

// Put writes a record, and the link of its sandbox.
func (r Registry) Put(e Entry) error {
	data, err := json.Marshal(e)
	if err != nil {
		return fmt.Errorf("writing record of %s: %w", e.Member, err)
	}
	name := filepath.Join(r.Dir(e.Member), "state.json")
	if err := os.WriteFile(name+".new", data, 0o600); err != nil {
		return fmt.Errorf("writing record of %s: %w", e.Member, err)
	}
	if err := os.Rename(name+".new", name); err != nil {
		return fmt.Errorf("writing record of %s: %w", e.Member, err)
	}
	if e.Sandbox == "" {
		return nil
	}
	err = os.Symlink(filepath.Join("..", "pods", e.Member), r.link(e.Sandbox))
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("writing record of %s: %w", e.Member, err)
	}
	return nil
}

func (r Registry) link(sandbox string) string { return filepath.Join(r.sandboxes, sandbox) }

// Find returns the record of a sandbox's daemon; false if there is none.
func (r Registry) Find(sandbox string) (Entry, bool, error) {
	if sandbox == "" || filepath.Base(sandbox) != sandbox {
		return Entry{}, false, fmt.Errorf("sandbox id %q is not valid", sandbox)
	}
	target, err := os.Readlink(r.link(sandbox))
	if errors.Is(err, fs.ErrNotExist) {
		return Entry{}, false, nil
	}
	if err != nil {
		return Entry{}, false, fmt.Errorf("finding sandbox %s: %w", sandbox, err)
	}
	e, err := r.get(filepath.Base(target))
	if errors.Is(err, fs.ErrNotExist) {
		return Entry{Member: filepath.Base(target), Sandbox: sandbox}, true, nil
	}
	return e, err == nil, err
}

func (r Registry) get(member string) (Entry, error) {
	f, err := os.Open(filepath.Join(r.Dir(member), "state.json"))
	if err != nil {
		return Entry{}, fmt.Errorf("reading record of %s: %w", member, err)
	}
	defer f.Close()
	var e Entry
	buf := make([]byte, maxState)
	n, _ := f.Read(buf)
	if err := json.Unmarshal(buf[:n], &e); err != nil {
		return Entry{}, fmt.Errorf("reading record of %s: %w", member, err)
	}
	e.Member = member
	return e, nil
}

// List returns all records. One that cannot be read is returned with its member's name only.
func (r Registry) List() ([]Entry, error) {
	names, err := os.ReadDir(r.pods)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("listing registry: %w", err)
	}
	var out []Entry
	for _, n := range names {
		e, err := r.get(n.Name())
		if err != nil {
			e = Entry{Member: n.Name()}
		}
		out = append(out, e)
	}
	return out, nil
}

// Process returns the daemon's process; false if it is gone.
func (e Entry) Process() (process.Info, bool) {
	if e.PID <= 0 {
		return process.Info{}, false
	}
	info, err := process.Read(e.PID)
	if err != nil || !info.Alive() {
		return process.Info{}, false
	}
	at := slices.Index(info.Args, Role)
	return info, at >= 0 && at+1 < len(info.Args) && info.Args[at+1] == e.Member
}

// End ends a daemon, and with it its QEMU, and removes what is left of both. The record goes last: as long as there is
// something, it is found again.
func (r Registry) End(ctx context.Context, e Entry) error {
	var errs []error
	if info, ok := e.Process(); ok {
		errs = append(errs, process.End(ctx, endTimeout, info))
	}
	if e.QEMU > 0 {
		errs = append(errs, endQEMU(ctx, e))
	}
	errs = append(errs, hostcgroup.Remove(ctx, e.Cgroups))
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("ending shim daemon %s: %w", e.Member, err)
	}
	return r.Remove(e)
}

// endQEMU makes sure of what the kernel does by itself: a QEMU is killed when its daemon ends.
func endQEMU(ctx context.Context, e Entry) error {
	info, err := process.Read(e.QEMU)
	if err != nil || len(info.Args) == 0 || !slices.ContainsFunc(info.Args, func(a string) bool { return strings.HasPrefix(a, "atoll,process=") }) {
		return nil //nolint:nilerr // it is gone, or the pid is another process's by now
	}
	st, err := os.Stat(fmt.Sprintf("/proc/%d", e.QEMU))
	if err != nil || ownerOf(st) != e.UID {
		return nil //nolint:nilerr // as above
	}
	return process.End(ctx, 0, info)
}

// Remove removes the record of a daemon that has ended.
func (r Registry) Remove(e Entry) error {
	var errs []error
	if e.Sandbox != "" {
		if err := os.Remove(r.link(e.Sandbox)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	errs = append(errs, os.RemoveAll(r.Dir(e.Member)))
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("removing record of %s: %w", e.Member, err)
	}
	return nil
}
