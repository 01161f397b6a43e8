package volumes

import (
	"context"
	"fmt"
	"log/slog"
	"path/filepath"
	"time"

	guestv1 "atoll.dev/atoll/api/guest/v1"
	"atoll.dev/atoll/internal/datadir/handover"
)

// reportInterval is how often the guest is asked what volumes take, at most. The kubelet looks every ten
// seconds.
const reportInterval = 5 * time.Second

// Measure says that somebody wants to know what volumes take. It does not wait: Run writes it down for
// the kubelet, which finds only empty directories on the host.
func (s *Set) Measure() {
	select {
	case s.measure <- struct{}{}:
	default: // it will be soon
	}
}

// reports writes down what emptyDirs take, whenever it is wanted, until ctx ends.
func (s *Set) reports(ctx context.Context) {
	for {
		select {
		case <-s.measure:
		case <-ctx.Done():
			return
		}
		if err := s.report(ctx); err != nil && ctx.Err() == nil {
			slog.Warn("reporting what volumes take", "error", err)
		}
		select {
		case <-time.After(s.interval):
		case <-ctx.Done():
			return
		}
	}
}

// report asks the guest and writes down what it says of each emptyDir.
func (s *Set) report(ctx context.Context) error {
	dirs := s.emptyDirs()
	if len(dirs) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	resp, err := s.guest.Stats(ctx, &guestv1.StatsRequest{})
	if err != nil {
		return fmt.Errorf("reading statistics: %w", err)
	}
	for _, got := range resp.GetVolumes() {
		v, ok := dirs[got.GetId()]
		if !ok {
			continue
		}
		delete(dirs, got.GetId()) // a guest cannot make the host write more than once
		u := handover.Usage{Bytes: handover.Limit(got.GetUsedBytes()), Inodes: handover.Limit(got.GetUsedInodes())}
		if v.kind == guestv1.CreateVolumeRequest_MEMORY {
			u.Capacity = handover.Limit(v.size)
			u.Available = max(u.Capacity-u.Bytes, 0)
		} else {
			u.Capacity = handover.Limit(resp.GetScratchCapacityBytes())
			u.Available = handover.Limit(resp.GetScratchAvailableBytes())
		}
		if err := u.Write(usageFile(v.host)); err != nil {
			return err
		}
	}
	return nil
}

// emptyDirs are the volumes that the kubelet measures, by id.
func (s *Set) emptyDirs() map[string]volume {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := map[string]volume{}
	for id, v := range s.volumes {
		if v.kind == guestv1.CreateVolumeRequest_SCRATCH || v.kind == guestv1.CreateVolumeRequest_MEMORY {
			out[id] = *v
		}
	}
	return out
}

// usageFile is where the kubelet looks for the use of the emptyDir in <pod>/volumes/<plugin>/<name>.
func usageFile(host string) string {
	podDir := filepath.Dir(filepath.Dir(filepath.Dir(host)))
	return handover.EmptyDirUsage(podDir, filepath.Base(host))
}
