package machine

import (
	"time"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/shim/machine/guest"
)

const (
	// How often the guest is asked: while nothing answers, while it is young, and later.
	pollBoot  = 3 * time.Second
	pollYoung = 10 * time.Second
	pollLater = time.Minute
	youth     = 5 * time.Minute
)

// watchGuest asks the guest agent how the guest is, seldom when nothing changes.
func (l *life) watchGuest() {
	began := time.Now()
	missed := 0
	restored := l.spec.Restore != nil
	for {
		g, err := guest.Look(l.ctx, l.hw.Agent(), l.s.board.Get().Guest)
		st := l.s.board.Get()
		wait := pollLater
		if err == nil {
			missed = 0
			if restored { // perhaps from a snapshot that was taken while it was frozen
				restored = false
				l.files.Restored(l.ctx)
			}
			l.s.board.Update(func(st *machinev1.State) { st.Guest = g })
			if time.Since(began) < youth {
				wait = pollYoung
			}
		} else {
			const enough = 3 // the agent may be busy with a command
			if missed++; missed >= enough && st.Guest != nil && st.Guest.Agent {
				l.s.board.Update(func(st *machinev1.State) {
					last := *st.Guest
					last.Agent = false
					st.Guest = &last
				})
			}
			wait = pollBoot
			if time.Since(began) > youth {
				wait = pollYoung
			}
		}
		select {
		case <-time.After(wait):
		case <-l.ctx.Done():
			return
		}
	}
}
