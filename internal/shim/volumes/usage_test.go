package volumes

import (
	"context"
	"errors"
	"math"
	"os"
	"path/filepath"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	guestv1 "atoll.dev/atoll/api/guest/v1"
	"atoll.dev/atoll/internal/datadir/handover"
)

func TestMeasure(t *testing.T) {
	h, g := newHost(t), newGuest()
	s := h.set(g)
	s.interval = time.Hour
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	if _, err := s.Prepare(ctx, "c1", h.mounts()); err != nil {
		t.Fatal(err)
	}
	file := handover.EmptyDirUsage(h.pod, "cache")
	if err := os.MkdirAll(filepath.Dir(file), 0o750); err != nil {
		t.Fatal(err)
	}
	g.stats = &guestv1.StatsResponse{
		Volumes: []*guestv1.VolumeUsage{
			{Id: "v-cache", UsedBytes: 4096, UsedInodes: math.MaxUint64},
			{Id: "v-cm", UsedBytes: 1},
			{Id: "../../x", UsedBytes: 1},
			{Id: "v-cache", UsedBytes: 9},
		},
		ScratchCapacityBytes: 1000, ScratchAvailableBytes: 10,
	}
	for range 100 {
		s.Measure()
	}
	var got handover.Usage
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		var err error
		if got, _, err = handover.ReadUsage(file); err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	want := handover.Usage{Bytes: 4096, Inodes: handover.Limit(math.MaxUint64), Capacity: 1000, Available: 10}
	if got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if g.asked != 1 {
		t.Errorf("the guest was asked %d times", g.asked)
	}
	if left, _ := filepath.Glob(filepath.Join(h.pod, "plugins", "*", "*", "*")); len(left) != 1 {
		t.Errorf("wrote %v", left)
	}
}

// TestReport: a memory volume has a size of its own; a pod without emptyDirs is not asked.
func TestReport(t *testing.T) {
	h, g := newHost(t), newGuest()
	s := h.set(g)
	if _, err := s.Prepare(t.Context(), "c1", h.mounts()[3:]); err != nil {
		t.Fatal(err)
	}
	if err := s.report(t.Context()); err != nil || g.asked != 0 {
		t.Errorf("asked %d times, %v", g.asked, err)
	}
	s.volumes["v-mem"] = &volume{
		kind: guestv1.CreateVolumeRequest_MEMORY, size: 100,
		host: filepath.Join(h.pod, "volumes/kubernetes.io~empty-dir/mem"),
	}
	g.stats = &guestv1.StatsResponse{Volumes: []*guestv1.VolumeUsage{{Id: "v-mem", UsedBytes: 30}}, ScratchCapacityBytes: 7}
	file := handover.EmptyDirUsage(h.pod, "mem")
	if err := s.report(t.Context()); err != nil {
		t.Errorf("without a directory: %v", err)
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o750); err != nil {
		t.Fatal(err)
	}
	if err := s.report(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got, _, err := handover.ReadUsage(file); err != nil || got != (handover.Usage{Bytes: 30, Capacity: 100, Available: 70}) {
		t.Errorf("got %+v, %v", got, err)
	}
	if _, err := s.Prepare(t.Context(), "c2", []specs.Mount{}); err != nil {
		t.Error(err)
	}
}
