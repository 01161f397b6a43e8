package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"atoll.dev/atoll/internal/linux/cgroup"
	"atoll.dev/atoll/internal/pool/wire"
)

const (
	benchNamespace = "atoll-bench"
	busyboxImage   = "docker.io/library/busybox:latest"
	benchImage     = "atoll.dev/bench:latest"
)

// host is the supervisor under measurement.
type host struct {
	o    options
	cri  cri.RuntimeServiceClient
	conn *grpc.ClientConn
	kube kubernetes.Interface
	rest *rest.Config // for kube
	seq  int
}

func newHost(o options) (*host, error) {
	conn, err := grpc.NewClient("unix://"+filepath.Join(o.runDir, "containerd.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, fmt.Errorf("connecting to containerd: %w", err)
	}
	config, err := clientcmd.BuildConfigFromFlags("", filepath.Join(o.dataDir, "admin.kubeconfig"))
	if err != nil {
		return nil, fmt.Errorf("reading the kubeconfig: %w", err)
	}
	config.QPS, config.Burst = 500, 1000
	kube, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, err
	}
	h := &host{o: o, cri: cri.NewRuntimeServiceClient(conn), conn: conn, kube: kube, rest: config}
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: benchNamespace, Labels: map[string]string{"atoll.dev/host-access": "allowed"}}}
	if _, err := kube.CoreV1().Namespaces().Create(context.Background(), ns, metav1.CreateOptions{}); err != nil && !apierrors.IsAlreadyExists(err) {
		return nil, fmt.Errorf("creating namespace %s: %w", benchNamespace, err)
	}
	return h, nil
}

func (h *host) close() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	_ = h.kube.CoreV1().Namespaces().Delete(ctx, benchNamespace, metav1.DeleteOptions{})
	_ = h.conn.Close()
	removeCgroup(benchCgroup)
}

func (h *host) poolStatus(ctx context.Context) (wire.Status, error) {
	return wire.GetStatus(ctx, filepath.Join(h.o.runDir, "pool.sock"))
}

// fullPool waits until the warm pool is full again, so that a sample is a hit.
func (h *host) fullPool(ctx context.Context) error {
	for range 600 {
		status, err := h.poolStatus(ctx)
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

// withoutKubelet measures while the agent stands still: its kubelet ends pods that it did not start.
func withoutKubelet(run func(context.Context, *host) ([]Row, error)) func(context.Context, *host) ([]Row, error) {
	return func(ctx context.Context, h *host) ([]Row, error) {
		out, err := exec.Command("pgrep", "-f", "^atoll agent --data-dir="+h.o.dataDir).Output()
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

// sandbox is one pod at the level of CRI.
type sandbox struct {
	id     string
	config *cri.PodSandboxConfig
}

// startCRI runs a pod with one sleeping container and returns when it runs.
func (h *host) startCRI(ctx context.Context, runtime string) (*sandbox, time.Duration, error) {
	h.seq++
	name := fmt.Sprintf("bench-%s-%d-%d", runtime, os.Getpid(), h.seq)
	config := &cri.PodSandboxConfig{
		Metadata:     &cri.PodSandboxMetadata{Name: name, Uid: name, Namespace: benchNamespace},
		Hostname:     "bench",
		LogDirectory: "/tmp",
		DnsConfig:    &cri.DNSConfig{},
		Linux: &cri.LinuxPodSandboxConfig{
			CgroupParent:    podCgroup(name),
			SecurityContext: &cri.LinuxSandboxSecurityContext{NamespaceOptions: &cri.NamespaceOption{Pid: cri.NamespaceMode_CONTAINER}},
		},
	}
	if err := makePodCgroup(name); err != nil {
		return nil, 0, err
	}
	begin := time.Now()
	run, err := h.cri.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: config, RuntimeHandler: runtime})
	if err != nil {
		return nil, 0, fmt.Errorf("running a %s sandbox: %w", runtime, err)
	}
	s := &sandbox{id: run.PodSandboxId, config: config}
	created, err := h.cri.CreateContainer(ctx, &cri.CreateContainerRequest{PodSandboxId: s.id, SandboxConfig: config, Config: &cri.ContainerConfig{
		Metadata: &cri.ContainerMetadata{Name: "main"},
		Image:    &cri.ImageSpec{Image: busyboxImage, RuntimeHandler: runtime},
		Command:  []string{"sleep", "100000"},
		LogPath:  name + ".log",
		Linux: &cri.LinuxContainerConfig{SecurityContext: &cri.LinuxContainerSecurityContext{
			NamespaceOptions: &cri.NamespaceOption{Pid: cri.NamespaceMode_CONTAINER},
		}},
	}})
	if err == nil {
		_, err = h.cri.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: created.ContainerId})
	}
	took := time.Since(begin)
	if err != nil {
		h.stopCRI(s)
		return nil, 0, fmt.Errorf("starting a %s container: %w", runtime, err)
	}
	return s, took, nil
}

func (h *host) stopCRI(s *sandbox) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	_, _ = h.cri.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: s.id})
	_, _ = h.cri.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: s.id})
	name := s.config.Metadata.Name
	_ = os.Remove(filepath.Join("/tmp", name+".log"))
	removeCgroup(podCgroup(name))
}

func removeCgroup(path string) {
	groups, _ := cgroup.Find(strings.TrimPrefix(path, "/"))
	for _, group := range groups {
		_ = cgroup.Remove(group)
	}
}

// benchCgroup holds the pods that the bench starts itself. They cannot be with the others: the kubelet
// removes the groups of pods it does not know.
const benchCgroup = "/atoll-bench"

func podCgroup(name string) string { return benchCgroup + "/pod" + name }

// makePodCgroup does what the kubelet does before it asks for a sandbox.
func makePodCgroup(name string) error {
	others, err := cgroup.Find("kubepods")
	if err != nil {
		return err
	}
	for _, other := range others {
		root := filepath.Dir(other)
		for _, group := range []string{root + benchCgroup, root + podCgroup(name)} {
			// Where cgroup v2 has subtree_control, controllers have to be passed on.
			_ = os.WriteFile(filepath.Join(filepath.Dir(group), "cgroup.subtree_control"), []byte("+cpuset +cpu +memory +pids"), 0o644)
			if err := os.MkdirAll(group, 0o755); err != nil {
				return fmt.Errorf("making a cgroup for pods: %w", err)
			}
			for _, file := range []string{"cpuset.cpus", "cpuset.mems"} { // empty at first in cgroup v1
				if inherited, err := os.ReadFile(filepath.Join(filepath.Dir(group), file)); err == nil {
					_ = os.WriteFile(filepath.Join(group, file), inherited, 0o644)
				}
			}
		}
	}
	return nil
}
