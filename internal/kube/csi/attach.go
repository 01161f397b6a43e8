package csi

import (
	"context"

	storagev1 "k8s.io/api/storage/v1"
	csitrans "k8s.io/csi-translation-lib"
	"k8s.io/klog/v2"

	"github.com/kubernetes-csi/external-attacher/v4/pkg/attacher"
	"github.com/kubernetes-csi/external-attacher/v4/pkg/controller"
)

// attacher performs VolumeAttachments of this host.
func (s *sidecars) attacher() func(context.Context) {
	volumes := s.factory.Core().V1().PersistentVolumes()
	attachments := s.factory.Storage().V1().VolumeAttachments()
	timeout := callTimeout
	handler := controller.NewCSIHandler(
		s.client, s.cfg.Driver, attacher.NewAttacher(s.conn), attacher.NewVolumeLister(s.conn, 0),
		volumes.Lister(), s.factory.Storage().V1().CSINodes().Lister(), attachments.Lister(),
		&timeout,
		true, // read-only attachments
		true, // several writers on one node
		csitrans.New(),
		"",
	)
	c := controller.NewCSIAttachController(klog.Background(), s.client, s.cfg.Driver, onThisNode{Handler: handler, node: s.cfg.Node},
		attachments, volumes, limiter[string](), limiter[string](), false, resync)
	return func(ctx context.Context) { c.Run(ctx, workers, nil) }
}

// onThisNode leaves the attachments of other hosts to their agents.
type onThisNode struct {
	controller.Handler
	node string
}

// SyncNewOrUpdatedVolumeAttachment implements controller.Handler.
func (h onThisNode) SyncNewOrUpdatedVolumeAttachment(ctx context.Context, va *storagev1.VolumeAttachment) {
	if va.Spec.NodeName == h.node {
		h.Handler.SyncNewOrUpdatedVolumeAttachment(ctx, va)
	}
}
