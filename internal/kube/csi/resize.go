package csi

import (
	"context"
	"fmt"
	"sync"

	"github.com/container-storage-interface/spec/lib/go/csi"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/component-helpers/scheduling/corev1/nodeaffinity"

	"github.com/kubernetes-csi/csi-lib-utils/rpc"
	"github.com/kubernetes-csi/external-resizer/v2/pkg/controller"
	"github.com/kubernetes-csi/external-resizer/v2/pkg/modifier"
	"github.com/kubernetes-csi/external-resizer/v2/pkg/modifycontroller"
	"github.com/kubernetes-csi/external-resizer/v2/pkg/resizer"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// resizer expands volumes and changes their limits (VolumeAttributesClass).
func (s *sidecars) resizer() (func(context.Context), error) {
	driver := resizeClient{s: s, controller: csi.NewControllerClient(s.conn)}
	r, err := resizer.NewResizerFromClient(driver, callTimeout, s.client, s.cfg.Driver)
	if err != nil {
		return nil, fmt.Errorf("making the resizer: %w", err)
	}
	m, err := modifier.NewModifierFromClient(driver, callTimeout, s.client, s.factory, false, s.cfg.Driver)
	if err != nil {
		return nil, fmt.Errorf("making the modifier: %w", err)
	}
	resize := controller.NewResizeController(s.cfg.Driver, reachable{Resizer: r, s: s}, s.client, resync, s.factory, limiter[string](), false, retryMost)
	modify := modifycontroller.NewModifyController(s.cfg.Driver, m, s.client, resync, retryMost, false, s.factory, limiter[string]())
	return func(ctx context.Context) {
		var wg sync.WaitGroup
		wg.Go(func() { resize.Run(workers, ctx, nil) })
		wg.Go(func() { modify.Run(workers, ctx, nil) })
		wg.Wait()
	}, nil
}

// reachable leaves volumes that this host cannot reach to the agents of others.
type reachable struct {
	resizer.Resizer
	s *sidecars
}

// CanSupport implements resizer.Resizer.
func (r reachable) CanSupport(pv *corev1.PersistentVolume, pvc *corev1.PersistentVolumeClaim) bool {
	return r.s.reaches(pv) && r.Resizer.CanSupport(pv, pvc)
}

// reaches tells whether this host is one of those a volume can be used on.
func (s *sidecars) reaches(pv *corev1.PersistentVolume) bool {
	if pv.Spec.NodeAffinity == nil || pv.Spec.NodeAffinity.Required == nil {
		return true
	}
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: s.cfg.Node, Labels: map[string]string{s.cfg.TopologyKey: s.cfg.Node}}}
	ok, err := nodeaffinity.NewLazyErrorNodeSelector(pv.Spec.NodeAffinity.Required).Match(node)
	return ok && err == nil
}

// resizeClient is the driver as external-resizer wants it. Its own client ends the process when the
// connection is lost, which is right in a container only.
type resizeClient struct {
	s          *sidecars
	controller csi.ControllerClient
}

func (c resizeClient) GetDriverName(ctx context.Context) (string, error) {
	return rpc.GetDriverName(ctx, c.s.conn)
}

func (c resizeClient) SupportsPluginControllerService(context.Context) (bool, error) {
	return c.s.plugin[csi.PluginCapability_Service_CONTROLLER_SERVICE], nil
}

func (c resizeClient) SupportsControllerResize(context.Context) (bool, error) {
	return c.s.capabilities[csi.ControllerServiceCapability_RPC_EXPAND_VOLUME], nil
}

// SupportsNodeResize is asked only about drivers whose controller cannot resize.
func (c resizeClient) SupportsNodeResize(context.Context) (bool, error) { return false, nil }

func (c resizeClient) SupportsControllerModify(context.Context) (bool, error) {
	return c.s.capabilities[csi.ControllerServiceCapability_RPC_MODIFY_VOLUME], nil
}

func (c resizeClient) SupportsControllerSingleNodeMultiWriter(context.Context) (bool, error) {
	return c.s.capabilities[csi.ControllerServiceCapability_RPC_SINGLE_NODE_MULTI_WRITER], nil
}

func (c resizeClient) Expand(ctx context.Context, volume string, bytes int64, secrets map[string]string, capability *csi.VolumeCapability) (int64, bool, error) {
	answer, err := c.controller.ControllerExpandVolume(ctx, &csi.ControllerExpandVolumeRequest{
		VolumeId: volume, Secrets: secrets, CapacityRange: &csi.CapacityRange{RequiredBytes: bytes}, VolumeCapability: capability,
	})
	return answer.GetCapacityBytes(), answer.GetNodeExpansionRequired(), err
}

func (c resizeClient) Modify(ctx context.Context, volume string, secrets, mutable map[string]string) error {
	_, err := c.controller.ControllerModifyVolume(ctx, &csi.ControllerModifyVolumeRequest{VolumeId: volume, Secrets: secrets, MutableParameters: mutable})
	return err
}

// CloseConnection does nothing: the connection is that of all sidecars.
func (c resizeClient) CloseConnection() {}
