//go:build integration

package directory

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"atoll.dev/atoll/internal/storage/datastore"
	"atoll.dev/atoll/internal/storage/datastore/chain"
)

// envLoop is set for the child of TestCrashAtRandom.
const envLoop = "ATOLL_CRASH_LOOP"

// TestCrashLoop is a process that changes a store with two workers until somebody kills it. It says on stdout
// what it is about to do and what it has done.
func TestCrashLoop(t *testing.T) {
	path := os.Getenv(envLoop)
	if path == "" {
		return
	}
	s, err := New(Config{Path: path, Keys: crashKeys("")})
	if err != nil {
		t.Fatal(err)
	}
	var say sync.Mutex
	var workers sync.WaitGroup
	for worker := range 2 {
		workers.Go(func() {
			for round := 0; ; round++ {
				verb, id, do := randomChange(worker)
				line := func(state string) {
					say.Lock()
					defer say.Unlock()
					fmt.Printf("@ %s %s %s\n", state, verb, id)
				}
				line("begin")
				err := do(s)
				switch {
				case err == nil:
					line("done")
				case errors.Is(err, datastore.ErrNotFound), errors.Is(err, datastore.ErrAttached), errors.Is(err, datastore.ErrExists), errors.Is(err, datastore.ErrBusy), errors.Is(err, datastore.ErrUnsupported):
					line("refused")
				default:
					fmt.Printf("@ failed %s %s %v\n", verb, id, err)
				}
			}
		})
	}
	workers.Wait()
}

// randomChange returns something to do. Each worker has volumes and snapshots of its own, but copies those of
// the other one.
func randomChange(worker int) (verb, id string, do func(*chain.Store) error) {
	ctx := context.Background()
	v, s := fmt.Sprintf("v%d-%d", worker, rand.IntN(3)), fmt.Sprintf("s%d-%d", worker, rand.IntN(3))
	other := fmt.Sprintf("s%d-%d", 1-worker, rand.IntN(3))
	switch rand.IntN(8) {
	case 0:
		return "create", v, func(st *chain.Store) error {
			_, err := st.Create(ctx, datastore.Spec{ID: v, Size: datastore.SizeUnit})
			return err
		}
	case 1:
		return "create", v, func(st *chain.Store) error {
			_, err := st.Create(ctx, datastore.Spec{ID: v, Source: &datastore.Source{Snapshot: other}})
			return err
		}
	case 2:
		return "create", v, func(st *chain.Store) error {
			_, err := st.Create(ctx, datastore.Spec{ID: v, Encryption: "gold", Provisioning: datastore.Thick, Source: &datastore.Source{Snapshot: s}})
			return err
		}
	case 3:
		return "create", s, func(st *chain.Store) error { _, err := st.Snapshot(ctx, s, v, nil); return err }
	case 4:
		return "delete", v, func(st *chain.Store) error { return st.Delete(ctx, v) }
	case 5:
		return "delete", s, func(st *chain.Store) error { return st.DeleteSnapshot(ctx, s) }
	case 6:
		return "write", v, func(st *chain.Store) error {
			if _, err := st.Attach(ctx, v, "w", datastore.ReadWrite); err != nil {
				return err
			}
			return st.Detach(ctx, v, "w")
		}
	default:
		return "tidy", "-", func(st *chain.Store) error { return st.Tidy(ctx) }
	}
}

// TestCrashAtRandom kills a busy process at random moments: what it said it had done is done, and nothing is
// left over in the end.
func TestCrashAtRandom(t *testing.T) {
	const rounds = 25
	path := filepath.Join(t.TempDir(), "store")
	c := &crashBench{TB: t, path: path, s: store(t, Config{Path: path, Keys: crashKeys("")})}
	exists := map[string]bool{}
	late := map[string]bool{} // was being created in a crash; may be finished by anything that needs its volume
	total := 0
	for round := range rounds {
		cmd := exec.Command(os.Args[0], "-test.run=^TestCrashLoop$")
		cmd.Env = append(os.Environ(), envLoop+"="+path)
		out, err := cmd.StdoutPipe()
		c.ok(err)
		c.ok(cmd.Start())
		kill := time.AfterFunc(2*time.Minute, func() { _ = cmd.Process.Kill() })
		changes := 4 + rand.IntN(8) // after so many it is killed
		unsure := map[string]bool{}
		for lines := bufio.NewReader(out); ; {
			line, err := lines.ReadString('\n')
			if errors.Is(err, io.EOF) { // killed, perhaps within a line
				break
			}
			c.ok(err)
			f := strings.Fields(line)
			if len(f) < 4 || f[0] != "@" {
				continue
			}
			switch state, verb, id := f[1], f[2], f[3]; {
			case state == "failed":
				t.Errorf("round %d: %s", round, line)
			case verb != "create" && verb != "delete":
			case state == "begin":
				unsure[id] = true
			case state == "done":
				total++
				if changes--; changes == 0 {
					kill.Reset(time.Duration(rand.IntN(50)) * time.Millisecond)
				}
				exists[id] = verb == "create"
				delete(late, id)
				fallthrough
			default:
				delete(unsure, id)
			}
		}
		kill.Stop()
		_ = cmd.Wait() // killed
		c.sound(true)
		if round%2 == 0 {
			c.ok(c.s.Tidy(t.Context()))
			c.sound(false)
		}
		all, err := c.s.List(t.Context())
		c.ok(err)
		now := map[string]bool{}
		for _, v := range all.Volumes {
			now[v.ID] = v.State == datastore.StateReady
			c.ok(c.s.Detach(t.Context(), v.ID, "w"))
		}
		for _, s := range all.Snapshots {
			now[s.ID] = true
		}
		for _, id := range []string{"v0-0", "v0-1", "v0-2", "v1-0", "v1-1", "v1-2", "s0-0", "s0-1", "s0-2", "s1-0", "s1-1", "s1-2"} {
			if exists[id] != now[id] && !unsure[id] && (!late[id] || !now[id]) {
				t.Errorf("round %d: %s exists: %t, should: %t", round, id, now[id], exists[id])
			}
			exists[id] = now[id]
			late[id] = (late[id] || unsure[id]) && !now[id]
		}
	}
	t.Logf("%d changes in %d rounds", total, rounds)
	if total < 4*rounds {
		t.Errorf("only %d changes", total)
	}
	c.ok(c.s.Tidy(t.Context()))
	c.empty()
}
