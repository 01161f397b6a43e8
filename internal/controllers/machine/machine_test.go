package machine

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"

	machinev1 "atoll.dev/atoll/api/machine/v1"
)

// host is one machine, whose shim may not be there.
type host struct {
	mu      sync.Mutex // guards the fields below
	shim    bool
	state   machinev1.State
	changed chan struct{}
	applied []int64
	kept    []string
	forgot  []string
}

func newHost() *host {
	return &host{shim: true, state: machinev1.State{Revision: 1, Phase: machinev1.Starting}, changed: make(chan struct{})}
}

func (h *host) State(ctx context.Context, _ string, seen int64) (machinev1.State, error) {
	h.mu.Lock()
	state, changed, shim := h.state, h.changed, h.shim
	h.mu.Unlock()
	if !shim {
		return machinev1.State{}, ErrNoShim
	}
	if state.Revision == seen {
		select {
		case <-changed:
		case <-time.After(time.Second):
		case <-ctx.Done():
			return machinev1.State{}, ctx.Err()
		}
		h.mu.Lock()
		state = h.state
		h.mu.Unlock()
	}
	return state, nil
}

func (h *host) Apply(_ context.Context, _ string, m *machinev1.Machine) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.shim {
		return ErrNoShim
	}
	h.applied = append(h.applied, m.Revision)
	return nil
}

func (h *host) Keepsakes() ([]string, error) { return h.kept, nil }

func (h *host) Forget(uid string) error {
	h.forgot = append(h.forgot, uid)
	return nil
}

func (h *host) set(phase machinev1.Phase) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.state.Revision++
	h.state.Phase = phase
	close(h.changed)
	h.changed = make(chan struct{})
}

func machineText(t *testing.T, revision int64) string {
	t.Helper()
	text, err := json.Marshal(machinev1.Machine{
		Name: "db", Namespace: "team", UID: "vm-uid", Revision: revision, BIOSUUID: "4c4c4544-0051-3010-8052-b4c04f4e3132",
		CPU: machinev1.CPU{Count: 1}, Memory: machinev1.Memory{Bytes: 64 << 20}, Firmware: machinev1.Firmware{Type: machinev1.BIOS},
		Stop: machinev1.Stop{Mode: machinev1.Hard},
	})
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func newPod(t *testing.T) *corev1.Pod {
	t.Helper()
	class := machinev1.RuntimeClass
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "db", Namespace: "team", UID: "p1", Annotations: map[string]string{machinev1.Annotation: machineText(t, 1)}},
		Spec:       corev1.PodSpec{RuntimeClassName: &class, NodeName: "h"},
	}
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(2 * time.Minute); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not in time", what)
		}
	}
}

// TestFollow: what the pod says goes to the shim, what the shim says to the pod, also when the shim has died.
func TestFollow(t *testing.T) {
	client, h := fake.NewClientset(newPod(t)), newHost()
	c, err := newController(Config{Node: "h", Host: h, Logger: slog.New(slog.DiscardHandler)}, client)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	pods := client.CoreV1().Pods("team")
	state := func() machinev1.State {
		pod, err := pods.Get(t.Context(), "db", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return stateOf(pod)
	}
	eventually(t, "the state is written", func() bool { return state().Phase == machinev1.Starting })
	h.set(machinev1.Running)
	eventually(t, "the next state is written", func() bool { return state().Phase == machinev1.Running })
	pod, err := pods.Get(t.Context(), "db", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	applied := func(revisions ...int64) func() bool {
		return func() bool {
			h.mu.Lock()
			defer h.mu.Unlock()
			return slices.Equal(h.applied, revisions)
		}
	}
	eventually(t, "the first is applied", applied(1))
	pod.Annotations[machinev1.Annotation] = machineText(t, 7)
	if _, err := pods.Update(t.Context(), pod, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the change is applied", applied(1, 7))
	h.mu.Lock()
	h.shim = false
	h.mu.Unlock()
	h.set(machinev1.Running) // wakes whoever waits
	pod.Status.Phase = corev1.PodFailed
	if _, err := pods.UpdateStatus(t.Context(), pod, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the end is written", func() bool { return state().Phase == machinev1.Ended && state().End.Reason == machinev1.EndCrashed })
}

// TestTidy: what is kept goes only with the machine, and never when that is not sure.
func TestTidy(t *testing.T) {
	h := newHost()
	h.kept = []string{"gone", "there", "vm-uid"}
	away := errors.New("the API server is away")
	listing := away
	c, err := newController(Config{Node: "h", Host: h, Logger: slog.New(slog.DiscardHandler), Machines: func(context.Context) (map[string]bool, error) {
		return map[string]bool{"there": true}, listing
	}}, fake.NewClientset())
	if err != nil {
		t.Fatal(err)
	}
	if err := c.informer.GetStore().Add(newPod(t)); err != nil {
		t.Fatal(err)
	}
	if err := c.tidy(t.Context()); !errors.Is(err, away) || len(h.forgot) > 0 {
		t.Errorf("without a list: %v, forgot %v", err, h.forgot)
	}
	listing = nil
	if err := c.tidy(t.Context()); err != nil || !slices.Equal(h.forgot, []string{"gone"}) {
		t.Errorf("%v, forgot %v", err, h.forgot)
	}
}

func TestSlim(t *testing.T) {
	pod := newPod(t)
	pod.Labels = map[string]string{"a": "b"}
	out, err := slim(pod)
	if err != nil {
		t.Fatal(err)
	}
	if got := out.(*corev1.Pod); got.Labels != nil || got.Annotations[machinev1.Annotation] == "" || got.UID != "p1" {
		t.Errorf("%+v", got)
	}
	other := "atoll"
	pod.Spec.RuntimeClassName = &other
	if out, err = slim(pod); err != nil || out.(*corev1.Pod).Annotations != nil {
		t.Errorf("of another pod %+v, %v", out, err)
	}
}
