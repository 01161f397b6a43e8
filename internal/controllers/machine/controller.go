// Package machine is the host's side of virtual machines in the API: it passes what the pods of this node's machines
// say to their shims, and writes how the machines are back to the pods.
//
//	annotation atoll.dev/machine --> Host.Apply
//	Host.State --> annotation atoll.dev/machine-state, through pods/status
//
// It does not decide anything about machines: what they are to be is the VirtualMachine controller's to say, in the
// server. Everything here can be rebuilt from pods and shims, so nothing is kept. One goroutine follows each pod; it
// waits at the shim (Host.State) and is woken by changes of the pod. Now and then it also has the host remove what
// machines have kept that do not exist any more.
//
// internal/agent runs it, with the node's own identity, which may change the status of its pods, and another that may
// list virtual machines. What can go wrong: there is no shim (yet, or not any more), which is tried again and again;
// the API server is away, likewise.
package machine

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
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"

	machinev1 "atoll.dev/atoll/api/machine/v1"
)

// Host is the machines of this host. Pods are named by their uid.
type Host interface {
	// State returns how a machine is, once that is another than the revision seen, or after a while. ErrNoShim if
	// there is no shim.
	State(ctx context.Context, pod string, seen int64) (machinev1.State, error)
	Apply(ctx context.Context, pod string, m *machinev1.Machine) error
	// Keepsakes are the uids of machines of which something is kept on the host.
	Keepsakes() ([]string, error)
	// Forget removes what is kept of a machine.
	Forget(uid string) error
}

// Config of the controller.
type Config struct {
	// Client has the identity of the node.
	Client *rest.Config
	Node   string
	Host   Host
	// Machines lists the uids of all VirtualMachines.
	Machines func(context.Context) (map[string]bool, error)
	Logger   *slog.Logger
}

const (
	// tidyEvery is how often the host is tidied; the first time is after tidyFirst, when everything has come up.
	tidyEvery = 5 * time.Minute
	tidyFirst = time.Minute
	// pause is the least time between two writes of a pod's state.
	pause = 500 * time.Millisecond
	// firstRetry is the pause after an attempt that failed; it doubles up to lastRetry.
	firstRetry = 250 * time.Millisecond
	lastRetry  = 5 * time.Second
)

// Controller follows the virtual machines of one host.
type Controller struct {
	cfg      Config
	client   kubernetes.Interface
	informer cache.SharedInformer

	mu        sync.Mutex           // guards the fields below
	followers map[string]*follower // by uid of the pod
	ctx       context.Context      // of Run
	running   sync.WaitGroup
}

// New makes a controller. It does not talk to the API server.
func New(cfg Config) (*Controller, error) {
	client, err := kubernetes.NewForConfig(cfg.Client)
	if err != nil {
		return nil, fmt.Errorf("machine controller: %w", err)
	}
	return newController(cfg, client)
}

func newController(cfg Config, client kubernetes.Interface) (*Controller, error) {
	selector := fields.OneTermEqualSelector("spec.nodeName", cfg.Node).String()
	pods := client.CoreV1().Pods(metav1.NamespaceAll)
	lw := &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			o.FieldSelector = selector
			return pods.List(ctx, o)
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			o.FieldSelector = selector
			return pods.Watch(ctx, o)
		},
	}
	c := &Controller{cfg: cfg, client: client, informer: cache.NewSharedInformer(cache.ToListWatcherWithWatchListSemantics(lw, client), &corev1.Pod{}, 0), followers: map[string]*follower{}}
	if err := c.informer.SetTransform(slim); err != nil {
		return nil, fmt.Errorf("machine controller: %w", err)
	}
	_, err := c.informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    func(obj any) { c.seen(obj) },
		UpdateFunc: func(_, obj any) { c.seen(obj) },
		DeleteFunc: func(obj any) { c.gone(obj) },
	})
	if err != nil {
		return nil, fmt.Errorf("machine controller: %w", err)
	}
	return c, nil
}

// isMachine tells whether a pod is a virtual machine.
func isMachine(pod *corev1.Pod) bool {
	class := pod.Spec.RuntimeClassName
	return class != nil && *class == machinev1.RuntimeClass
}

