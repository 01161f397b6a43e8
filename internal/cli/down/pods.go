package down

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// stopPods ends all pods through containerd, so that containers get SIGTERM
// and the time to act on it, and networks and disks are given back in order.
// Without a containerd that answers, the later steps do it the hard way.
func (d *Down) stopPods(ctx context.Context) (string, error) {
	socket := d.cfg.Tree.ContainerdSocket()
	probe, err := net.DialTimeout("unix", socket, time.Second)
	if err != nil {
		return "", nil // nobody listens
	}
	if err := probe.Close(); err != nil {
		return "", fmt.Errorf("connecting to containerd: %w", err)
	}
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return "", fmt.Errorf("connecting to containerd: %w", err)
	}
	defer conn.Close()
	cri := runtime.NewRuntimeServiceClient(conn)
	ctx, cancel := context.WithTimeout(ctx, d.cfg.Grace+time.Minute)
	defer cancel()
	list, err := cri.ListPodSandbox(ctx, &runtime.ListPodSandboxRequest{})
	if err != nil {
		d.cfg.Logger.Warn("containerd does not answer, pods are ended without notice", "error", err)
		return "", nil
	}
	errs := make([]error, len(list.Items))
	limit := make(chan struct{}, 16)
	var wg sync.WaitGroup
	for i, pod := range list.Items {
		wg.Go(func() {
			limit <- struct{}{}
			defer func() { <-limit }()
			if err := d.stopPod(ctx, cri, pod.Id); err != nil {
				errs[i] = fmt.Errorf("pod %s/%s: %w", pod.GetMetadata().GetNamespace(), pod.GetMetadata().GetName(), err)
			}
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		d.cfg.Logger.Warn("some pods are ended without notice", "error", err)
	}
	if len(list.Items) == 0 {
		return "", nil
	}
	return fmt.Sprintf("%d pods stopped", len(list.Items)), nil
}

// stopPod stops the containers of a pod with notice, then removes the pod.
func (d *Down) stopPod(ctx context.Context, cri runtime.RuntimeServiceClient, id string) error {
	containers, err := cri.ListContainers(ctx, &runtime.ListContainersRequest{Filter: &runtime.ContainerFilter{
		PodSandboxId: id,
		State:        &runtime.ContainerStateValue{State: runtime.ContainerState_CONTAINER_RUNNING},
	}})
	if err != nil {
		return fmt.Errorf("listing containers: %w", err)
	}
	var wg sync.WaitGroup
	errs := make([]error, len(containers.Containers))
	for i, c := range containers.Containers {
		wg.Go(func() {
			_, errs[i] = cri.StopContainer(ctx, &runtime.StopContainerRequest{
				ContainerId: c.Id, Timeout: int64(d.cfg.Grace.Seconds()),
			})
		})
	}
	wg.Wait()
	if _, err := cri.StopPodSandbox(ctx, &runtime.StopPodSandboxRequest{PodSandboxId: id}); err != nil {
		return errors.Join(append(errs, err)...)
	}
	_, err = cri.RemovePodSandbox(ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: id})
	return err
}
