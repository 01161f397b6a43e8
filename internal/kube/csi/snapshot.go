package csi

import (
	"context"
	"sync"

	"k8s.io/client-go/tools/cache"

	snapinformers "github.com/kubernetes-csi/external-snapshotter/client/v8/informers/externalversions"
	sidecar "github.com/kubernetes-csi/external-snapshotter/v8/pkg/sidecar-controller"
	"github.com/kubernetes-csi/external-snapshotter/v8/pkg/snapshotter"
)

// snapshotter takes and deletes snapshots that the snapshot controller of the server has asked for.
func (s *sidecars) snapshotter() func(context.Context) {
	factory := snapinformers.NewSharedInformerFactoryWithOptions(s.snapshots, resync, snapinformers.WithTransform(cache.TransformFunc(trim)))
	api := factory.Snapshot().V1()
	groups := factory.Groupsnapshot().V1() // off; nothing is watched
	c := sidecar.NewCSISnapshotSideCarController(
		s.snapshots, s.client, s.cfg.Driver, api.VolumeSnapshotContents(), api.VolumeSnapshotClasses(),
		snapshotter.NewSnapshotter(s.conn), nil, callTimeout, resync,
		"snapshot", -1, "groupsnapshot", -1,
		false, // nothing about the snapshot is passed to the driver
		limiter[string](),
		false, groups.VolumeGroupSnapshotContents(), groups.VolumeGroupSnapshotClasses(), limiter[string](),
	)
	return func(ctx context.Context) {
		factory.Start(ctx.Done())
		var wg sync.WaitGroup
		c.Run(workers, ctx.Done(), &wg)
		wg.Wait()
		factory.Shutdown()
	}
}
