package libraryitem

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/dynamic/dynamicinformer"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"
	"k8s.io/client-go/util/workqueue"

	api "atoll.dev/atoll/api/imageregistry/v1alpha1"
	"atoll.dev/atoll/internal/controllers/events"
)

// Host has the content of items.
type Host interface {
	// Takes tells whether this host can bring an item in that no host has taken yet.
	Takes(item *api.ContentLibraryItem) bool
	// Bring brings in the content of an item, going on where an earlier call has ended, and tells how far it is.
	// Guarded items are of people who may not reach the host itself. ErrWaiting, ErrPermanent.
	Bring(ctx context.Context, item *api.ContentLibraryItem, guarded bool, told func(api.ItemProgress)) (Content, error)
	// Forget removes the content of items for which gone says so.
	Forget(ctx context.Context, gone func(uid string) bool) error
}

// Content is what an item turned out to be.
type Content struct {
	Type     api.ItemType
	SHA256   string
	Bytes    int64
	FileName string
	Disks    []api.ItemDisk
	Hardware *api.ItemHardware
	// Digest is that of the manifest in the registry, if it was pushed there.
	Digest string
}

// Permanent is an error that trying again does not help. Reason is one of a condition.
type Permanent struct {
	Reason string
	Err    error
}

func (p Permanent) Error() string { return p.Err.Error() }
func (p Permanent) Unwrap() error { return p.Err }

// ErrWaiting says that somebody has to send the content first.
var ErrWaiting = errors.New("waiting for the upload")

// Config of the controller.
type Config struct {
	Client *rest.Config
	// Node is the host's Node.
	Node   string
	Host   Host
	Logger *slog.Logger
}

const (
	// workers is how many items are brought in together.
	workers = 3
	// pollUpload is how often an upload that nobody finished is looked at.
	pollUpload = 2 * time.Second
	// retryFirst and retryMost are the pauses after a failure.
	retryFirst = 2 * time.Second
	retryMost  = 5 * time.Minute
	// sweepEvery is how often the content of items that are gone is looked for.
	sweepEvery = 10 * time.Minute
	// tellEvery is how often progress is written into the status.
	tellEvery = time.Second
)

// Controller brings in the items of one host.
type Controller struct {
	cfg       Config
	client    dynamic.Interface
	informers map[schema.GroupVersionResource]cache.SharedIndexInformer
	queue     workqueue.TypedRateLimitingInterface[key]
	events    record.EventRecorder
	sink      record.EventBroadcaster
	swept     chan struct{}

	mu      sync.Mutex // guards the field below
	running map[key]context.CancelFunc
}

// key names an item; without a namespace it is one of the cluster.
type key struct{ namespace, name string }

func (k key) resource() schema.GroupVersionResource {
	if k.namespace == "" {
		return api.ClusterItems()
	}
	return api.Items()
}

func (k key) String() string {
	if k.namespace == "" {
		return k.name
	}
	return k.namespace + "/" + k.name
}

// New makes a controller. It does not talk to the API server.
func New(cfg Config) (*Controller, error) {
	client, err := dynamic.NewForConfig(cfg.Client)
	if err != nil {
		return nil, fmt.Errorf("library item controller: %w", err)
	}
	recorder, sink, err := events.Start(cfg.Client, corev1.EventSource{Component: "atoll-images", Host: cfg.Node}, api.AddToScheme)
	if err != nil {
		return nil, fmt.Errorf("library item controller: %w", err)
	}
	c := &Controller{
		cfg: cfg, client: client, informers: map[schema.GroupVersionResource]cache.SharedIndexInformer{},
		queue:  workqueue.NewTypedRateLimitingQueue(workqueue.NewTypedItemExponentialFailureRateLimiter[key](retryFirst, retryMost)),
		events: recorder,
		sink:   sink, swept: make(chan struct{}, 1), running: map[key]context.CancelFunc{},
	}
	for _, resource := range []schema.GroupVersionResource{api.Items(), api.ClusterItems()} {
		informer := dynamicinformer.NewFilteredDynamicInformer(client, resource, "", 0, cache.Indexers{}, nil).Informer()
		_, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
			AddFunc:    func(obj any) { c.add(obj) },
			UpdateFunc: func(old, obj any) { c.changed(old, obj) },
			DeleteFunc: c.deleted,
		})
		if err != nil {
			return nil, fmt.Errorf("library item controller: %w", err)
		}
		c.informers[resource] = informer
	}
	return c, nil
}

