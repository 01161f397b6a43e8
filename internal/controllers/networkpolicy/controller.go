package networkpolicy

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"

	policyv1 "atoll.dev/atoll/api/policy/v1"
)

// Host is the network of this host.
type Host interface {
	// Wires lists the interfaces of pods, sorted. Changed has something to receive when they may have changed.
	Wires() ([]Wire, error)
	Changed() <-chan struct{}
	// Apply enforces a state. It is called from one goroutine, and returns when the kernel has it.
	Apply(ctx context.Context, s *policyv1.State) error
}

// Config of the controller.
type Config struct {
	Client *rest.Config
	Node   string
	DNS    DNS
	Host   Host
	// Report is told how things are after every attempt; it may be nil.
	Report func(Status)
	Logger *slog.Logger
}

// Status is how far the controller is.
type Status struct {
	Time     time.Time `json:"time"`
	Pods     int       `json:"pods"`
	Policies int       `json:"policies"`
	// Took is how long the last change took in the kernel.
	Took time.Duration `json:"took"`
	// Error says why the last attempt failed.
	Error string `json:"error,omitempty"`
}

const (
	// gatherFor is how long changes are collected: what comes together is applied together.
	gatherFor = 10 * time.Millisecond
	// lookEvery is how often interfaces are listed without having been told of a change.
	lookEvery = 5 * time.Second
	// retryFirst is the pause after an attempt that failed; it doubles up to retryLast.
	retryFirst = 200 * time.Millisecond
	retryLast  = 10 * time.Second
)

// Controller follows pods, namespaces and policies.
type Controller struct {
	cfg    Config
	client kubernetes.Interface
	kick   chan struct{}

	mu      sync.Mutex // guards the rest
	index   *index
	applied map[netip.Addr]string // pods the kernel has, by address
	told    map[types.UID]bool    // pods that an Event was made of
}

// New makes a controller. It does not talk to the API server.
func New(cfg Config) (*Controller, error) {
	client, err := kubernetes.NewForConfig(cfg.Client)
	if err != nil {
		return nil, fmt.Errorf("network policy controller: %w", err)
	}
	return newController(cfg, client), nil
}

func newController(cfg Config, client kubernetes.Interface) *Controller {
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	return &Controller{
		cfg: cfg, client: client, kick: make(chan struct{}, 1), index: newIndex(cfg.Node, cfg.DNS),
		applied: map[netip.Addr]string{}, told: map[types.UID]bool{},
	}
}

// Name is the pod with an address, "" when there is none.
func (c *Controller) Name(a netip.Addr) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.index.owner(a)
}

// Run follows everything until ctx ends, and returns nil then. Nothing is applied before all that exists is known: what
// an earlier process has applied stays in force until then.
func (c *Controller) Run(ctx context.Context) error {
	if err := c.await(ctx); err != nil {
		return nil // ctx has ended
	}
	var running sync.WaitGroup
	defer running.Wait()
	synced, err := c.follow(ctx, &running)
	if err != nil {
		return err
	}
	if !cache.WaitForCacheSync(ctx.Done(), synced...) {
		return nil
	}
	look := time.NewTicker(lookEvery)
	defer look.Stop()
	pause := retryFirst
	for {
		var retry <-chan time.Time
		if err := c.apply(ctx); err == nil {
			pause = retryFirst
		} else {
			retry = time.After(pause)
			pause = min(2*pause, retryLast)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-retry:
			continue
		case <-look.C:
			continue
		case <-c.kick:
		case <-c.cfg.Host.Changed():
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(gatherFor):
		}
	}
}

// await returns when the API server lets us list: informers would wait longer and longer for it, and no pod has a
// network before they know everything.
func (c *Controller) await(ctx context.Context) error {
	return wait.PollUntilContextCancel(ctx, retryFirst, true, func(ctx context.Context) (bool, error) {
		one := metav1.ListOptions{Limit: 1}
		_, err := c.client.NetworkingV1().NetworkPolicies(metav1.NamespaceAll).List(ctx, one)
		if err == nil {
			_, err = c.client.CoreV1().Pods(metav1.NamespaceAll).List(ctx, one)
		}
		return err == nil, nil
	})
}

