package csi

import (
	"context"
	"sync"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/informers"
	corelisters "k8s.io/client-go/listers/core/v1"
	storagelisters "k8s.io/client-go/listers/storage/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/util/workqueue"
	csitrans "k8s.io/csi-translation-lib"
	"sigs.k8s.io/sig-storage-lib-external-provisioner/v13/controller"

	"github.com/kubernetes-csi/external-provisioner/v6/pkg/capacity"
	"github.com/kubernetes-csi/external-provisioner/v6/pkg/capacity/topology"
	ctrl "github.com/kubernetes-csi/external-provisioner/v6/pkg/controller"
)

// What hosts wait before they take a claim that no pod has chosen a host for, so that they do not all try.
const (
	takeFirst = 100 * time.Millisecond
	takeMost  = 10 * time.Second
)

// provisioner makes and deletes volumes, says how much room there is, and protects what is being copied.
func (s *sidecars) provisioner(ctx context.Context) func(context.Context) {
	claims := s.factory.Core().V1().PersistentVolumeClaims()
	classes := s.factory.Storage().V1().StorageClasses()
	segments := map[string]string{s.cfg.TopologyKey: s.cfg.Node}
	here := &ctrl.NodeDeployment{
		NodeName:      s.cfg.Node,
		ClaimInformer: claims,
		NodeInfo: &csi.NodeGetInfoResponse{
			NodeId: s.cfg.Node, AccessibleTopology: &csi.Topology{Segments: segments},
		},
		ImmediateBinding: true, BaseDelay: takeFirst, MaxDelay: takeMost,
	}
	nodes, csiNodes := s.onlyThisNode(segments)
	provisioner := ctrl.NewCSIProvisioner(
		s.client, callTimeout, s.cfg.Driver+"-"+s.cfg.Node,
		"pvc", -1, // names of volumes are pvc-<uid of the claim>
		s.conn, s.snapshots, s.cfg.Driver, s.plugin, s.capabilities,
		"",          // no in-tree plugin to migrate from
		true, false, // only this node's topology is passed to the driver
		csitrans.New(), classes.Lister(), csiNodes, nodes, claims.Lister(),
		s.factory.Storage().V1().VolumeAttachments().Lister(),
		nil,  // no data sources from other namespaces
		true, // the driver is told which claim a volume is for
		"",   // the driver chooses the file system
		here,
		false, // the node service sees to read-only
		true,  // the mode of a snapshot's volume cannot be changed
		ctrl.NewInMemoryStore(),
	)
	room, roomInformers, hosts := s.capacity(segments)
	provisioner = capacity.NewProvisionWrapper(provisioner, room)
	volumes := controller.NewProvisionController(ctx, s.client, s.cfg.Driver, provisioner,
		controller.LeaderElection(false),
		controller.FailedProvisionThreshold(0),
		controller.FailedDeleteThreshold(0),
		controller.RateLimiter(limiter[string]()),
		controller.RetryIntervalMax(retryMost),
		controller.Threadiness(workers),
		controller.CreateProvisionedPVLimiter(workqueue.DefaultTypedControllerRateLimiter[string]()),
		controller.ClaimsInformer(claims.Informer()),
		controller.VolumesInformer(s.factory.Core().V1().PersistentVolumes().Informer()),
		controller.ClassesInformer(classes.Informer()),
		controller.AddFinalizer(true),
	)
	clones := ctrl.NewCloningProtectionController(s.client, claims.Lister(), claims.Informer(),
		workqueue.NewTypedRateLimitingQueueWithConfig(limiter[string](), workqueue.TypedRateLimitingQueueConfig[string]{Name: "csi-clones"}),
		s.capabilities)
	snapshots := ctrl.NewSnapshotFinalizerController(s.snapshots, claims.Lister(), s.capabilities, snapshotSweep)
	return func(ctx context.Context) {
		roomInformers.Start(ctx.Done())
		s.factory.WaitForCacheSync(ctx.Done())
		var wg sync.WaitGroup
		wg.Go(func() { hosts.RunWorker(ctx) })
		wg.Go(func() { room.Run(ctx, 1, nil) })
		wg.Go(func() { clones.Run(ctx, 1, nil) })
		wg.Go(func() { snapshots.Run(ctx, nil) })
		volumes.Run(ctx)
		wg.Wait()
	}
}

// onlyThisNode are listers of this host's Node and CSINode as far as topology needs them. Watching all
// nodes to learn what this host knows would be work for nothing.
func (s *sidecars) onlyThisNode(segments map[string]string) (corelisters.NodeLister, storagelisters.CSINodeLister) {
	driver := storagev1.CSINodeDriver{Name: s.cfg.Driver, NodeID: s.cfg.Node, TopologyKeys: []string{s.cfg.TopologyKey}}
	nodes := cache.NewIndexer(cache.MetaNamespaceKeyFunc, cache.Indexers{})
	csiNodes := cache.NewIndexer(cache.MetaNamespaceKeyFunc, cache.Indexers{})
	_ = nodes.Add(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: s.cfg.Node, Labels: segments}})
	_ = csiNodes.Add(&storagev1.CSINode{ObjectMeta: metav1.ObjectMeta{Name: s.cfg.Node}, Spec: storagev1.CSINodeSpec{Drivers: []storagev1.CSINodeDriver{driver}}})
	return corelisters.NewNodeLister(nodes), storagelisters.NewCSINodeLister(csiNodes)
}

// capacity publishes how much room this host has for volumes of each StorageClass.
func (s *sidecars) capacity(segments map[string]string) (*capacity.Controller, informers.SharedInformerFactory, topology.Informer) {
	manager := "external-provisioner-" + s.cfg.Node
	if len(manager) > 63 { // the limit of a label value
		manager = manager[:63]
	}
	factory := informers.NewSharedInformerFactoryWithOptions(s.client, resync, informers.WithNamespace(CapacityNamespace),
		informers.WithTweakListOptions(func(lo *metav1.ListOptions) {
			lo.LabelSelector = labels.Set{capacity.DriverNameLabel: s.cfg.Driver, capacity.ManagedByLabel: manager}.AsSelector().String()
		}))
	var segment topology.Segment
	for key, value := range segments {
		segment = append(segment, topology.SegmentEntry{Key: key, Value: value})
	}
	hosts := topology.NewFixedNodeTopology(&segment)
	queue := workqueue.NewTypedRateLimitingQueueWithConfig(limiter[capacity.QueueKey](), workqueue.TypedRateLimitingQueueConfig[capacity.QueueKey]{Name: "csi-capacity"})
	c := capacity.NewCentralCapacityController(csi.NewControllerClient(s.conn), s.cfg.Driver, capacity.NewV1ClientFactory(s.client), queue,
		nil, manager, CapacityNamespace, hosts, s.factory.Storage().V1().StorageClasses(), factory.Storage().V1().CSIStorageCapacities(),
		capacityEvery, false, callTimeout)
	return c, factory, hosts
}
