package volumes

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"atoll.dev/atoll/bench/rig"
)

// driver is the CSI driver, called as the sidecars do.
type driver struct {
	csi.ControllerClient
	// made is what has to be deleted, in reverse.
	made []func(context.Context) error
}

// times of one operation each, in milliseconds.
type csiTimes struct{ create, snapshot, restore, clone, remove []float64 }

// CSI makes, snapshots and copies thin volumes of several sizes.
func CSI(ctx context.Context, h *rig.Host) ([]rig.Row, error) {
	socket := filepath.Join(h.Options.DataDir, "kubelet", "plugins", rig.DriverName, "csi.sock")
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, fmt.Errorf("connecting to the CSI driver: %w", err)
	}
	defer conn.Close()
	d := &driver{ControllerClient: csi.NewControllerClient(conn)}
	times := map[int64]*csiTimes{1: {}, 10: {}, 100: {}}
	for i := range h.Options.N + 1 {
		for _, size := range []int64{1, 10, 100} {
			into := times[size]
			if i == 0 { // warms up
				into = &csiTimes{}
			}
			err := d.cycle(ctx, fmt.Sprintf("bench-%d-%d-%d", os.Getpid(), size, i), size*rig.GiB, into)
			if err != nil {
				return nil, err
			}
		}
	}
	var rows []rig.Row
	for _, op := range []struct {
		name string
		of   func(*csiTimes) []float64
	}{
		{"create", func(t *csiTimes) []float64 { return t.create }},
		{"snapshot", func(t *csiTimes) []float64 { return t.snapshot }},
		{"restore", func(t *csiTimes) []float64 { return t.restore }},
		{"clone", func(t *csiTimes) []float64 { return t.clone }},
		{"delete", func(t *csiTimes) []float64 { return t.remove }},
	} {
		bar := rig.Compare("CSI "+op.name+", 10 GiB thin", "ms", op.of(times[10]), nil)
		bar.Note = "the bar is 200"
		rows = append(rows, bar, rig.Versus("CSI "+op.name+", 100 GiB thin", "ms", op.of(times[100]), "1 GiB", op.of(times[1])))
	}
	return rows, nil
}

// cycle does each operation once and deletes what it has made.
func (d *driver) cycle(ctx context.Context, name string, bytes int64, t *csiTimes) (err error) {
	defer func() {
		end := context.WithoutCancel(ctx)
		for _, remove := range slices.Backward(d.made) {
			begin := time.Now()
			err = errors.Join(err, remove(end))
			t.remove = append(t.remove, rig.Milliseconds(time.Since(begin)))
		}
		d.made = nil
	}()
	volume, err := d.create(ctx, name, bytes, nil, &t.create)
	if err != nil {
		return err
	}
	begin := time.Now()
	s, err := d.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: name + "-s", SourceVolumeId: volume})
	if err != nil {
		return fmt.Errorf("taking a snapshot of %s: %w", volume, err)
	}
	t.snapshot = append(t.snapshot, rig.Milliseconds(time.Since(begin)))
	snapshot := s.GetSnapshot().GetSnapshotId()
	d.made = append(d.made, func(ctx context.Context) error {
		_, err := d.DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: snapshot})
		return err
	})
	from := &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: snapshot}}}
	if _, err := d.create(ctx, name+"-r", bytes, from, &t.restore); err != nil {
		return err
	}
	from = &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Volume{Volume: &csi.VolumeContentSource_VolumeSource{VolumeId: volume}}}
	_, err = d.create(ctx, name+"-c", bytes, from, &t.clone)
	return err
}

func (d *driver) create(ctx context.Context, name string, bytes int64, from *csi.VolumeContentSource, took *[]float64) (string, error) {
	begin := time.Now()
	v, err := d.CreateVolume(ctx, &csi.CreateVolumeRequest{
		Name: name, CapacityRange: &csi.CapacityRange{RequiredBytes: bytes}, VolumeContentSource: from,
		VolumeCapabilities: []*csi.VolumeCapability{{
			AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
			AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{FsType: "ext4"}},
		}},
	})
	if err != nil {
		return "", fmt.Errorf("making volume %s: %w", name, err)
	}
	*took = append(*took, rig.Milliseconds(time.Since(begin)))
	id := v.GetVolume().GetVolumeId()
	d.made = append(d.made, func(ctx context.Context) error {
		_, err := d.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: id})
		return err
	})
	return id, nil
}
