package encryption

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/dynamic/dynamicinformer"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/metadata/metadatainformer"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"

	api "atoll.dev/atoll/api/encryption/v1alpha1"
	"atoll.dev/atoll/internal/controllers/events"
)

// Host is this host's volumes and keys.
type Host interface {
	// Look returns the encrypted volumes and snapshots of this host. With an error it returns
	// those it found, and there may be others.
	Look(ctx context.Context) ([]Volume, error)
	// Move wraps the keys of a volume that Look has returned for another class.
	Move(ctx context.Context, v Volume, class string) error
	// Rotate wraps the keys of what Look has returned of a class with the class's key, where they are not, and
	// tells how far it is. A class that is an object is namespace/name.
	Rotate(ctx context.Context, class string, told func(State)) State
}

// Volume is an encrypted volume or snapshot.
type Volume struct {
	Index int    // the Host's
	Name  string // for messages
	Class string
	// Claim is namespace/name of the claim that it was made for, and ClaimUID its uid, or both are empty.
	Claim, ClaimUID string
}

// State is how a class is on this host.
type State struct {
	// Provider, KeyID and Fingerprint are the key in use; KeyErr says why there is none.
	Provider, KeyID, Fingerprint string
	KeyErr                       error
	// Volumes of the class, and those that need no other key. VolumeErr says why one does.
	Volumes, Current int
	VolumeErr        error
	// Unseen says why there may be volumes that are not counted; Look has returned it.
	Unseen error
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
	// lookEvery is how often keys are looked at: who may read them may not watch them.
	lookEvery = 20 * time.Second
	// touchAfter collects changes that come in quick succession.
	touchAfter = 500 * time.Millisecond
	// tellEvery is how often progress is written into the status.
	tellEvery = 2 * time.Second
)

// Controller keeps the keys of one host's volumes up to date.
type Controller struct {
	cfg     Config
	client  dynamic.NamespaceableResourceInterface
	classes cache.SharedIndexInformer
	claims  cache.SharedIndexInformer
	nodes   cache.SharedIndexInformer
	node    metadata.Getter
	events  record.EventRecorder
	sink    record.EventBroadcaster
	touched chan struct{}
	// complained is what the log has said already, by class or volume; only Run uses it.
	complained map[string]string
}

// New makes a controller. It does not talk to the API server.
func New(cfg Config) (*Controller, error) {
	client, err := dynamic.NewForConfig(cfg.Client)
	if err != nil {
		return nil, fmt.Errorf("encryption controller: %w", err)
	}
	meta, err := metadata.NewForConfig(cfg.Client)
	if err != nil {
		return nil, fmt.Errorf("encryption controller: %w", err)
	}
	recorder, sink, err := events.Start(cfg.Client, corev1.EventSource{Component: "atoll-encryption", Host: cfg.Node}, api.AddToScheme, corev1.AddToScheme)
	if err != nil {
		return nil, fmt.Errorf("encryption controller: %w", err)
	}
	claims := schema.GroupVersionResource{Version: "v1", Resource: "persistentvolumeclaims"}
	nodes := schema.GroupVersionResource{Version: "v1", Resource: "nodes"}
	c := &Controller{
		cfg:        cfg,
		client:     client.Resource(api.Classes()),
		classes:    dynamicinformer.NewFilteredDynamicInformer(client, api.Classes(), "", 0, cache.Indexers{}, nil).Informer(),
		claims:     metadatainformer.NewFilteredMetadataInformer(meta, claims, "", 0, cache.Indexers{}, nil).Informer(),
		nodes:      metadatainformer.NewFilteredMetadataInformer(meta, nodes, "", 0, cache.Indexers{}, nil).Informer(),
		node:       meta.Resource(nodes),
		events:     recorder,
		sink:       sink,
		touched:    make(chan struct{}, 1),
		complained: map[string]string{},
	}
	for informer, same := range map[cache.SharedIndexInformer]func(old, obj metav1.Object) bool{
		c.classes: func(old, obj metav1.Object) bool { return old.GetGeneration() == obj.GetGeneration() },
		c.claims: func(old, obj metav1.Object) bool {
			return old.GetAnnotations()[api.ClaimAnnotation] == obj.GetAnnotations()[api.ClaimAnnotation]
		},
	} {
		_, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
			AddFunc: func(any) { c.Touch() },
			UpdateFunc: func(old, obj any) {
				a, okA := old.(metav1.Object)
				b, okB := obj.(metav1.Object)
				if !okA || !okB || !same(a, b) {
					c.Touch()
				}
			},
		})
		if err != nil {
			return nil, fmt.Errorf("encryption controller: %w", err)
		}
	}
	if _, err := c.nodes.AddEventHandler(cache.ResourceEventHandlerFuncs{DeleteFunc: func(any) { c.Touch() }}); err != nil {
		return nil, fmt.Errorf("encryption controller: %w", err)
	}
	return c, nil
}

