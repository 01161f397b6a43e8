package namespacebounds

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/dynamic/dynamicinformer"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	corelisters "k8s.io/client-go/listers/core/v1"
	nodelisters "k8s.io/client-go/listers/node/v1"
	storagelisters "k8s.io/client-go/listers/storage/v1"
	"k8s.io/client-go/tools/cache"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
)

// kindEvery is how often it is looked whether the API server has the kind SupervisorNamespace yet.
const kindEvery = 500 * time.Millisecond

// Source is what the instances of the plugin know: there is one in each of the servers in the API server.
type Source struct {
	once    sync.Once
	client  kubernetes.Interface
	dynamic dynamic.Interface

	bounds     cache.SharedIndexInformer
	namespaces corelisters.NamespaceLister
	nodes      corelisters.NodeLister
	classes    nodelisters.RuntimeClassLister
	storage    storagelisters.StorageClassLister
	ledger     *ledger

	synced       []cache.InformerSynced
	boundsSynced cache.InformerSynced

	// absent is set while there is no kind SupervisorNamespace, as before the first start is done.
	absent atomic.Bool
}

// NewSource returns a source that still needs its clients and informers, and to be run.
func NewSource() *Source { return &Source{ledger: newLedger()} }

// informers takes on the caches of the API server, once.
func (s *Source) informers(f informers.SharedInformerFactory) {
	s.once.Do(func() {
		namespaces, nodes, pods := f.Core().V1().Namespaces(), f.Core().V1().Nodes(), f.Core().V1().Pods()
		classes, storage := f.Node().V1().RuntimeClasses(), f.Storage().V1().StorageClasses()
		s.namespaces, s.nodes, s.classes, s.storage = namespaces.Lister(), nodes.Lister(), classes.Lister(), storage.Lister()
		s.synced = []cache.InformerSynced{
			namespaces.Informer().HasSynced, classes.Informer().HasSynced, storage.Informer().HasSynced,
			watch(nodes.Informer(), s.ledger.node, s.ledger.nodeGone),
			watch(pods.Informer(), s.ledger.pod, s.ledger.podGone),
		}
	})
}

// watch hands the objects of an informer over, and returns what tells whether all there were have been.
func watch(informer cache.SharedIndexInformer, changed, gone func(any)) cache.InformerSynced {
	registration, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    changed,
		UpdateFunc: func(_, obj any) { changed(obj) },
		DeleteFunc: func(obj any) {
			if last, ok := obj.(cache.DeletedFinalStateUnknown); ok {
				obj = last.Obj
			}
			gone(obj)
		},
	})
	if err != nil { // the informer has been stopped: nothing is admitted any more
		return func() bool { return false }
	}
	return registration.HasSynced
}

// setDynamic takes on the client that SupervisorNamespaces are watched by, once.
func (s *Source) setDynamic(client dynamic.Interface) {
	if s.bounds != nil {
		return
	}
	s.dynamic = client
	s.bounds = dynamicinformer.NewFilteredDynamicInformer(client, atoll.SupervisorNamespaces(), "", 0, cache.Indexers{}, nil).Informer()
	s.boundsSynced = watch(s.bounds, s.ledger.reserve, s.ledger.reserveGone)
	if err := s.bounds.SetTransform(compact); err != nil { // it runs already, and would hold something else
		s.boundsSynced = func() bool { return false }
	}
}

// compact makes a SupervisorNamespace of what the API server sends, without what admission does not need.
func compact(obj any) (any, error) {
	u, ok := obj.(*unstructured.Unstructured)
	if !ok {
		return obj, nil
	}
	return decode(u)
}

func decode(u *unstructured.Unstructured) (*atoll.SupervisorNamespace, error) {
	var b atoll.SupervisorNamespace
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(u.Object, &b); err != nil {
		return nil, fmt.Errorf("reading SupervisorNamespace %s: %w", u.GetName(), err)
	}
	b.ObjectMeta = metav1.ObjectMeta{Name: b.Name, UID: b.UID, ResourceVersion: b.ResourceVersion}
	b.Spec = *b.EffectiveSpec()
	b.Spec.Description, b.Status = "", atoll.SupervisorNamespaceStatus{}
	return &b, nil
}

// Run watches SupervisorNamespaces until ctx ends. Before the kind is there, there is nothing to bound.
func (s *Source) Run(ctx context.Context) {
	err := wait.PollUntilContextCancel(ctx, kindEvery, true, func(ctx context.Context) (bool, error) {
		_, err := s.dynamic.Resource(atoll.SupervisorNamespaces()).List(ctx, metav1.ListOptions{Limit: 1})
		if apierrors.IsNotFound(err) {
			s.absent.Store(true)
		}
		return err == nil, nil
	})
	if err != nil {
		return
	}
	s.absent.Store(false)
	s.bounds.RunWithContext(ctx)
}

// ready tells whether everything is known.
func (s *Source) ready() bool {
	for _, synced := range s.synced {
		if !synced() {
			return false
		}
	}
	return s.absent.Load() || s.boundsSynced()
}

// errUnknown is wrapped when it cannot be told what bounds a namespace.
var errUnknown = errors.New("what bounds the namespace is not known")

// of is the SupervisorNamespace of a namespace, nil if it has none.
func (s *Source) of(ctx context.Context, namespace string) (*atoll.SupervisorNamespace, error) {
	if obj, ok, err := s.bounds.GetStore().GetByKey(namespace); err == nil && ok {
		if b, ok := obj.(*atoll.SupervisorNamespace); ok {
			return b, nil
		}
	}
	ns, err := s.namespaces.Get(namespace)
	if apierrors.IsNotFound(err) { // the cache may lag behind a namespace made a moment ago
		ns, err = s.client.CoreV1().Namespaces().Get(ctx, namespace, metav1.GetOptions{})
	}
	if apierrors.IsNotFound(err) {
		return nil, nil // NamespaceLifecycle refuses what would be in it
	}
	if err != nil {
		return nil, fmt.Errorf("%w: reading namespace %s: %w", errUnknown, namespace, err)
	}
	return s.labelled(ctx, ns)
}

// labelled reads the SupervisorNamespace of a Namespace past the cache, if it has the label of one.
func (s *Source) labelled(ctx context.Context, ns *corev1.Namespace) (*atoll.SupervisorNamespace, error) {
	if ns.Labels[atoll.SupervisorNamespaceLabel] == "" {
		return nil, nil
	}
	u, err := s.dynamic.Resource(atoll.SupervisorNamespaces()).Get(ctx, ns.Name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil, fmt.Errorf("%w: namespace %q has the label %s, but there is no SupervisorNamespace %s; an administrator makes it or removes the label",
			errUnknown, ns.Name, atoll.SupervisorNamespaceLabel, ns.Name)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: reading SupervisorNamespace %s: %w", errUnknown, ns.Name, err)
	}
	return decode(u)
}