// slim keeps what is used of a pod, and of pods that are no machines only their names.
func slim(obj any) (any, error) {
	pod, ok := obj.(*corev1.Pod)
	if !ok {
		return obj, nil
	}
	out := &corev1.Pod{
		TypeMeta: pod.TypeMeta,
		ObjectMeta: metav1.ObjectMeta{
			Name: pod.Name, Namespace: pod.Namespace, UID: pod.UID, ResourceVersion: pod.ResourceVersion,
		},
		Spec: corev1.PodSpec{RuntimeClassName: pod.Spec.RuntimeClassName},
	}
	if isMachine(pod) {
		out.Annotations = map[string]string{}
		for _, name := range []string{machinev1.Annotation, machinev1.StateAnnotation} {
			if text, ok := pod.Annotations[name]; ok {
				out.Annotations[name] = text
			}
		}
		out.Status.Phase = pod.Status.Phase
	}
	return out, nil
}

// Run holds until ctx ends.
func (c *Controller) Run(ctx context.Context) error {
	c.mu.Lock()
	c.ctx = ctx
	c.mu.Unlock()
	var wg sync.WaitGroup
	defer wg.Wait()
	defer c.running.Wait()
	wg.Go(func() { c.informer.Run(ctx.Done()) })
	if !cache.WaitForCacheSync(ctx.Done(), c.informer.HasSynced) {
		return nil
	}
	next := time.NewTimer(tidyFirst)
	defer next.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-next.C:
			if err := c.tidy(ctx); err != nil && ctx.Err() == nil {
				c.cfg.Logger.Warn("removing what is left of virtual machines", "error", err)
			}
			next.Reset(tidyEvery)
		}
	}
}

// seen follows a pod, or tells its follower.
func (c *Controller) seen(obj any) {
	pod, ok := obj.(*corev1.Pod)
	if !ok || !isMachine(pod) {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ctx == nil || c.ctx.Err() != nil {
		return
	}
	f := c.followers[string(pod.UID)]
	if f == nil {
		ctx, cancel := context.WithCancel(c.ctx)
		f = &follower{c: c, cancel: cancel, changed: make(chan struct{}, 1)}
		c.followers[string(pod.UID)] = f
		f.update(pod)
		c.running.Go(func() { f.run(ctx) })
		return
	}
	f.update(pod)
}

// gone ends the following of a pod.
func (c *Controller) gone(obj any) {
	if last, ok := obj.(cache.DeletedFinalStateUnknown); ok {
		obj = last.Obj
	}
	pod, ok := obj.(*corev1.Pod)
	if !ok {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if f := c.followers[string(pod.UID)]; f != nil {
		f.cancel()
		delete(c.followers, string(pod.UID))
	}
}

// tidy removes what is kept of machines that do not exist any more. What is kept is listed first: whatever is made
// later belongs to machines that may be missing in the list of machines.
func (c *Controller) tidy(ctx context.Context) error {
	kept, err := c.cfg.Host.Keepsakes()
	if err != nil || len(kept) == 0 {
		return err
	}
	alive, err := c.cfg.Machines(ctx)
	if err != nil {
		return err
	}
	for _, obj := range c.informer.GetStore().List() {
		pod, ok := obj.(*corev1.Pod)
		if !ok || !isMachine(pod) {
			continue
		}
		if m, err := machinev1.Parse([]byte(pod.Annotations[machinev1.Annotation])); err == nil {
			alive[m.UID] = true // it runs here, whatever the list says
		}
	}
	for _, uid := range kept {
		if alive[uid] {
			continue
		}
		if err := c.cfg.Host.Forget(uid); err != nil {
			return err
		}
		c.cfg.Logger.Info("removed what a virtual machine has kept", "uid", uid)
	}
	return nil
}

// write puts the state into a pod.
func (c *Controller) write(ctx context.Context, pod *corev1.Pod, st machinev1.State) error {
	text, err := json.Marshal(st)
	if err != nil {
		return fmt.Errorf("encoding state: %w", err)
	}
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{
		"uid": pod.UID, "annotations": map[string]string{machinev1.StateAnnotation: string(text)},
	}})
	if err != nil {
		return fmt.Errorf("encoding state: %w", err)
	}
	_, err = c.client.CoreV1().Pods(pod.Namespace).Patch(ctx, pod.Name, types.MergePatchType, patch, metav1.PatchOptions{}, "status")
	if apierrors.IsNotFound(err) || apierrors.IsConflict(err) {
		return nil // it is gone, or another one by now
	}
	return err
}
