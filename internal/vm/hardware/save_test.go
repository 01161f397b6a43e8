package hardware

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/vm/block"
	"atoll.dev/atoll/internal/vm/monitor"
	"atoll.dev/atoll/internal/vm/qemu"
)

// migrating answers like a QEMU that saves its memory.
type migrating struct {
	conn      *os.File
	busy      bool   // changes its memory faster than it is written, until it is stopped
	refuses   string // to begin, with these words
	fails     bool   // after it was told to go on
	said      []string
	cancelled bool
}

func (q *migrating) event(status string) string {
	return fmt.Sprintf(`{"event": "MIGRATION", "data": {"status": %q}}`, status)
}

func (q *migrating) run() {
	commands := json.NewDecoder(q.conn)
	for {
		var c struct {
			Execute string `json:"execute"`
		}
		if commands.Decode(&c) != nil {
			return
		}
		if c.Execute != "query-migrate" {
			q.said = append(q.said, c.Execute)
		}
		answer, after := `{"return": {}}`, ""
		switch c.Execute {
		case "migrate":
			if q.refuses != "" {
				answer = fmt.Sprintf(`{"error": {"class": "GenericError", "desc": %q}}`, q.refuses)
			} else {
				after = q.event("active")
				if !q.busy {
					after += "\n" + q.event("pre-switchover")
				}
			}
		case "stop":
			after = q.event("pre-switchover")
		case "migrate-continue":
			after = q.event("device") + "\n" + q.event("completed")
			if q.fails {
				after = q.event("failed")
			}
		case "migrate_cancel":
			q.cancelled = true
		case "query-migrate":
			transferred := 100_000_000
			if q.busy {
				transferred *= 10
			}
			answer = fmt.Sprintf(`{"return": {"status": "active", "ram": {"transferred": %d, "remaining": 700000000, "total": 1073741824}}}`, transferred)
			if q.cancelled {
				answer = `{"return": {"status": "cancelled"}}`
			}
		}
		if after != "" {
			answer += "\n" + after
		}
		if _, err := fmt.Fprintln(q.conn, answer); err != nil {
			return
		}
	}
}

func saveWith(t *testing.T, q *migrating, o SaveOptions) (*Machine, Saved, error) {
	t.Helper()
	conn, child, err := qemu.SocketPair()
	if err != nil {
		t.Fatal(err)
	}
	q.conn = child
	go q.run()
	m := &Machine{done: make(chan struct{}), disks: map[string]*disk{}, shape: &shape{Boot: 1 << 30, Ports: map[string]int{}}}
	m.graph = block.New(m.do, block.Patience)
	m.qmp = monitor.New(conn, m.done, nil)
	t.Cleanup(func() { _ = m.qmp.Close(); _ = child.Close() })
	f, err := os.CreateTemp(t.TempDir(), "memory")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	saved, err := m.SaveMemory(t.Context(), f, o)
	return m, saved, err
}

func (q *migrating) after(t *testing.T, want string) {
	t.Helper()
	i := slices.Index(q.said, "migrate")
	if got := strings.Join(q.said[i+1:], " "); got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

func TestSaveMemory(t *testing.T) {
	for name, busy := range map[string]bool{"idle": false, "busy": true} {
		t.Run(name, func(t *testing.T) {
			q := &migrating{busy: busy}
			var percent []int
			m, saved, err := saveWith(t, q, SaveOptions{
				AtPause:  func() error { q.said = append(q.said, "pause"); return nil },
				Progress: func(p int) { percent = append(percent, p) },
			})
			if err != nil || saved.Bytes != headerBytes || m.held() || len(percent) == 0 || percent[0] != 35 {
				t.Errorf("%+v, %v, %v", saved, err, percent)
			}
			want := "pause migrate-continue cont"
			if busy {
				want = "stop " + want
			}
			q.after(t, want)
		})
	}
}

func TestSaveMemoryAndEnd(t *testing.T) {
	q := &migrating{}
	m, _, err := saveWith(t, q, SaveOptions{End: true})
	if err != nil || !m.held() {
		t.Errorf("%v", err)
	}
	q.after(t, "migrate-continue")
}

func TestSaveMemoryFails(t *testing.T) {
	gone := errors.New("no snapshot")
	for name, test := range map[string]struct {
		qemu  migrating
		pause error
		want  error
		said  string
	}{
		"refused":      {migrating{refuses: "State blocked by non-migratable device 'x'"}, nil, ErrUnmigratable, "cont"},
		"no snapshots": {migrating{}, gone, gone, "migrate_cancel cont"},
		"cannot write": {migrating{fails: true}, nil, nil, "migrate-continue migrate_cancel cont"},
	} {
		t.Run(name, func(t *testing.T) {
			m, _, err := saveWith(t, &test.qemu, SaveOptions{AtPause: func() error { return test.pause }})
			if err == nil || test.want != nil && !errors.Is(err, test.want) || m.held() {
				t.Errorf("%v", err)
			}
			test.qemu.after(t, test.said)
		})
	}
}

func TestSaveMemoryOfWhatCannotBe(t *testing.T) {
	for _, d := range []machinev1.Disk{{Name: "x", Bus: machinev1.NVMe}, {Name: "x", NonPersistent: true}} {
		m := &Machine{disks: map[string]*disk{"x": {Disk: d}}, shape: &shape{}}
		if _, err := m.SaveMemory(t.Context(), nil, SaveOptions{}); !errors.Is(err, ErrUnmigratable) {
			t.Errorf("%v", err)
		}
	}
}
