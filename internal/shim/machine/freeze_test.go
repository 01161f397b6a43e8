package machine

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/shim/machine/board"
	"atoll.dev/atoll/internal/vm/guestagent"
)

// answering is a guest agent that writes down what it is asked, but for synchronisation.
func (w *world) answering() (asked func() []string) {
	mine, theirs := net.Pipe()
	w.t.Cleanup(func() { _ = theirs.Close() })
	w.agent = guestagent.New(mine)
	var mu sync.Mutex
	var all []string
	go func() {
		for lines := bufio.NewScanner(theirs); lines.Scan(); {
			var r struct {
				Execute   string
				Arguments struct{ ID int64 }
			}
			if err := json.Unmarshal(bytes.TrimLeft(lines.Bytes(), "\xff"), &r); err != nil {
				continue
			}
			answer := `{"return": 1}`
			if r.Execute == "guest-sync-delimited" {
				answer = fmt.Sprintf("\xff{\"return\": %d}", r.Arguments.ID)
			} else {
				mu.Lock()
				all = append(all, r.Execute)
				mu.Unlock()
			}
			if _, err := fmt.Fprintln(theirs, answer); err != nil {
				return
			}
		}
	}()
	return func() []string {
		mu.Lock()
		defer mu.Unlock()
		return slices.Clone(all)
	}
}

// TestFrozenByOne: a guest is not frozen twice, nor thawed while another needs it frozen.
func TestFrozenByOne(t *testing.T) {
	w := newWorld(t)
	asked := w.answering()
	l := &life{s: &Service{board: board.New()}, ctx: t.Context(), hw: w}
	l.s.board.Update(func(st *machinev1.State) {
		st.Phase, st.Guest = machinev1.Running, &machinev1.Guest{Agent: true}
	})
	const freeze, thaw = "guest-fsfreeze-freeze", "guest-fsfreeze-thaw"
	want := func(commands ...string) {
		t.Helper()
		if got := asked(); !slices.Equal(got, commands) {
			t.Errorf("asked %q, want %q", got, commands)
		}
	}
	release := l.freeze(t.Context()) // of one disk
	waiting := make(chan error)
	go func() { waiting <- l.freezeFor(t.Context(), w, time.Minute) }() // of the machine
	l.freeze(t.Context())()
	want(freeze)
	if l.frozen.TryLock() {
		t.Error("the machine could be frozen again")
	}
	release()
	if err := <-waiting; err != nil {
		t.Fatal(err)
	}
	l.freeze(t.Context())()
	want(freeze, thaw, freeze)
	l.thaw(w)
	want(freeze, thaw, freeze, thaw)
}
