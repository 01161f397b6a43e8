package rig

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"atoll.dev/atoll/internal/pool/wire"
)

const (
	// Namespace is where everything is that the bench makes, apart from namespaces.
	Namespace    = "atoll-bench"
	busyboxImage = "docker.io/library/busybox:latest"
	benchImage   = "atoll.dev/bench:latest"
)

// Host is the supervisor under measurement.
type Host struct {
	Options Options
	Kube    kubernetes.Interface
	REST    *rest.Config // for Kube
	cri     cri.RuntimeServiceClient
	conn    *grpc.ClientConn // for cri
	seq     int              // of the last sandbox
}

// New connects to the supervisor and makes the namespace of the bench. Close has to be called in the end.
func New(o Options) (*Host, error) {
	conn, err := grpc.NewClient("unix://"+filepath.Join(o.RunDir, "containerd.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, fmt.Errorf("connecting to containerd: %w", err)
	}
	config, err := clientcmd.BuildConfigFromFlags("", filepath.Join(o.DataDir, "admin.kubeconfig"))
	if err != nil {
		return nil, fmt.Errorf("reading the kubeconfig: %w", err)
	}
	config.QPS, config.Burst = 500, 1000
	kube, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, err
	}
	h := &Host{Options: o, cri: cri.NewRuntimeServiceClient(conn), conn: conn, Kube: kube, REST: config}
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: Namespace, Labels: map[string]string{"atoll.dev/host-access": "allowed"}}}
	if _, err := kube.CoreV1().Namespaces().Create(context.Background(), ns, metav1.CreateOptions{}); err != nil && !apierrors.IsAlreadyExists(err) {
		return nil, fmt.Errorf("creating namespace %s: %w", Namespace, err)
	}
	return h, nil
}

// Close deletes the namespace of the bench, with all that is in it, without waiting for that.
func (h *Host) Close() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	_ = h.Kube.CoreV1().Namespaces().Delete(ctx, Namespace, metav1.DeleteOptions{})
	_ = h.conn.Close()
	removeCgroup(benchCgroup)
}

// PoolStatus is how many micro-VMs wait for pods, and how many should.
func (h *Host) PoolStatus(ctx context.Context) (wire.Status, error) {
	return wire.GetStatus(ctx, filepath.Join(h.Options.RunDir, "pool.sock"))
}

// FullPool waits until the warm pool is full again, so that a sample is a hit.
func (h *Host) FullPool(ctx context.Context) error {
	for range 600 {
		status, err := h.PoolStatus(ctx)
		if err == nil && status.Ready >= status.Wanted {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(100 * time.Millisecond):
		}
	}
	return errors.New("the warm pool did not fill within a minute")
}

// WithoutKubelet measures while the agent stands still: its kubelet ends pods that it did not start.
func WithoutKubelet(run Part) Part {
	return func(ctx context.Context, h *Host) ([]Row, error) {
		out, err := exec.Command("pgrep", "-f", "^atoll agent --data-dir="+h.Options.DataDir).Output()
		if err != nil {
			return nil, fmt.Errorf("looking for the agent: %w", err)
		}
		pid, err := strconv.Atoi(strings.TrimSpace(string(out)))
		if err != nil {
			return nil, fmt.Errorf("looking for the agent: %w", err)
		}
		if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
			return nil, fmt.Errorf("stopping the agent: %w", err)
		}
		defer func() { _ = syscall.Kill(pid, syscall.SIGCONT) }()
		return run(ctx, h)
	}
}