// Touch says that volumes, classes or claims have changed, so that they are looked at soon.
func (c *Controller) Touch() {
	select {
	case c.touched <- struct{}{}:
	default:
	}
}

// Run holds until ctx ends.
func (c *Controller) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	defer c.sink.Shutdown()
	wg.Go(func() { c.classes.Run(ctx.Done()) })
	wg.Go(func() { c.claims.Run(ctx.Done()) })
	wg.Go(func() { c.nodes.Run(ctx.Done()) })
	if !cache.WaitForCacheSync(ctx.Done(), c.classes.HasSynced, c.claims.HasSynced, c.nodes.HasSynced) {
		return nil
	}
	for {
		c.pass(ctx)
		timer := time.NewTimer(lookEvery)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-timer.C:
		case <-c.touched:
			timer.Reset(touchAfter)
			select {
			case <-ctx.Done():
				timer.Stop()
				return nil
			case <-timer.C:
			}
		}
	}
}

// pass looks at everything once.
func (c *Controller) pass(ctx context.Context) {
	volumes, unseen := c.cfg.Host.Look(ctx)
	if ctx.Err() != nil {
		return
	}
	c.complain("volumes", unseen)
	for n := range volumes {
		c.follow(ctx, &volumes[n])
	}
	todo := map[string]*api.EncryptionClass{}
	for _, v := range volumes {
		todo[v.Class] = nil
	}
	for _, obj := range c.classes.GetStore().List() {
		class := &api.EncryptionClass{}
		u, ok := obj.(*unstructured.Unstructured)
		if !ok {
			continue
		}
		if err := runtime.DefaultUnstructuredConverter.FromUnstructured(u.Object, class); err != nil {
			c.complain(u.GetNamespace()+"/"+u.GetName(), err)
			continue
		}
		class.TypeMeta = metav1.TypeMeta{APIVersion: api.GroupVersion().String(), Kind: "EncryptionClass"}
		todo[class.Namespace+"/"+class.Name] = class
	}
	for _, name := range slices.Sorted(maps.Keys(todo)) {
		if ctx.Err() != nil {
			return
		}
		c.sync(ctx, name, todo[name], unseen)
	}
}

// sync brings the volumes of a class that were seen up to date and says so in its status, if it is an object.
func (c *Controller) sync(ctx context.Context, name string, class *api.EncryptionClass, unseen error) {
	last := time.Now()
	state := c.cfg.Host.Rotate(ctx, name, func(s State) {
		if class != nil && s.Current < s.Volumes && time.Since(last) > tellEvery {
			last, s.Unseen = time.Now(), unseen
			c.complain(name+" status", c.report(ctx, class, s))
		}
	})
	if class == nil {
		c.complain(name, errors.Join(state.KeyErr, state.VolumeErr))
		return
	}
	state.Unseen = unseen
	if ctx.Err() == nil {
		c.complain(name+" status", c.report(ctx, class, state))
	}
}

// follow moves a volume to the class that its claim names by now.
func (c *Controller) follow(ctx context.Context, v *Volume) {
	if v.Claim == "" {
		return
	}
	obj, ok, err := c.claims.GetStore().GetByKey(v.Claim)
	if err != nil || !ok {
		return
	}
	claim, ok := obj.(*metav1.PartialObjectMetadata)
	name := ""
	if ok && string(claim.UID) == v.ClaimUID {
		name = claim.Annotations[api.ClaimAnnotation]
	}
	if name == "" || v.Class == claim.Namespace+"/"+name {
		return
	}
	class := claim.Namespace + "/" + name
	ref := &corev1.ObjectReference{APIVersion: "v1", Kind: "PersistentVolumeClaim", Namespace: claim.Namespace, Name: claim.Name, UID: claim.UID}
	if strings.Contains(name, "/") {
		err = fmt.Errorf("annotation %q is %q, and must be the name of an EncryptionClass in this namespace", api.ClaimAnnotation, name)
	} else {
		err = c.cfg.Host.Move(ctx, *v, class)
	}
	if err != nil {
		if c.complain(v.Name, err) {
			c.events.Eventf(ref, corev1.EventTypeWarning, "EncryptionClassInvalid", "the volume stays with class %s: %v", v.Class, err)
		}
		return
	}
	c.complain(v.Name, nil)
	c.events.Eventf(ref, corev1.EventTypeNormal, "EncryptionClassChanged", "the key of the volume is wrapped for class %s now, not %s any more", class, v.Class)
	v.Class = class
}

// complain logs an error once, and tells whether it has.
func (c *Controller) complain(about string, err error) bool {
	text := ""
	if err != nil {
		text = err.Error()
	}
	if c.complained[about] == text {
		return false
	}
	if text == "" {
		delete(c.complained, about)
		return false
	}
	c.complained[about] = text
	c.cfg.Logger.Warn("encryption needs attention", "about", about, "error", err)
	return true
}
