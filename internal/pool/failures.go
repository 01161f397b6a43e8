package pool

import (
	"context"
	"time"
)

// ended handles the end of a member's process.
func (p *Pool) ended(m *member) {
	if p.members[m.id] == nil {
		return
	}
	switch {
	case m.known:
	case m.ready:
		p.fail("a shim daemon ended while its micro-VM waited", false)
	default:
		p.fail("a shim daemon ended while it prepared its micro-VM", false)
	}
	p.lose(m)
}

// fail notes that a member could not be made or did not last, and how to go on.
func (p *Pool) fail(reason string, template bool) {
	p.status.Failed++
	p.backOff(reason)
	p.log.Warn("a micro-VM failed", "error", reason, "failuresInARow", p.failures, "pause", time.Until(p.holdUntil))
	if p.template != nil && (template || p.failures%rebuildAfter == 0) {
		p.log.Warn("building the micro-VM template anew", "reason", reason)
		p.template.Close()
		p.template = nil
	}
}

// backOff notes a failure and makes the pause before the next attempt longer.
func (p *Pool) backOff(reason string) {
	now := time.Now()
	p.failures++
	p.status.Error, p.status.LastFailure, p.status.LastFailureAt = reason, reason, now
	p.holdUntil = later(p.holdUntil, now.Add(pause(p.failures)))
}

// pause is how long to wait after so many failures.
func pause(failures int) time.Duration {
	const doublings = 12 // reach lastBackoff
	return min(firstBackoff<<min(failures-1, doublings), lastBackoff)
}

// recovered handles a success.
func (p *Pool) recovered() {
	if p.failures > 0 {
		p.log.Info("micro-VMs come up again", "failures", p.failures)
		p.failures, p.holdUntil = 0, time.Time{}
	}
}

// build makes the template in the background.
func (p *Pool) build(ctx context.Context) {
	if p.building {
		return
	}
	p.building = true
	p.wg.Go(func() {
		t, err := p.maker.Build(ctx)
		p.send(ctx, func() { p.built(t, err) })
	})
}

func (p *Pool) built(t *Template, err error) {
	p.building = false
	if err != nil {
		p.backOff(err.Error())
		p.log.Error("building the micro-VM template", "error", err, "pause", time.Until(p.holdUntil))
		return
	}
	p.template = t
	p.status.TemplateBuilds++
	p.status.Accelerator, p.status.Reason = string(t.Meta.Accel), t.Reason
	p.status.Kernel, p.status.QEMU, p.status.TemplateMillis = t.Kernel, t.Meta.QEMUVersion, t.Meta.BootMillis
	p.log.Info("micro-VM template built", "accelerator", t.Meta.Accel, "reason", t.Reason,
		"bootMillis", t.Meta.BootMillis, "kernel", t.Kernel, "qemu", t.Meta.QEMUVersion)
}
