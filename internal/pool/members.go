package pool

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"time"

	"atoll.dev/atoll/internal/pool/wire"
)

// spawn starts a member. It returns false if that failed; then nothing is spawned before holdUntil.
func (p *Pool) spawn(ctx context.Context) bool {
	uid, ok := p.uids.take()
	if !ok {
		p.fail("all user ids for micro-VMs are in use; raise uidCount", false)
		return false
	}
	id := newID()
	m := &member{id: id, uid: uid, born: time.Now()}
	var err error
	m.Member, err = p.maker.Spawn(p.template, wire.Init{
		Member: id, RunDir: p.cfg.RunDir, UID: uid, ScratchDir: p.cfg.DataDir, PoolNetns: p.netns(),
		Tap: "t" + id, Kubelet: p.cfg.Kubelet, Containerd: p.cfg.Containerd, Template: p.template.Meta,
	})
	if err != nil {
		p.uids.give(uid)
		p.fail(err.Error(), false)
		return false
	}
	p.members[id] = m
	p.wg.Go(func() { p.watch(ctx, m) })
	return true
}

// newID makes a member's id: short, since it is in socket paths and interface names.
func newID() string {
	b := make([]byte, 6)
	_, _ = rand.Read(b) // never fails
	return hex.EncodeToString(b)
}

// watch passes on what a member says, and that it has been ready for a while.
func (p *Pool) watch(ctx context.Context, m *member) {
	var settled <-chan time.Time
	for {
		select {
		case r, ok := <-m.Reports():
			if !ok {
				p.send(ctx, func() { p.ended(m) })
				return
			}
			if r.Ready {
				settled = time.After(settleTime)
			}
			p.send(ctx, func() { p.reported(m, r) })
		case <-settled:
			p.send(ctx, p.recovered)
		case <-ctx.Done():
			return
		}
	}
}

// reported handles what a member said.
func (p *Pool) reported(m *member, r wire.Report) {
	if p.members[m.id] == nil {
		return
	}
	switch {
	case r.Error != "":
		p.fail(r.Error, r.Template)
		if m.known {
			// Its pod is told by the member itself.
			m.ready = true
			p.forgetTaken(m)
			return
		}
		p.lose(m)
	case r.Ready:
		m.ready = true
		p.status.Error = ""
		if m.known {
			p.holdUntil = later(p.holdUntil, time.Now().Add(coldPause))
			p.forgetTaken(m)
		}
	case r.Assigned && m.request != nil && !m.known:
		m.known = true
		p.status.Taken++
		if m.warm {
			p.status.TakenWarm++
		}
		p.holdUntil = later(p.holdUntil, time.Now().Add(refillPause))
		m.request.answer <- wire.Taken{Address: r.Address, PID: m.PID(), Warm: m.warm}
		if m.ready {
			p.forgetTaken(m)
		}
	}
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// forgetTaken stops to count a member that serves a pod and whose micro-VM is up. Its user id stays
// taken for as long as the process lives.
func (p *Pool) forgetTaken(m *member) {
	delete(p.members, m.id)
	p.uids.keepPID(m.uid, m.PID(), m.id)
}

// lose forgets a member that is of no use; a request that it was to serve goes to the next one.
func (p *Pool) lose(m *member) {
	delete(p.members, m.id)
	p.uids.keepPID(m.uid, m.PID(), m.id) // until its process is gone
	m.Release()
	if m.request != nil && !m.known {
		p.queue = append([]*request{m.request}, p.queue...)
	}
}

// releaseAll lets members that are not taken end.
func (p *Pool) releaseAll() {
	deadline := time.After(endTimeout)
	for _, m := range p.members {
		if !m.known {
			m.Release()
		}
	}
	for _, m := range p.members {
		if m.known {
			continue
		}
		for open := true; open; {
			select {
			case _, open = <-m.Reports():
			case <-deadline:
				return
			}
		}
	}
}
