package rig

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"atoll.dev/atoll/internal/linux/cgroup"
)

// Sandbox is one pod at the level of CRI.
type Sandbox struct {
	id     string
	config *cri.PodSandboxConfig
}

// StartCRI runs a pod with one sleeping container and returns when it runs.
func (h *Host) StartCRI(ctx context.Context, runtime string) (*Sandbox, time.Duration, error) {
	h.seq++
	name := fmt.Sprintf("bench-%s-%d-%d", runtime, os.Getpid(), h.seq)
	config := &cri.PodSandboxConfig{
		Metadata:     &cri.PodSandboxMetadata{Name: name, Uid: name, Namespace: Namespace},
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
	s := &Sandbox{id: run.PodSandboxId, config: config}
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
		h.StopCRI(s)
		return nil, 0, fmt.Errorf("starting a %s container: %w", runtime, err)
	}
	return s, took, nil
}

// StopCRI stops and removes a pod of StartCRI, with its log and its cgroups. What it fails to remove stays, without an error.
func (h *Host) StopCRI(s *Sandbox) {
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