func keyOf(obj any) (key, bool) {
	if gone, ok := obj.(cache.DeletedFinalStateUnknown); ok {
		obj = gone.Obj
	}
	m, ok := obj.(metav1.Object)
	if !ok {
		return key{}, false
	}
	return key{m.GetNamespace(), m.GetName()}, true
}

func (c *Controller) add(obj any) {
	if k, ok := keyOf(obj); ok {
		c.queue.Add(k)
	}
}

// changed leaves out updates of the status, which are our own but for the host.
func (c *Controller) changed(old, obj any) {
	a, okA := old.(*unstructured.Unstructured)
	b, okB := obj.(*unstructured.Unstructured)
	if okA && okB && a.GetGeneration() == b.GetGeneration() {
		was, _, _ := unstructured.NestedString(a.Object, "status", "host")
		is, _, _ := unstructured.NestedString(b.Object, "status", "host")
		if was == is {
			return
		}
	}
	c.add(obj)
}

// deleted ends what is under way for an item, and has its content removed.
func (c *Controller) deleted(obj any) {
	k, ok := keyOf(obj)
	if !ok {
		return
	}
	c.mu.Lock()
	if cancel := c.running[k]; cancel != nil {
		cancel()
	}
	c.mu.Unlock()
	c.sweepSoon()
}

func (c *Controller) sweepSoon() {
	select {
	case c.swept <- struct{}{}:
	default:
	}
}

// Run holds until ctx ends.
func (c *Controller) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	defer c.sink.Shutdown()
	for _, informer := range c.informers {
		wg.Go(func() { informer.Run(ctx.Done()) })
	}
	defer context.AfterFunc(ctx, c.queue.ShutDown)()
	for _, informer := range c.informers {
		if !cache.WaitForCacheSync(ctx.Done(), informer.HasSynced) {
			return nil
		}
	}
	var all sync.WaitGroup
	for range workers {
		all.Go(func() { c.work(ctx) })
	}
	all.Go(func() { c.sweep(ctx) })
	all.Wait()
	return nil
}

// sweep removes the content of items that are gone, now and then.
func (c *Controller) sweep(ctx context.Context) {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		items := map[string]bool{}
		for _, informer := range c.informers {
			for _, obj := range informer.GetStore().List() {
				if m, ok := obj.(metav1.Object); ok {
					items[string(m.GetUID())] = true
				}
			}
		}
		if err := c.cfg.Host.Forget(ctx, func(uid string) bool { return !items[uid] }); err != nil && ctx.Err() == nil {
			c.cfg.Logger.Warn("removing images that are gone", "error", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		case <-c.swept:
		}
	}
}

func (c *Controller) work(ctx context.Context) {
	for {
		k, stop := c.queue.Get()
		if stop {
			return
		}
		again, err := c.sync(ctx, k)
		switch {
		case err != nil && ctx.Err() == nil:
			c.cfg.Logger.Warn("library item needs another attempt", "item", k.String(), "error", err)
			c.queue.AddRateLimited(k)
		default:
			c.queue.Forget(k)
			if again > 0 {
				c.queue.AddAfter(k, again)
			}
		}
		c.queue.Done(k)
	}
}

// get reads an item from the informer; nil is gone.
func (c *Controller) get(k key) (*api.ContentLibraryItem, error) {
	name := k.name
	if k.namespace != "" {
		name = k.namespace + "/" + k.name
	}
	obj, ok, err := c.informers[k.resource()].GetStore().GetByKey(name)
	if err != nil || !ok {
		return nil, err
	}
	var item api.ContentLibraryItem // both kinds are made alike
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(obj.(*unstructured.Unstructured).Object, &item); err != nil {
		return nil, fmt.Errorf("reading item %s: %w", k, err)
	}
	item.TypeMeta = metav1.TypeMeta{APIVersion: api.GroupVersion().String(), Kind: "ContentLibraryItem"}
	if k.namespace == "" {
		item.Kind = "ClusterContentLibraryItem"
	}
	return &item, nil
}
