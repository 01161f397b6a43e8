package csi

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/util/workqueue"

	"github.com/kubernetes-csi/csi-lib-utils/rpc"
	snapclient "github.com/kubernetes-csi/external-snapshotter/client/v8/clientset/versioned"

	"atoll.dev/atoll/internal/kube/csi/gates"
)

// Config of the sidecars.
type Config struct {
	// Kubeconfig is a file with the identity that the sidecars have.
	Kubeconfig string
	// Driver is the name of the driver, Socket the absolute path of its socket.
	Driver string
	Socket string
	// Node is this host's Node, and the driver's id of it. TopologyKey is the label that the driver calls it
	// by.
	Node        string
	TopologyKey string
	// RegistryDir is where the kubelet looks for sockets of plugins.
	RegistryDir string
	Logger      *slog.Logger
}

// Numbers that suit one host. The sidecars' own defaults are made for hundreds.
const (
	workers = 5
	// callTimeout is how long a call of the driver may take. A call that takes longer goes on; it is made
	// again and then waits for the first.
	callTimeout = 30 * time.Second
	retryFirst  = 200 * time.Millisecond
	retryMost   = 30 * time.Second
	resync      = 15 * time.Minute
	// capacityEvery is how often the room on datastores is looked at when nothing is created or deleted.
	capacityEvery = time.Minute
	// snapshotSweep is how often finalizers of snapshots are looked after.
	snapshotSweep = 10 * time.Minute
)

// CapacityNamespace is where the CSIStorageCapacity objects are.
const CapacityNamespace = "kube-system"

// sidecars is what they share.
type sidecars struct {
	cfg          Config
	rest         *rest.Config
	client       kubernetes.Interface
	snapshots    snapclient.Interface
	conn         *grpc.ClientConn
	factory      informers.SharedInformerFactory
	plugin       rpc.PluginCapabilitySet
	capabilities rpc.ControllerCapabilitySet
}

// Run holds until ctx ends. It fails when the kubeconfig cannot be used.
func Run(ctx context.Context, cfg Config) error {
	if gates.Registered != nil {
		return fmt.Errorf("running csi sidecars: %w", gates.Registered)
	}
	s := &sidecars{cfg: cfg}
	if err := s.connect(); err != nil {
		return fmt.Errorf("running csi sidecars: %w", err)
	}
	defer func() { _ = s.conn.Close() }()
	if err := s.askDriver(ctx); err != nil {
		return nil // ctx ended
	}
	// The controllers below register what they watch, so the informers start after them.
	run := []func(context.Context){s.provisioner(ctx), s.attacher(), s.snapshotter()}
	resize, err := s.resizer()
	if err != nil {
		return fmt.Errorf("running csi sidecars: %w", err)
	}
	run = append(run, resize)
	s.factory.Start(ctx.Done())
	var wg sync.WaitGroup
	var registered error
	wg.Go(func() { registered = s.register(ctx) })
	for _, r := range run {
		wg.Go(func() { r(ctx) })
	}
	wg.Wait()
	s.factory.Shutdown()
	if ctx.Err() != nil {
		return nil
	}
	return errors.Join(errors.New("csi sidecars ended by themselves"), registered)
}

func (s *sidecars) connect() error {
	var err error
	if s.rest, err = clientcmd.BuildConfigFromFlags("", s.cfg.Kubeconfig); err != nil {
		return err
	}
	s.rest.QPS, s.rest.Burst = 100, 200
	s.rest.UserAgent = "atoll-storage"
	proto := rest.CopyConfig(s.rest)
	proto.ContentType = runtime.ContentTypeProtobuf
	if s.client, err = kubernetes.NewForConfig(proto); err != nil {
		return err
	}
	if s.snapshots, err = snapclient.NewForConfig(s.rest); err != nil {
		return err
	}
	s.factory = informers.NewSharedInformerFactoryWithOptions(s.client, resync, informers.WithTransform(trim))
	s.conn, err = grpc.NewClient("unix://"+s.cfg.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithIdleTimeout(0))
	return err
}

// trim removes what no sidecar reads, which is most of an object.
func trim(obj any) (any, error) {
	if m, ok := obj.(metav1.Object); ok {
		m.SetManagedFields(nil)
	}
	return obj, nil
}

// askDriver waits for the driver and learns what it can do.
func (s *sidecars) askDriver(ctx context.Context) error {
	return wait.PollUntilContextCancel(ctx, retryFirst, true, func(ctx context.Context) (bool, error) {
		ctx, cancel := context.WithTimeout(ctx, callTimeout)
		defer cancel()
		var err error
		if s.plugin, err = rpc.GetPluginCapabilities(ctx, s.conn); err != nil {
			return false, nil
		}
		s.capabilities, err = rpc.GetControllerCapabilities(ctx, s.conn)
		return err == nil, nil
	})
}

// limiter makes the pauses between attempts.
func limiter[T comparable]() workqueue.TypedRateLimiter[T] {
	return workqueue.NewTypedItemExponentialFailureRateLimiter[T](retryFirst, retryMost)
}
