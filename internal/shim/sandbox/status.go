package sandbox

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"time"

	api "github.com/containerd/containerd/api/runtime/sandbox/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	guestv1 "atoll.dev/atoll/api/guest/v1"
	"atoll.dev/atoll/internal/shim/task"
	"atoll.dev/atoll/internal/vm"
)

// InfoKey is the key of the shim's own part of the verbose sandbox status ("crictl inspectp").
const InfoKey = "atoll"

// Info is the shim's own part of the verbose sandbox status, as JSON.
type Info struct {
	QEMUPID     int      `json:"qemuPID,omitempty"`
	ShimPID     int      `json:"shimPID"`
	Accelerator vm.Accel `json:"accelerator,omitempty"`
	MemoryBytes int64    `json:"memoryBytes,omitempty"`
	CPUs        int      `json:"cpus,omitempty"`
	Warm        bool     `json:"warm"` // the micro-VM was ready before the pod came
	Steps       []Step   `json:"steps"`
	Console     string   `json:"console,omitempty"` // end of the kernel log; the guest wrote it
}

// Step is a part of the start; times in milliseconds.
type Step struct {
	Name string  `json:"name"`
	At   float64 `json:"at"` // when it was done, from the request for a shim
	Took float64 `json:"took"`
}

// SandboxStatus says how the sandbox is.
func (s *Service) SandboxStatus(_ context.Context, r *api.SandboxStatusRequest) (*api.SandboxStatusResponse, error) {
	if err := s.check(r.SandboxID); err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	s.mu.Lock()
	resp := &api.SandboxStatusResponse{SandboxID: s.id, State: stateNotReady, CreatedAt: timestamppb.New(s.created)}
	if s.pod != nil {
		resp.Pid = s.pod.PID
		if !s.ended() {
			resp.State = stateReady
		}
	}
	if s.ended() {
		resp.ExitedAt = timestamppb.New(s.exitAt)
	}
	m := s.vm
	s.mu.Unlock()
	if !r.Verbose {
		return resp, nil
	}
	info, err := json.Marshal(s.info(m))
	if err != nil {
		return nil, errgrpc.ToGRPC(fmt.Errorf("encoding status: %w", err))
	}
	resp.Info = map[string]string{InfoKey: string(info)}
	return resp, nil
}

func (s *Service) info(m *VM) Info {
	i := Info{ShimPID: os.Getpid(), Steps: []Step{}}
	if m != nil {
		s.room.Lock()
		i.MemoryBytes, i.CPUs = s.room.memory, s.room.cpus
		s.room.Unlock()
		i.QEMUPID, i.Accelerator, i.Warm = m.Machine.PID(), m.Accel, m.Warm
		i.Console = string(m.Machine.Console())
	}
	ms := func(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
	for _, st := range s.cfg.Steps.Steps() {
		i.Steps = append(i.Steps, Step{Name: st.Name, At: ms(st.At), Took: ms(st.Took)})
	}
	return i
}

// SandboxMetrics returns the usage of the whole pod as its guest counts it.
func (s *Service) SandboxMetrics(ctx context.Context, r *api.SandboxMetricsRequest) (*api.SandboxMetricsResponse, error) {
	metric, err := s.metrics(ctx, r.SandboxID)
	if err != nil {
		return nil, errgrpc.ToGRPC(fmt.Errorf("reading sandbox metrics: %w", err))
	}
	return &api.SandboxMetricsResponse{Metrics: metric}, nil
}

func (s *Service) metrics(ctx context.Context, id string) (*types.Metric, error) {
	if err := s.check(id); err != nil {
		return nil, err
	}
	s.mu.Lock()
	pod, ended := s.pod, s.ended()
	s.mu.Unlock()
	if pod == nil || ended {
		return nil, fmt.Errorf("sandbox is not running: %w", errdefs.ErrFailedPrecondition)
	}
	ctx, cancel := context.WithTimeout(ctx, statsTimeout)
	defer cancel()
	if err := pod.Ready(ctx); err != nil {
		return nil, err
	}
	resp, err := pod.Guest.Stats(ctx, &guestv1.StatsRequest{})
	if err != nil {
		return nil, err
	}
	m, err := task.Metrics(resp)
	if err != nil {
		return nil, err
	}
	data, err := task.Any(m)
	if err != nil {
		return nil, err
	}
	return &types.Metric{Timestamp: timestamppb.Now(), ID: id, Data: data}, nil
}
