package agent

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/fsnotify/fsnotify"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/clientcmd"

	policyv1 "atoll.dev/atoll/api/policy/v1"
	controller "atoll.dev/atoll/internal/controllers/networkpolicy"
	"atoll.dev/atoll/internal/datadir/atomicfile"
	"atoll.dev/atoll/internal/datadir/pki"
	"atoll.dev/atoll/internal/network/denied"
	"atoll.dev/atoll/internal/network/gateway"
	"atoll.dev/atoll/internal/network/lease"
	"atoll.dev/atoll/internal/network/policy"
)

const (
	// cutEvery is the least time between two searches for connections that are not allowed any more.
	cutEvery = 500 * time.Millisecond
	// cutRetry is the longest time until a search that has failed is tried again.
	cutRetry = 30 * time.Second
	// tellEvery is the least time between two writes of the status.
	tellEvery = time.Second
	// keepDelays is how many pods the delays in the status are of.
	keepDelays = 200
)

// runPolicies enforces network policies. It has an identity of its own, which may read pods, namespaces and policies.
func (a *Agent) runPolicies(ctx context.Context) error {
	client, err := clientcmd.BuildConfigFromFlags("", a.files.Kubeconfig(pki.NetworkPolicy))
	if err != nil {
		return fmt.Errorf("configuring network policies: %w", err)
	}
	client.QPS, client.Burst, client.UserAgent = 20, 50, "atoll-network-policy"
	host := &policyHost{
		engine: a.cfg.Policy, leases: a.cfg.LeaseDir, log: a.cfg.Logger,
		changed: make(chan struct{}, 1), cut: make(chan struct{}, 1), news: make(chan struct{}, 1), seen: map[string]time.Time{},
	}
	c, err := controller.New(controller.Config{
		Client: client, Node: a.cfg.NodeName, Host: host, Report: host.report, Logger: a.cfg.Logger,
		DNS: controller.DNS{Address: a.cfg.Network.BridgeAddress, Port: uint16(a.cfg.Ports.DNS)},
	})
	if err != nil {
		return fmt.Errorf("configuring network policies: %w", err)
	}
	lines := denied.New(denied.Config{Dir: a.cfg.DeniedDir, Name: c.Name, Logger: a.cfg.Logger})
	return together(ctx, host.watch, host.cutter, c.Run,
		func(ctx context.Context) error { return a.logDenied(ctx, lines) },
		func(ctx context.Context) error { return host.tell(ctx, a.cfg.PolicyStatus) },
	)
}

// logDenied keeps the log going. Its trouble is no reason to stop enforcing.
func (a *Agent) logDenied(ctx context.Context, lines *denied.Log) error {
	for {
		err := lines.Run(ctx)
		if err == nil {
			return nil
		}
		if errors.Is(err, denied.ErrUnsupported) {
			return nil // the engine has said so
		}
		a.cfg.Logger.Warn("the log of denied traffic has stopped and is started again", "err", err)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(5 * time.Second):
		}
	}
}

// policyHost is the Host of the controller of network policies.
type policyHost struct {
	engine  *policy.Engine
	leases  string
	log     *slog.Logger
	changed chan struct{} // interfaces may have
	cut     chan struct{} // connections must be looked at
	news    chan struct{} // the status has changed

	mu     sync.Mutex           // guards the rest
	seen   map[string]time.Time // interfaces that the kernel has no rules for yet, since when
	done   map[string]bool      // those it has
	delays []time.Duration
	status controller.Status
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// watch tells when the CNI plugin gives out or takes back an address.
func (h *policyHost) watch(ctx context.Context) error {
	if _, err := lease.Open(h.leases); err != nil {
		return err
	}
	w, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("watching leases: %w", err)
	}
	defer w.Close()
	if err := w.Add(filepath.Join(h.leases, "leases")); err != nil {
		return fmt.Errorf("watching leases: %w", err)
	}
	signal(h.changed)
	for {
		select {
		case <-ctx.Done():
			return nil
		case _, ok := <-w.Events:
			if !ok {
				return errors.New("watching leases: the watch has ended")
			}
			signal(h.changed)
		case err := <-w.Errors:
			h.log.Warn("watching leases", "err", err)
			signal(h.changed)
		}
	}
}

// Changed implements controller.Host.
func (h *policyHost) Changed() <-chan struct{} { return h.changed }

