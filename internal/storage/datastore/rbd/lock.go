package rbd

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"atoll.dev/atoll/internal/storage/datastore/chain"
)

// locks are advisory locks, each of an object of its own, which is removed with the lock. One is broken when its process, on this host, has ended, and ends by
// itself after lockTime, which bounds how long the crash of another host is in the way.
type locks struct {
	place *place
	held  map[string]time.Time // since when, by name
}

// object is the object of a lock.
func (l *locks) object(name string) string { return "atoll.lock." + name }

// lockName is the name of the lock in its object.
const lockName = "atoll"

// lockTime is the longest that an operation may take, creating an eager-zeroed volume for example.
const lockTime = time.Hour

// me describes this process: host, boot, pid and the time it was started.
func me() string {
	boot, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(boot)) + "/" + strconv.Itoa(os.Getpid()) + "/" + started(os.Getpid())
}

// started is when a process was started, in ticks, or "" if there is none.
func started(pid int) string {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return ""
	}
	_, rest, _ := strings.Cut(string(stat), ") ")
	if fields := strings.Fields(rest); len(fields) > 19 {
		return fields[19]
	}
	return ""
}

// ended tells whether the process of a description is one of this boot that is no more.
func ended(description string) bool {
	boot, rest, _ := strings.Cut(description, "/")
	process, start, ok := strings.Cut(rest, "/")
	pid, err := strconv.Atoi(process)
	return ok && err == nil && strings.HasPrefix(me(), boot+"/") && started(pid) != start
}

// Lock takes locks.
func (l *locks) Lock(ctx context.Context, names ...string) error {
	names = slices.Clone(names)
	slices.Sort(names) // so that nobody waits for each other in a circle
	for _, name := range names {
		if _, ok := l.held[name]; ok {
			continue
		}
		for {
			begun := time.Now()
			_, err := l.place.run(nil, "rados", "lock", "get", l.object(name), lockName, "--lock-cookie", rand.Text(),
				"--lock-description", me(), "--lock-duration", strconv.Itoa(int(lockTime.Seconds())))
			if err == nil {
				if l.held == nil {
					l.held = map[string]time.Time{}
				}
				l.held[name] = begun
				break
			}
			if !errors.Is(err, errBusy) {
				return err
			}
			if err := l.bury(name); err != nil {
				return err
			}
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(50 * time.Millisecond):
			}
		}
	}
	return nil
}

// holder is who has a lock.
type holder struct {
	Name        string `json:"name"`
	Cookie      string `json:"cookie"`
	Description string `json:"description"`
}

// bury breaks the lock of a process that has ended.
func (l *locks) bury(name string) error {
	out, err := l.place.run(nil, "rados", "lock", "info", l.object(name), lockName, "--format", "json")
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var info struct {
		Lockers []holder `json:"lockers"`
	}
	if err := json.Unmarshal(out, &info); err != nil {
		return chain.Unavailable(err)
	}
	for _, h := range info.Lockers {
		if ended(h.Description) {
			_, err := l.place.run(nil, "rados", "lock", "break", l.object(name), lockName, h.Name, "--lock-cookie", h.Cookie)
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
	}
	return nil
}

// Unlock gives one lock back. If that cannot be told to the cluster, the lock ends by itself; one that may
// have done so already is not touched, since it may be somebody else's now.
func (l *locks) Unlock(name string) {
	since, ok := l.held[name]
	delete(l.held, name)
	if ok && time.Since(since) < lockTime-time.Minute {
		_, _ = l.place.run(nil, "rados", "rm", l.object(name))
	}
}

// Release gives all locks back.
func (l *locks) Release() {
	for name := range l.held {
		l.Unlock(name)
	}
}
