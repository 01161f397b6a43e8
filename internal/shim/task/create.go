package task

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	apievents "github.com/containerd/containerd/api/events"
	api "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	guestv1 "atoll.dev/atoll/api/guest/v1"
	"atoll.dev/atoll/internal/datadir/handover"
	"atoll.dev/atoll/internal/guest/channel"
	"atoll.dev/atoll/internal/guest/flatspec"
	"atoll.dev/atoll/internal/shim/seccomp"
	"atoll.dev/atoll/internal/shim/spec"
	"atoll.dev/atoll/internal/shim/stdio"
	"atoll.dev/atoll/internal/shim/timing"
	"atoll.dev/atoll/internal/shim/volumes"
	"atoll.dev/atoll/internal/supervise/undo"
)

// prepareTimeout bounds what Create leaves to be done.
const prepareTimeout = 2 * time.Minute

// Create takes a container on. It returns when the host's part is checked; the guest's part goes on while
// containerd gets ready to start the container. Start waits for it and returns its error.
func (s *Service) Create(ctx context.Context, r *api.CreateTaskRequest) (*api.CreateTaskResponse, error) {
	c, err := s.create(ctx, r)
	if err != nil {
		return nil, errgrpc.ToGRPC(fmt.Errorf("creating container in micro-VM: %w", err))
	}
	s.cfg.Events.Publish(&apievents.TaskCreate{
		ContainerID: r.ID, Bundle: r.Bundle, Rootfs: r.Rootfs, Pid: c.init.pid,
		IO: &apievents.TaskIO{Stdin: r.Stdin, Stdout: r.Stdout, Stderr: r.Stderr, Terminal: r.Terminal},
	})
	return &api.CreateTaskResponse{Pid: c.init.pid}, nil
}

func (s *Service) create(ctx context.Context, r *api.CreateTaskRequest) (_ *container, err error) {
	pod, err := s.running()
	if err != nil {
		return nil, err
	}
	if r.Checkpoint != "" {
		return nil, fmt.Errorf("restoring a checkpoint: %w", errdefs.ErrNotImplemented)
	}
	rootfs, err := rootOf(r.Rootfs)
	if err != nil {
		return nil, err
	}
	c := &container{
		id: r.ID, bundle: r.Bundle, usage: rootfs.usage, execs: map[string]*process{}, prepared: make(chan struct{}),
	}
	if err := s.reserve(c); err != nil {
		return nil, err
	}
	var stack undo.Stack
	defer func() { err = stack.Unwind(err) }()
	stack.Push("forgetting container", func() error {
		s.forget(c.id)
		return nil
	})
	steps := s.cfg.Steps.Begin("create")
	oci, err := read(c.bundle)
	if err != nil {
		return nil, err
	}
	c.limits, c.privileged = limitsOf(oci.Linux.Resources), spec.Privileged(oci)
	if c.seccomp, err = compile(oci.Linux.Seccomp); err != nil {
		return nil, err
	}
	p := newProcess("", s.newPID(), stdio.Config{Stdin: r.Stdin, Stdout: r.Stdout, Stderr: r.Stderr, Terminal: r.Terminal})
	if p.io, err = stdio.Open(p.config); err != nil {
		return nil, err
	}
	stack.Push("closing stdio", func() error {
		p.io.Close()
		return nil
	})
	preparing, giveUp := context.WithTimeout(context.WithoutCancel(ctx), prepareTimeout)
	c.giveUp = giveUp
	if err := s.enter(c, p); err != nil {
		giveUp()
		return nil, err
	}
	stack.Release()
	steps.Done("host")
	go s.prepare(preparing, pod, c, oci, rootfs.image, steps)
	return c, nil
}

// prepare does what is to be done in the guest before the container can be started.
func (s *Service) prepare(ctx context.Context, pod *Pod, c *container, oci *specs.Spec, image string, steps *timing.Phase) {
	defer c.giveUp()
	defer close(c.prepared)
	if c.failed = s.prepareGuest(ctx, pod, c, oci, image, steps); c.failed != nil {
		c.failed = fmt.Errorf("creating container in micro-VM: %w", c.failed)
	}
}

func (s *Service) prepareGuest(ctx context.Context, pod *Pod, c *container, oci *specs.Spec, image string, steps *timing.Phase) (err error) {
	var stack undo.Stack
	defer func() { err = stack.Unwind(err) }()
	if err := pod.Ready(ctx); err != nil {
		return err
	}
	steps.Done("guest set up")
	if err := s.provide(ctx, pod, c, oci, image, &stack); err != nil {
		return err
	}
	steps.Done("image and volumes")
	if err := s.createInGuest(ctx, pod, c, c.init, oci, &stack); err != nil {
		return err
	}
	steps.Done("guest")
	stack.Release()
	return nil
}

// reserve takes the id.
func (s *Service) reserve(c *container) error {
	if !channel.ValidID(c.id) {
		return fmt.Errorf("container id %q: %w", c.id, errdefs.ErrInvalidArgument)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.containers[c.id] != nil {
		return fmt.Errorf("container %s: %w", c.id, errdefs.ErrAlreadyExists)
	}
	s.containers[c.id] = c
	return nil
}

func (s *Service) forget(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.containers, id)
}

// enter makes a container visible, unless the micro-VM has ended meanwhile.
func (s *Service) enter(c *container, p *process) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.gone {
		return fmt.Errorf("the micro-VM of the pod has ended: %w", errdefs.ErrFailedPrecondition)
	}
	c.init = p
	return nil
}

