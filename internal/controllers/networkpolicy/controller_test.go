package networkpolicy

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net/netip"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"

	policyv1 "atoll.dev/atoll/api/policy/v1"
)

// fakeHost has the interface of one pod.
type fakeHost struct {
	fail    chan bool
	applied chan *policyv1.State
	changed chan struct{}
}

func (h *fakeHost) Wires() ([]Wire, error) {
	return []Wire{{Pod: types.NamespacedName{Namespace: "shop", Name: "db"}, Interface: "atl1", Address: netip.MustParseAddr("10.244.0.2")}}, nil
}

func (h *fakeHost) Changed() <-chan struct{} { return h.changed }

func (h *fakeHost) Apply(_ context.Context, s *policyv1.State) error {
	select {
	case <-h.fail:
		return errors.New("the kernel does not like it")
	default:
	}
	select {
	case h.applied <- s:
	default:
	}
	return nil
}

func TestController(t *testing.T) {
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop"}}
	client := fake.NewClientset(ns, aPod("shop", "db", node, "app=db", ""), aPolicy(t, "shop", "p", `podSelector: {}`))
	host := &fakeHost{fail: make(chan bool, 1), applied: make(chan *policyv1.State), changed: make(chan struct{})}
	host.fail <- true
	reports := make(chan Status, 100)
	c := newController(Config{Node: node, Host: host, Logger: slog.New(slog.NewTextHandler(io.Discard, nil)), Report: func(s Status) {
		select {
		case reports <- s:
		default:
		}
	}}, client)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- c.Run(ctx) }()
	next := func(ok func(*policyv1.State) bool) {
		t.Helper()
		for end := time.After(2 * time.Minute); ; {
			select {
			case s := <-host.applied:
				if ok(s) {
					return
				}
			case <-end:
				t.Fatal("the state does not come")
			}
		}
	}
	next(func(s *policyv1.State) bool { return len(s.Pods) == 1 && s.Policies["shop/p"] != nil })
	if first := <-reports; !strings.Contains(first.Error, "does not like it") || first.Pods != 1 {
		t.Errorf("the first report: %+v", first)
	}
	events, err := client.CoreV1().Events("shop").List(ctx, metav1.ListOptions{})
	if err != nil || len(events.Items) != 1 || events.Items[0].InvolvedObject.Name != "db" || events.Items[0].Reason != "NetworkPolicyNotEnforced" {
		t.Errorf("events: %v, %v", events, err)
	}
	if got := c.Name(netip.MustParseAddr("10.244.0.2")); got != "shop/db" {
		t.Errorf("name: %q", got)
	}
	policies := client.NetworkingV1().NetworkPolicies("shop")
	// A fake client loses what is deleted before it is watched.
	if _, err := policies.Create(ctx, aPolicy(t, "shop", "q", `podSelector: {}`), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	next(func(s *policyv1.State) bool { return s.Policies["shop/q"] != nil })
	if err := policies.Delete(ctx, "p", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	next(func(s *policyv1.State) bool { return len(s.Policies) == 1 && s.Policies["shop/p"] == nil })
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

func TestSlimKeepsWhatIsUsed(t *testing.T) {
	always := corev1.ContainerRestartPolicyAlways
	p := aPod("shop", "db", node, "app=db", "10.9.9.9", corev1.ContainerPort{Name: "pg", ContainerPort: 5432})
	p.Spec.InitContainers = []corev1.Container{
		{Name: "sidecar", RestartPolicy: &always, Ports: []corev1.ContainerPort{{Name: "side", ContainerPort: 1}}},
		{Name: "init", Ports: []corev1.ContainerPort{{Name: "early", ContainerPort: 2}}},
	}
	p.Annotations = map[string]string{"big": strings.Repeat("x", 1000)}
	p.Spec.Containers[0].Env = []corev1.EnvVar{{Name: "secret", Value: "x"}}
	out, err := slim(p)
	if err != nil {
		t.Fatal(err)
	}
	small := out.(*corev1.Pod)
	if small.Annotations != nil || small.Spec.Containers[0].Env != nil {
		t.Errorf("%v", small)
	}
	a, b := newIndex(node, dns()), newIndex(node, dns())
	a.setPod(p)
	b.setPod(small)
	name := types.NamespacedName{Namespace: "shop", Name: "db"}
	if got := b.pods[name].ports; len(got) != 2 || got[0].name != "side" || len(a.pods[name].ports) != 2 {
		t.Errorf("ports: %v", got)
	}
}
