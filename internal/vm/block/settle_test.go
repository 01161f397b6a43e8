package block

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"atoll.dev/atoll/internal/vm/qemu"
	"atoll.dev/atoll/internal/vm/qmp"
)

// slowQEMU answers like one that is busy: a snapshot is taken, or not, long after it was asked for.
type slowQEMU struct {
	conn    *os.File
	begun   chan struct{} // closed when it has been asked for a snapshot
	goOn    chan struct{} // it waits for it then
	refuses bool
	overlay string // node on top of another
	said    []string
}

func (q *slowQEMU) run() {
	commands := json.NewDecoder(q.conn)
	for {
		var c struct {
			Execute   string         `json:"execute"`
			Arguments map[string]any `json:"arguments"`
		}
		if commands.Decode(&c) != nil {
			return
		}
		q.said = append(q.said, c.Execute)
		answer := `{"return": {}}`
		switch c.Execute {
		case "add-fd":
			answer = `{"return": {"fdset-id": 1000, "fd": 7}}`
		case "blockdev-snapshot":
			close(q.begun)
			<-q.goOn
			if q.refuses {
				answer = `{"error": {"class": "GenericError", "desc": "no"}}`
			} else {
				q.overlay, _ = c.Arguments["overlay"].(string)
			}
		case "query-named-block-nodes":
			depth := 0
			if q.overlay != "" {
				depth = 1
			}
			answer = fmt.Sprintf(`{"return": [{"node-name": "v0.0"}, {"node-name": "v0.1", "backing_file_depth": %d}]}`, depth)
		case "query-fdsets":
			answer = `{"return": [{"fdset-id": 1000, "fds": [{"fd": 7}]}]}`
		}
		if _, err := fmt.Fprintln(q.conn, answer); err != nil {
			return
		}
	}
}

// TestSnapshotNotWaitedFor: what became of it is known with the next change, and the same one again succeeds.
func TestSnapshotNotWaitedFor(t *testing.T) {
	for name, refuses := range map[string]bool{"taken": false, "refused": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			patiently(t, func(patience time.Duration) bool { return snapshotNotWaitedFor(t, patience, refuses) })
		})
	}
}

// snapshotNotWaitedFor returns false if QEMU was not even asked in time.
func snapshotNotWaitedFor(t *testing.T, patience time.Duration, refuses bool) bool {
	conn, child, err := qemu.SocketPair()
	if err != nil {
		t.Fatal(err)
	}
	defer child.Close()
	q := &slowQEMU{conn: child, begun: make(chan struct{}), goOn: make(chan struct{}), refuses: refuses}
	go q.run()
	client := qmp.New(conn, nil)
	defer client.Close()
	g := New(run(client), patience)
	v := &Chain{prefix: "v0", next: 1, layers: []layer{{node: "v0.0"}}}
	file := filepath.Join(t.TempDir(), "overlay")
	header := append([]byte("QFI\xfb\x00\x00\x00\x03"), make([]byte, 200)...)
	if err := os.WriteFile(file, header, 0o600); err != nil {
		t.Fatal(err)
	}
	snapshot := func() error {
		frozen, err := os.Open(file)
		if err != nil {
			t.Fatal(err)
		}
		defer frozen.Close()
		overlay, err := os.OpenFile(file, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer overlay.Close()
		return g.Snapshot(t.Context(), v, Layer{Format: QCOW2, File: frozen}, Layer{Format: QCOW2, File: overlay})
	}
	if err := snapshot(); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatal(err)
	}
	select {
	case <-q.begun:
	case <-time.After(patience):
		return false
	}
	if _, err := g.Depth(contextOf(t, 100*time.Millisecond), v); err == nil {
		t.Error("known before QEMU knows")
	}
	close(q.goOn)
	g.patience = 30 * time.Second
	want := 2
	if refuses {
		want = 1
	}
	if n, err := g.Depth(t.Context(), v); n != want || err != nil {
		t.Errorf("%d layers, %v; want %d", n, err, want)
	}
	if refuses {
		return true
	}
	if err := snapshot(); err != nil || strings.Count(strings.Join(q.said, " "), "blockdev-snapshot") != 1 {
		t.Errorf("again: %v; %v", err, q.said)
	}
	if l := v.layers; len(l) != 2 || len(l[1].fds) != 1 || l[1].fds[0] != 7 {
		t.Errorf("layers %+v", l)
	}
	return true
}

func contextOf(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}