// read loads the bundle's spec.
func read(bundle string) (*specs.Spec, error) {
	data, err := os.ReadFile(filepath.Join(bundle, "config.json"))
	if err != nil {
		return nil, fmt.Errorf("reading bundle: %w", err)
	}
	oci, err := spec.Parse(data)
	if err != nil {
		return nil, err
	}
	if oci.Linux == nil {
		return nil, fmt.Errorf("spec has no linux section: %w", errdefs.ErrInvalidArgument)
	}
	return oci, nil
}

// root is what the snapshotter says about a container's root file system.
type root struct {
	image string // file
	usage string // file to report the use of the writable layer in
}

// rootOf finds it among the mounts.
func rootOf(rootfs []*types.Mount) (root, error) {
	for _, m := range rootfs {
		if image := handover.ImagePath(m.Options); filepath.IsAbs(image) && filepath.IsAbs(m.Source) {
			return root{image: image, usage: handover.LayerUsage(m.Source)}, nil
		}
	}
	return root{}, fmt.Errorf("root file system names no image file; is the snapshotter \"atoll\" in use? %w", errdefs.ErrInvalidArgument)
}

func compile(profile *specs.LinuxSeccomp) (program, error) {
	code, err := seccomp.Compile(profile)
	if err != nil {
		return program{}, err
	}
	flags, err := seccomp.Flags(profile)
	return program{code: code, flags: flags}, err
}

// provide brings image and volumes into the guest and rewrites the spec to use them. The guest mounts the
// image while the rest is made ready.
func (s *Service) provide(ctx context.Context, pod *Pod, c *container, oci *specs.Spec, image string, stack *undo.Stack) error {
	var wg sync.WaitGroup
	var imageErr error
	wg.Go(func() { c.image, imageErr = pod.Images.Acquire(ctx, image) })
	err := s.describe(ctx, pod, c, oci)
	wg.Wait()
	if imageErr == nil {
		stack.Push("releasing image", func() error {
			id := c.image
			c.image = ""
			return pod.Images.Release(context.WithoutCancel(ctx), id)
		})
	}
	return errors.Join(err, imageErr)
}

// describe makes the guest's spec out of the host's.
func (s *Service) describe(ctx context.Context, pod *Pod, c *container, oci *specs.Spec) (err error) {
	if p := oci.Process; p != nil && p.OOMScoreAdj != nil {
		pod.Protect(*p.OOMScoreAdj)
	}
	if err := pod.Grow(ctx, s.total(c)); err != nil {
		return err
	}
	var binds []specs.Mount
	for _, m := range oci.Mounts {
		if spec.IsBind(m) {
			binds = append(binds, m)
		}
	}
	if c.volumes, err = pod.Volumes.Prepare(ctx, c.id, binds); err != nil {
		return err
	}
	return spec.Container(oci, spec.Env{
		SandboxPID: pod.PID, GuestPID: s.guestPID, Bind: c.volumes.Bind, Files: pod.Files, Shm: channel.ShmPath,
		Device: func(d specs.LinuxDevice) (specs.LinuxDevice, bool, error) { return pod.Volumes.Device(ctx, d) },
	})
}

// createInGuest creates the container there and connects its standard streams.
func (s *Service) createInGuest(ctx context.Context, pod *Pod, c *container, p *process, oci *specs.Spec, stack *undo.Stack) error {
	data := flatspec.Spec(oci)
	if len(data) > spec.MaxBytes {
		return fmt.Errorf("spec of %d bytes is larger than %d: %w", len(data), spec.MaxBytes, errdefs.ErrInvalidArgument)
	}
	gctx, cancel := call(ctx)
	defer cancel()
	_, err := pod.Guest.CreateContainer(gctx, &guestv1.CreateContainerRequest{
		Id: c.id, Spec: data, Lowers: []string{c.image}, Terminal: p.config.Terminal, Stdin: p.io.HasStdin(),
		ImageVolumes: filled(c.volumes), Seccomp: c.seccomp.code, SeccompFlags: c.seccomp.flags,
	})
	if err != nil {
		return err
	}
	stack.Push("deleting container in guest", func() error {
		dctx, cancel := call(context.WithoutCancel(ctx))
		defer cancel()
		_, err := pod.Guest.Delete(dctx, &guestv1.ProcessRequest{ContainerId: c.id})
		return err
	})
	return p.io.Start(p.config.Terminal, func(fd int) (stdio.Stream, error) {
		return pod.Streams.OpenIO(c.id, "", fd)
	})
}

func filled(c *volumes.Container) []*guestv1.ImageVolume { return c.Filled }

// limitsOf reads the limits of a container.
func limitsOf(r *specs.LinuxResources) Resources {
	var out Resources
	if r == nil {
		return out
	}
	if m := r.Memory; m != nil && m.Limit != nil && *m.Limit > 0 {
		out.Memory = uint64(*m.Limit)
	}
	if c := r.CPU; c != nil && c.Quota != nil && c.Period != nil && *c.Quota > 0 && *c.Period > 0 {
		out.CPUs = float64(*c.Quota) / float64(*c.Period)
	}
	return out
}

// total adds up the limits of containers that have not ended, with c among them.
func (s *Service) total(c *container) Resources {
	s.mu.Lock()
	defer s.mu.Unlock()
	sum := c.limits
	for _, other := range s.containers {
		if other == c || other.init == nil || other.init.hasEnded() {
			continue
		}
		sum.Memory += other.limits.Memory
		sum.CPUs += other.limits.CPUs
	}
	return sum
}