// apply hands the state over as it is now.
func (c *Controller) apply(ctx context.Context) error {
	wires, err := c.cfg.Host.Wires()
	c.mu.Lock()
	if err == nil {
		c.index.setWires(wires)
	}
	state := c.index.build()
	c.mu.Unlock()
	began := time.Now()
	if err == nil {
		err = c.cfg.Host.Apply(ctx, state)
	}
	if ctx.Err() != nil {
		return nil
	}
	status := Status{Time: time.Now(), Pods: len(state.Pods), Policies: len(state.Policies), Took: time.Since(began)}
	if err != nil {
		status.Error = err.Error()
		c.cfg.Logger.Error("network policies are not enforced as they should be", "err", err)
		c.tell(ctx, state, err)
	} else {
		c.mu.Lock()
		c.applied = names(state)
		clear(c.told)
		c.mu.Unlock()
	}
	if c.cfg.Report != nil {
		c.cfg.Report(status)
	}
	return err
}

func names(s *policyv1.State) map[netip.Addr]string {
	out := make(map[netip.Addr]string, len(s.Pods))
	for a, p := range s.Pods {
		out[a] = p.Name
	}
	return out
}

// tell makes an Event for each pod that has no network because of an error.
func (c *Controller) tell(ctx context.Context, s *policyv1.State, cause error) {
	type victim struct {
		name types.NamespacedName
		uid  types.UID
	}
	var victims []victim
	c.mu.Lock()
	for a, p := range s.Pods {
		known := c.index.pods[nameOf(p.Name)]
		if c.applied[a] == p.Name || known == nil || c.told[known.uid] {
			continue
		}
		c.told[known.uid] = true
		victims = append(victims, victim{known.name, known.uid})
	}
	c.mu.Unlock()
	for _, v := range victims {
		now := metav1.Now()
		_, err := c.client.CoreV1().Events(v.name.Namespace).Create(ctx, &corev1.Event{
			ObjectMeta:     metav1.ObjectMeta{GenerateName: v.name.Name + ".", Namespace: v.name.Namespace},
			InvolvedObject: corev1.ObjectReference{APIVersion: "v1", Kind: "Pod", Namespace: v.name.Namespace, Name: v.name.Name, UID: v.uid},
			Reason:         "NetworkPolicyNotEnforced", Type: corev1.EventTypeWarning, Count: 1, FirstTimestamp: now, LastTimestamp: now,
			Message: "the pod has no network until its network policies can be enforced: " + cause.Error(),
			Source:  corev1.EventSource{Component: "atoll-network-policy", Host: c.cfg.Node},
		}, metav1.CreateOptions{})
		if err != nil {
			c.cfg.Logger.Warn("event not made", "pod", v.name, "err", err)
		}
	}
}

// follow starts the informers.
func (c *Controller) follow(ctx context.Context, running *sync.WaitGroup) ([]cache.InformerSynced, error) {
	var synced []cache.InformerSynced
	for _, f := range c.followed() {
		informer := cache.NewSharedInformer(cache.ToListWatcherWithWatchListSemantics(f.lw, c.client), f.example, 0)
		if err := informer.SetTransform(slim); err != nil {
			return nil, fmt.Errorf("network policy controller: %w", err)
		}
		handler, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
			AddFunc:    func(obj any) { c.seen(obj, false) },
			UpdateFunc: func(_, obj any) { c.seen(obj, false) },
			DeleteFunc: func(obj any) { c.seen(obj, true) },
		})
		if err != nil {
			return nil, fmt.Errorf("network policy controller: %w", err)
		}
		synced = append(synced, handler.HasSynced)
		running.Go(func() { informer.RunWithContext(ctx) })
	}
	return synced, nil
}