// Wires implements controller.Host.
func (h *policyHost) Wires() ([]controller.Wire, error) { return h.wires(time.Now()) }

func (h *policyHost) wires(now time.Time) ([]controller.Wire, error) {
	store, err := lease.Open(h.leases)
	if err != nil {
		return nil, err
	}
	leases, err := store.List()
	if err != nil {
		return nil, err
	}
	out := make([]controller.Wire, 0, len(leases))
	h.mu.Lock()
	defer h.mu.Unlock()
	waiting := map[string]time.Time{}
	for _, l := range leases {
		namespace, name, ok := strings.Cut(l.Pod, "/")
		if !ok || !l.Address.IsValid() {
			continue
		}
		out = append(out, controller.Wire{
			Pod: types.NamespacedName{Namespace: namespace, Name: name}, UID: types.UID(l.UID),
			Interface: l.HostIf, Address: l.Address, MAC: gateway.Hardware(l.Address, l.MAC).String(),
		})
		if since, there := h.seen[l.HostIf]; there {
			waiting[l.HostIf] = since
		} else if !h.done[l.HostIf] {
			waiting[l.HostIf] = now
		}
	}
	h.seen = waiting // those that are gone are forgotten
	slices.SortFunc(out, func(a, b controller.Wire) int { return cmp.Compare(a.Interface, b.Interface) })
	return out, nil
}

// Apply implements controller.Host.
func (h *policyHost) Apply(ctx context.Context, s *policyv1.State) error {
	if h.engine.Damaged() {
		h.log.Warn("the nftables table of network policies was changed by somebody else and is made anew")
	}
	cut, err := h.engine.Apply(ctx, s)
	if err != nil {
		return err
	}
	h.enforced(s, time.Now())
	if cut {
		signal(h.cut)
	}
	return nil
}

// enforced notes that the kernel has the rules of a state, and how long its pods have waited for them.
func (h *policyHost) enforced(s *policyv1.State, now time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.done = make(map[string]bool, len(s.Pods))
	for _, p := range s.Pods {
		h.done[p.Interface] = true
		if since, ok := h.seen[p.Interface]; ok {
			h.delays = append(h.delays, now.Sub(since))
			delete(h.seen, p.Interface)
		}
	}
	h.delays = h.delays[max(0, len(h.delays)-keepDelays):]
}

// cutter cuts connections that are not allowed any more.
func (h *policyHost) cutter(ctx context.Context) error {
	retrying(ctx, h.cut, func() error {
		n, err := h.engine.Cut(ctx)
		if err != nil && ctx.Err() == nil {
			h.log.Warn("connections that policies do not allow any more may go on", "err", err)
		}
		if n > 0 {
			h.log.Info("connections cut", "count", n)
		}
		return err
	})
	return nil
}

// retrying calls do when it is woken, and after an error again by itself, later each time.
func retrying(ctx context.Context, wake <-chan struct{}, do func() error) {
	wait := cutEvery
	var again <-chan time.Time
	for {
		select {
		case <-ctx.Done():
			return
		case <-wake:
		case <-again:
		}
		again = nil
		if do() == nil {
			wait = cutEvery
		} else {
			again = time.After(wait)
			wait = min(2*wait, cutRetry)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(cutEvery):
		}
	}
}

// report is told how the controller is.
func (h *policyHost) report(s controller.Status) {
	h.mu.Lock()
	h.status = s
	h.mu.Unlock()
	signal(h.news)
}

// tell writes the status for `atoll status` and `atoll network`.
func (h *policyHost) tell(ctx context.Context, path string) error {
	var last []byte
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-h.news:
		}
		text, err := json.Marshal(h.summary())
		if err == nil && string(text) != string(last) {
			err = atomicfile.Write(path, text, 0o600)
			last = text
		}
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			h.log.Warn("status of network policies not written", "err", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(tellEvery):
		}
	}
}

func (h *policyHost) summary() policyv1.Status {
	h.mu.Lock()
	defer h.mu.Unlock()
	out := policyv1.Status{
		Pods: h.status.Pods, Policies: h.status.Policies, Error: h.status.Error,
		Limits: h.engine.Limits(), Counters: h.engine.Labels(),
	}
	if n := len(h.delays); n > 0 {
		sorted := slices.Sorted(slices.Values(h.delays))
		out.PodDelay50, out.PodDelay95 = sorted[n/2].Round(time.Millisecond), sorted[n*95/100].Round(time.Millisecond)
	}
	return out
}
