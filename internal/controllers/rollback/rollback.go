// Package rollback makes volumes go back to snapshots when the annotation of their PersistentVolume asks for it.
//
// Each host's agent looks after the volumes of its own datastores: an annotation (api/imageregistry's names.go) names
// a snapshot, the Host rolls the volume back, and a second annotation says that it is done, or a third one why it is
// not. The controllers of virtual machines set the first one, while nothing has the volume open; nobody else may,
// which an admission policy sees to. It touches no disk itself: that is the Host's, which the agent implements over
// internal/storage.
//
// What can go wrong: something has the volume open still, or its datastore does not answer. It is tried again until
// it works or the annotation is gone.
package rollback

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/util/workqueue"

	api "atoll.dev/atoll/api/imageregistry/v1alpha1"
)

// Host has volumes.
type Host interface {
	// Has tells whether a volume is on a datastore that is open on this host.
	Has(handle string) bool
	// Rollback makes a volume hold what it held when the snapshot was taken. Both are CSI handles.
	Rollback(ctx context.Context, volume, snapshot string) error
}

// Config of the controller.
type Config struct {
	Client *rest.Config
	// Driver is the name of the CSI driver whose volumes these are.
	Driver string
	Host   Host
	Logger *slog.Logger
}

// Pauses after failures.
const (
	retryFirst = 200 * time.Millisecond
	retryMost  = 5 * time.Second
)

// Controller rolls volumes back.
type Controller struct {
	cfg      Config
	client   kubernetes.Interface
	informer cache.SharedIndexInformer
	queue    workqueue.TypedRateLimitingInterface[string]
}

// New makes a controller. It does not talk to the API server.
func New(cfg Config) (*Controller, error) {
	client, err := kubernetes.NewForConfig(cfg.Client)
	if err != nil {
		return nil, fmt.Errorf("rollback controller: %w", err)
	}
	return newController(cfg, client)
}

func newController(cfg Config, client kubernetes.Interface) (*Controller, error) {
	c := &Controller{
		cfg: cfg, client: client,
		informer: informers.NewSharedInformerFactoryWithOptions(client, 0, informers.WithTransform(trim)).Core().V1().PersistentVolumes().Informer(),
		queue:    workqueue.NewTypedRateLimitingQueue(workqueue.NewTypedItemExponentialFailureRateLimiter[string](retryFirst, retryMost)),
	}
	add := func(obj any) {
		if v, ok := obj.(*corev1.PersistentVolume); ok && asked(v) {
			c.queue.Add(v.Name)
		}
	}
	_, err := c.informer.AddEventHandler(cache.ResourceEventHandlerFuncs{AddFunc: add, UpdateFunc: func(_, obj any) { add(obj) }})
	if err != nil {
		return nil, fmt.Errorf("rollback controller: %w", err)
	}
	return c, nil
}

// trim removes what is not read.
func trim(obj any) (any, error) {
	if v, ok := obj.(*corev1.PersistentVolume); ok {
		v.ManagedFields, v.Spec.NodeAffinity, v.Spec.ClaimRef = nil, nil, nil
	}
	return obj, nil
}

// asked tells whether a volume is to be rolled back.
func asked(v *corev1.PersistentVolume) bool {
	want := v.Annotations[api.RollbackAnnotation]
	return want != "" && want != v.Annotations[api.RolledBackAnnotation]
}

// Run holds until ctx ends.
func (c *Controller) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { c.informer.Run(ctx.Done()) })
	defer context.AfterFunc(ctx, c.queue.ShutDown)()
	if !cache.WaitForCacheSync(ctx.Done(), c.informer.HasSynced) {
		return nil
	}
	for {
		name, stop := c.queue.Get()
		if stop {
			return nil
		}
		if err := c.sync(ctx, name); err != nil && ctx.Err() == nil {
			c.cfg.Logger.Warn("rolling a volume back needs another attempt", "volume", name, "error", err)
			c.queue.AddRateLimited(name)
		} else {
			c.queue.Forget(name)
		}
		c.queue.Done(name)
	}
}

func (c *Controller) sync(ctx context.Context, name string) error {
	obj, ok, err := c.informer.GetStore().GetByKey(name)
	if err != nil || !ok {
		return err
	}
	v, ok := obj.(*corev1.PersistentVolume)
	if !ok || !asked(v) || v.Spec.CSI == nil || v.Spec.CSI.Driver != c.cfg.Driver || !c.cfg.Host.Has(v.Spec.CSI.VolumeHandle) {
		return nil
	}
	// What the informer has may be old, and the volume written to since.
	if v, err = c.client.CoreV1().PersistentVolumes().Get(ctx, name, metav1.GetOptions{}); err != nil || !asked(v) {
		if apierrors.IsNotFound(err) {
			err = nil
		}
		return err
	}
	snapshot := v.Annotations[api.RollbackAnnotation]
	if err := c.cfg.Host.Rollback(ctx, v.Spec.CSI.VolumeHandle, snapshot); err != nil {
		if text := err.Error(); v.Annotations[api.RollbackErrorAnnotation] != text {
			return joined(err, c.annotate(ctx, name, map[string]any{api.RollbackErrorAnnotation: text}))
		}
		return err
	}
	c.cfg.Logger.Info("volume rolled back", "volume", name, "snapshot", snapshot)
	return c.annotate(ctx, name, map[string]any{api.RolledBackAnnotation: snapshot, api.RollbackErrorAnnotation: nil})
}

func joined(err, other error) error {
	if other != nil {
		return fmt.Errorf("%w (and %w)", err, other)
	}
	return err
}

// annotate sets annotations; nil removes one.
func (c *Controller) annotate(ctx context.Context, name string, annotations map[string]any) error {
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"annotations": annotations}})
	if err != nil {
		return fmt.Errorf("encoding annotations of volume %s: %w", name, err)
	}
	_, err = c.client.CoreV1().PersistentVolumes().Patch(ctx, name, types.MergePatchType, patch, metav1.PatchOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("writing annotations of volume %s: %w", name, err)
	}
	return nil
}