// source is one kind of objects.
type source struct {
	lw      *cache.ListWatch
	example runtime.Object
}

func (c *Controller) followed() []source {
	return []source{
		{listWatch(c.client.CoreV1().Pods(metav1.NamespaceAll)), &corev1.Pod{}},
		{listWatch(c.client.CoreV1().Namespaces()), &corev1.Namespace{}},
		{listWatch(c.client.NetworkingV1().NetworkPolicies(metav1.NamespaceAll)), &networkingv1.NetworkPolicy{}},
	}
}

// lister is the client of one kind.
type lister[L runtime.Object] interface {
	List(ctx context.Context, o metav1.ListOptions) (L, error)
	Watch(ctx context.Context, o metav1.ListOptions) (watch.Interface, error)
}

func listWatch[L runtime.Object](l lister[L]) *cache.ListWatch {
	return &cache.ListWatch{
		ListWithContextFunc:  func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) { return l.List(ctx, o) },
		WatchFuncWithContext: l.Watch,
	}
}

// seen takes one object in.
func (c *Controller) seen(obj any, gone bool) {
	if d, ok := obj.(cache.DeletedFinalStateUnknown); ok {
		obj = d.Obj
	}
	c.mu.Lock()
	switch o := obj.(type) {
	case *corev1.Pod:
		if gone {
			c.index.deletePod(types.NamespacedName{Namespace: o.Namespace, Name: o.Name}, o.UID)
		} else {
			c.index.setPod(o)
		}
	case *corev1.Namespace:
		if gone {
			c.index.deleteNamespace(o.Name)
		} else {
			c.index.setNamespace(o.Name, o.Labels)
		}
	case *networkingv1.NetworkPolicy:
		if gone {
			c.index.deletePolicy(types.NamespacedName{Namespace: o.Namespace, Name: o.Name})
		} else {
			c.index.setPolicy(o)
		}
	}
	c.mu.Unlock()
	select {
	case c.kick <- struct{}{}:
	default:
	}
}

// slim keeps what is used of an object.
func slim(obj any) (any, error) {
	switch o := obj.(type) {
	case *corev1.Pod:
		return slimPod(o), nil
	case *corev1.Namespace:
		return &corev1.Namespace{TypeMeta: o.TypeMeta, ObjectMeta: slimMeta(o.ObjectMeta)}, nil
	case *networkingv1.NetworkPolicy:
		return &networkingv1.NetworkPolicy{TypeMeta: o.TypeMeta, ObjectMeta: slimMeta(o.ObjectMeta), Spec: o.Spec}, nil
	}
	return obj, nil
}

func slimMeta(m metav1.ObjectMeta) metav1.ObjectMeta {
	return metav1.ObjectMeta{Namespace: m.Namespace, Name: m.Name, UID: m.UID, ResourceVersion: m.ResourceVersion, Labels: maps.Clone(m.Labels)}
}

func slimPod(p *corev1.Pod) *corev1.Pod {
	ports := func(in []corev1.Container) []corev1.Container {
		var out []corev1.Container
		for _, c := range in {
			if slices.ContainsFunc(c.Ports, func(p corev1.ContainerPort) bool { return p.Name != "" }) {
				out = append(out, corev1.Container{Ports: slices.Clone(c.Ports), RestartPolicy: c.RestartPolicy})
			}
		}
		return out
	}
	return &corev1.Pod{
		TypeMeta: p.TypeMeta, ObjectMeta: slimMeta(p.ObjectMeta),
		Spec: corev1.PodSpec{
			NodeName: p.Spec.NodeName, HostNetwork: p.Spec.HostNetwork,
			Containers: ports(p.Spec.Containers), InitContainers: ports(p.Spec.InitContainers),
		},
		Status: corev1.PodStatus{Phase: p.Status.Phase, PodIPs: slices.Clone(p.Status.PodIPs)},
	}
}
