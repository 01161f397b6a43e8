package machine

import (
	"context"
	"encoding/json"
	"errors"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"

	machinev1 "atoll.dev/atoll/api/machine/v1"
)

// ErrNoShim says that a pod has no shim: it has not started yet, or the shim has ended.
var ErrNoShim = errors.New("the pod has no shim")

// follower follows one pod.
type follower struct {
	c       *Controller
	cancel  context.CancelFunc
	changed chan struct{} // buffered: the pod has changed

	mu  sync.Mutex // guards the field below
	pod *corev1.Pod
}

// update takes a changed pod.
func (f *follower) update(pod *corev1.Pod) {
	f.mu.Lock()
	before := f.pod
	f.pod = pod
	f.mu.Unlock()
	if before == nil || before.Annotations[machinev1.Annotation] != pod.Annotations[machinev1.Annotation] || before.Status.Phase != pod.Status.Phase {
		select {
		case f.changed <- struct{}{}:
		default:
		}
	}
}

func (f *follower) now() *corev1.Pod {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.pod
}

// run passes on what changes, in both directions, until the pod is gone.
func (f *follower) run(ctx context.Context) {
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { f.applyAll(ctx) })
	written := stateOf(f.now())
	retry := firstRetry
	for ctx.Err() == nil {
		pod := f.now()
		st, err := f.c.cfg.Host.State(ctx, string(pod.UID), written.Revision)
		switch {
		case errors.Is(err, ErrNoShim) && ended(pod) && written.Phase != machinev1.Ended:
			st, err = lost(written), nil
		case errors.Is(err, ErrNoShim) && ended(pod):
			return // it will not come back
		}
		if err == nil && !same(st, written) {
			if err = f.c.write(ctx, pod, st); err == nil {
				written = st
			}
		}
		wait := pause
		if err == nil {
			retry = firstRetry
		} else {
			if !errors.Is(err, ErrNoShim) && ctx.Err() == nil {
				f.c.cfg.Logger.Warn("following a virtual machine", "pod", pod.Namespace+"/"+pod.Name, "error", err)
			}
			wait = retry
			retry = min(2*retry, lastRetry)
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
		}
	}
}

// ended tells whether a pod's container has ended for good.
func ended(pod *corev1.Pod) bool {
	return pod.Status.Phase == corev1.PodFailed || pod.Status.Phase == corev1.PodSucceeded
}

// lost is the state of a machine whose shim was killed, and QEMU with it.
func lost(last machinev1.State) machinev1.State {
	last.Revision++
	last.Phase = machinev1.Ended
	last.End = machinev1.End{
		Reason: machinev1.EndCrashed, Message: "the process that ran the machine was killed, and the machine with it",
		At: time.Now().UTC().Format(time.RFC3339),
	}
	return last
}

// stateOf is the state that was written last, by this process or another.
func stateOf(pod *corev1.Pod) machinev1.State {
	var st machinev1.State
	if err := json.Unmarshal([]byte(pod.Annotations[machinev1.StateAnnotation]), &st); err != nil {
		return machinev1.State{}
	}
	return st
}

// same compares states as they are written.
func same(a, b machinev1.State) bool {
	x, errX := json.Marshal(a)
	y, errY := json.Marshal(b)
	return errX == nil && errY == nil && string(x) == string(y)
}

// applyAll passes each change of the machine to the shim, and the first one, which it may not have got.
func (f *follower) applyAll(ctx context.Context) {
	applied, retry := "", firstRetry
	for {
		var again <-chan time.Time
		pod := f.now()
		if text := pod.Annotations[machinev1.Annotation]; text != applied && !ended(pod) {
			if err := f.apply(ctx, pod, text); err == nil {
				applied, retry = text, firstRetry
			} else {
				if !errors.Is(err, ErrNoShim) && ctx.Err() == nil {
					f.c.cfg.Logger.Warn("changing a virtual machine", "pod", pod.Namespace+"/"+pod.Name, "error", err)
				}
				again = time.After(retry)
				retry = min(2*retry, lastRetry)
			}
		}
		select {
		case <-f.changed:
		case <-again:
		case <-ctx.Done():
			return
		}
	}
}

func (f *follower) apply(ctx context.Context, pod *corev1.Pod, text string) error {
	m, err := machinev1.Parse([]byte(text))
	if err != nil {
		return err
	}
	return f.c.cfg.Host.Apply(ctx, string(pod.UID), m)
}
