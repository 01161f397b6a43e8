package datastore

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/dynamic/dynamicinformer"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"
	"k8s.io/client-go/util/workqueue"

	api "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/internal/controllers/events"
)

// Finalizer holds a Datastore that is not empty.
const Finalizer = "atoll.dev/datastore"

// Host is this host's disks.
type Host interface {
	// Open makes a datastore usable, or again after a change. It is called often.
	Open(ctx context.Context, d *api.Datastore) error
	// Close ends the use of a datastore that is gone.
	Close(name string)
	// Elsewhere says that a datastore is one of another host.
	Elsewhere(name string)
	// Listed says that all datastores there are have been seen once.
	Listed()
	// Look tells how an open datastore is.
	Look(ctx context.Context, name string) State
	// Tidy finishes what a crash left half done, and merges layers, which takes as long as copying them.
	Tidy(ctx context.Context, name string) error
}

// State is how a datastore is. Numbers are bytes, and zero when Err is set.
type State struct {
	ID                                string
	Capacity, Free, Used, Provisioned int64
	NearlyFull, Full                  bool
	Volumes                           []api.DatastoreVolume // sorted by id
	Snapshots                         int
	Err                               error
}

// Config of the controller.
type Config struct {
	Client *rest.Config
	// Node is the host's Node.
	Node   string
	Host   Host
	Logger *slog.Logger
}

const (
	// lookEvery is how often the status is looked at, and a datastore that failed is tried again.
	lookEvery = 15 * time.Second
	tidyEvery = time.Hour
	// workers is how many datastores are looked at together, so that one that does not answer holds up
	// none of the others.
	workers = 8
	// touchAfter collects changes that come in quick succession.
	touchAfter = time.Second
)

// Controller keeps the datastores of one host.
type Controller struct {
	cfg      Config
	client   dynamic.NamespaceableResourceInterface
	informer cache.SharedIndexInformer
	queue    workqueue.TypedRateLimitingInterface[string]
	events   record.EventRecorder
	sink     record.EventBroadcaster
	tidying  *tidying
}

// New makes a controller. It does not talk to the API server.
func New(cfg Config) (*Controller, error) {
	client, err := dynamic.NewForConfig(cfg.Client)
	if err != nil {
		return nil, fmt.Errorf("datastore controller: %w", err)
	}
	recorder, sink, err := events.Start(cfg.Client, corev1.EventSource{Component: "atoll-datastore", Host: cfg.Node}, api.AddToScheme)
	if err != nil {
		return nil, fmt.Errorf("datastore controller: %w", err)
	}
	c := &Controller{
		cfg:      cfg,
		client:   client.Resource(api.Datastores()),
		informer: dynamicinformer.NewFilteredDynamicInformer(client, api.Datastores(), "", 0, cache.Indexers{}, nil).Informer(),
		queue:    workqueue.NewTypedRateLimitingQueue(workqueue.NewTypedItemExponentialFailureRateLimiter[string](200*time.Millisecond, lookEvery)),
		sink:     sink,
		events:   recorder,
		tidying:  &tidying{host: cfg.Host, log: cfg.Logger, last: map[string]time.Time{}, running: map[string]context.CancelFunc{}},
	}
	add := func(obj any) {
		if key, err := cache.DeletionHandlingMetaNamespaceKeyFunc(obj); err == nil {
			c.queue.Add(key)
		}
	}
	_, err = c.informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    add,
		UpdateFunc: func(old, obj any) { addIfChanged(old, obj, add) },
		DeleteFunc: add,
	})
	return c, err
}

// addIfChanged leaves out updates of the status, which are our own.
func addIfChanged(old, obj any, add func(any)) {
	a, okA := old.(metav1.Object)
	b, okB := obj.(metav1.Object)
	if okA && okB && a.GetGeneration() == b.GetGeneration() && (a.GetDeletionTimestamp() == nil) == (b.GetDeletionTimestamp() == nil) {
		return
	}
	add(obj)
}

// Run holds until ctx ends.
func (c *Controller) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	defer c.tidying.wait()
	defer c.sink.Shutdown()
	wg.Go(func() { c.informer.Run(ctx.Done()) })
	defer context.AfterFunc(ctx, c.queue.ShutDown)()
	if !cache.WaitForCacheSync(ctx.Done(), c.informer.HasSynced) {
		return nil
	}
	var first, all sync.WaitGroup
	for _, name := range c.informer.GetStore().ListKeys() {
		first.Go(func() {
			if _, err := c.sync(ctx, name); err != nil {
				c.cfg.Logger.Warn("datastore needs another attempt", "datastore", name, "error", err)
			}
		})
	}
	first.Wait()
	c.cfg.Host.Listed()
	for range workers {
		all.Go(func() { c.work(ctx) })
	}
	all.Wait()
	return nil
}

// work looks at one datastore after the other until the queue ends. The queue gives none to two workers at a time.
func (c *Controller) work(ctx context.Context) {
	for {
		name, stop := c.queue.Get()
		if stop {
			return
		}
		again, err := c.sync(ctx, name)
		switch {
		case err != nil && ctx.Err() == nil:
			c.cfg.Logger.Warn("datastore needs another attempt", "datastore", name, "error", err)
			c.queue.AddRateLimited(name)
		default:
			c.queue.Forget(name)
			if again {
				c.queue.AddAfter(name, lookEvery)
			}
		}
		c.queue.Done(name)
	}
}

// Touch says that volumes have changed, so that the status is looked at soon.
func (c *Controller) Touch() {
	for _, name := range c.informer.GetStore().ListKeys() {
		c.queue.AddAfter(name, touchAfter)
	}
}

// sync does what one Datastore needs, and tells whether to look at it again later.
func (c *Controller) sync(ctx context.Context, name string) (again bool, err error) {
	obj, exists, err := c.informer.GetStore().GetByKey(name)
	if err != nil {
		return false, err
	}
	if !exists {
		c.forget(name)
		return false, nil
	}
	d := &api.Datastore{}
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(obj.(*unstructured.Unstructured).Object, d); err != nil {
		return false, fmt.Errorf("reading datastore %s: %w", name, err)
	}
	d.TypeMeta = metav1.TypeMeta{APIVersion: api.GroupVersion().String(), Kind: "Datastore"}
	if !c.ours(d) {
		c.cfg.Host.Elsewhere(name)
		return false, nil
	}
	if d.DeletionTimestamp == nil {
		if err := c.hold(ctx, d); err != nil {
			return true, err
		}
	}
	state := State{Err: c.cfg.Host.Open(ctx, d)}
	if state.Err == nil {
		c.tidying.begin(ctx, name)
		state = c.cfg.Host.Look(ctx, name)
	}
	if d.DeletionTimestamp != nil && state.Err == nil && len(state.Volumes) == 0 && state.Snapshots == 0 {
		return false, c.release(ctx, d)
	}
	return true, ignoreGone(c.report(ctx, d, state))
}

// ours tells whether a datastore is for this host.
func (c *Controller) ours(d *api.Datastore) bool {
	dir := d.Spec.Directory
	return dir == nil || dir.Node == "" || dir.Node == c.cfg.Node
}

func (c *Controller) forget(name string) {
	c.tidying.forget(name)
	c.cfg.Host.Close(name)
}

// ignoreGone: the object has been deleted, and the informer will say so.
func ignoreGone(err error) error {
	if apierrors.IsNotFound(err) {
		return nil
	}
	return err
}
