// Package snapshots runs the snapshot controller in the server process, and holds the
// CustomResourceDefinitions of the snapshot API.
//
// It is upstream's common controller, which binds VolumeSnapshots to VolumeSnapshotContents; taking the
// snapshots is the business of internal/kube/csi in the agents. The server role calls Run when the
// definitions are in place. What can go wrong: the API server goes away; everything is tried again.
package snapshots

import (
	"context"
	_ "embed"
	"fmt"
	"sync"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/util/workqueue"

	snapclient "github.com/kubernetes-csi/external-snapshotter/client/v8/clientset/versioned"
	snapscheme "github.com/kubernetes-csi/external-snapshotter/client/v8/clientset/versioned/scheme"
	snapinformers "github.com/kubernetes-csi/external-snapshotter/client/v8/informers/externalversions"
	common "github.com/kubernetes-csi/external-snapshotter/v8/pkg/common-controller"
	"github.com/kubernetes-csi/external-snapshotter/v8/pkg/metrics"
)

//go:generate ./generate.sh

// CRDs are the CustomResourceDefinitions of snapshot.storage.k8s.io as YAML documents.
//
//go:embed crds.yaml
var CRDs []byte

// Numbers that suit one host.
const (
	workers    = 3
	resync     = 15 * time.Minute
	retryFirst = 200 * time.Millisecond
	retryMost  = time.Minute
)

// Run holds until ctx ends. It fails when the kubeconfig cannot be used.
func Run(ctx context.Context, kubeconfig string) error {
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return fmt.Errorf("running the snapshot controller: %w", err)
	}
	config.QPS, config.Burst, config.UserAgent = 50, 100, "atoll-snapshots"
	snapshots, err := snapclient.NewForConfig(config)
	if err != nil {
		return fmt.Errorf("running the snapshot controller: %w", err)
	}
	proto := rest.CopyConfig(config)
	proto.ContentType = runtime.ContentTypeProtobuf
	client, err := kubernetes.NewForConfig(proto)
	if err != nil {
		return fmt.Errorf("running the snapshot controller: %w", err)
	}
	core := informers.NewSharedInformerFactoryWithOptions(client, resync, informers.WithTransform(trim))
	factory := snapinformers.NewSharedInformerFactoryWithOptions(snapshots, resync, snapinformers.WithTransform(trim))
	api, groups := factory.Snapshot().V1(), factory.Groupsnapshot().V1() // groups are off; nothing is watched
	c := common.NewCSISnapshotCommonController(
		snapshots, client, api.VolumeSnapshots(), api.VolumeSnapshotContents(), api.VolumeSnapshotClasses(),
		groups.VolumeGroupSnapshots(), groups.VolumeGroupSnapshotContents(), groups.VolumeGroupSnapshotClasses(),
		core.Core().V1().PersistentVolumeClaims(), core.Core().V1().PersistentVolumes(), nil,
		metrics.NewMetricsManager(), resync, limiter(), limiter(), limiter(), limiter(),
		false, // one agent does all snapshots
		true,  // the mode of a snapshot's volume cannot be changed
		false, // no group snapshots
	)
	core.Start(ctx.Done())
	factory.Start(ctx.Done())
	var wg sync.WaitGroup
	c.Run(workers, ctx.Done(), &wg)
	wg.Wait()
	core.Shutdown()
	factory.Shutdown()
	return nil
}

// Prepare adds the kinds of the snapshot API to those that events can be about. Roles that use them call it
// first of all, before anything else reads the list.
func Prepare() error { return snapscheme.AddToScheme(scheme.Scheme) }

func limiter() workqueue.TypedRateLimiter[string] {
	return workqueue.NewTypedItemExponentialFailureRateLimiter[string](retryFirst, retryMost)
}

// trim removes what nobody reads, which is much of an object.
func trim(obj any) (any, error) {
	if m, ok := obj.(metav1.Object); ok {
		m.SetManagedFields(nil)
	}
	return obj, nil
}
