// Package machines looks up what the API says about the virtual machines of a node: which exist, and which volumes
// one may have.
//
// A machine may have a volume if its pod runs on this node and names it, and if the volume belongs to the pod's
// namespace: a disk must be attached to the node (a VolumeAttachment of our driver), memory need not. The volumes of
// the pod itself are the kubelet's and the CSI node service's matter. Nothing is cached: a machine asks a few times in
// its life.
//
// internal/agent uses it. What can go wrong: the API server is away; the shim asks again.
package machines

import (
	"context"
	"errors"
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/rest"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/datadir/attach"
	"atoll.dev/atoll/internal/datadir/handover"
)

// ErrRefused is wrapped when a machine may not have a volume.
var ErrRefused = errors.New("the virtual machine may not have the volume")

// pageSize bounds one answer of the API server.
const pageSize = 500

// Machines asks the API server.
type Machines struct {
	node   string
	client kubernetes.Interface
	list   func(context.Context, metav1.ListOptions) (*metav1.PartialObjectMetadataList, error)
}

// New makes a reader for a node. It does not talk to the API server.
func New(config *rest.Config, node string) (*Machines, error) {
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("looking up virtual machines: %w", err)
	}
	meta, err := metadata.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("looking up virtual machines: %w", err)
	}
	vms := schema.GroupVersionResource{Group: "vmoperator.vmware.com", Version: "v1alpha5", Resource: "virtualmachines"}
	return &Machines{node: node, client: client, list: meta.Resource(vms).List}, nil
}

// All returns the uids of all virtual machines there are.
func (m *Machines) All(ctx context.Context) (map[string]bool, error) {
	out := map[string]bool{}
	options := metav1.ListOptions{Limit: pageSize}
	for {
		page, err := m.list(ctx, options)
		if err != nil {
			return nil, fmt.Errorf("listing virtual machines: %w", err)
		}
		for _, vm := range page.Items {
			out[string(vm.UID)] = true
		}
		if options.Continue = page.Continue; options.Continue == "" {
			return out, nil
		}
	}
}

// MayUse tells why a machine may not have a volume, which is not one of its pod; nil if it may.
func (m *Machines) MayUse(ctx context.Context, r attach.OpenRequest) error {
	if r.Machine == nil {
		return fmt.Errorf("%w: the request does not name its pod", ErrRefused)
	}
	pod, err := m.client.CoreV1().Pods(r.Machine.Namespace).Get(ctx, r.Machine.Name, metav1.GetOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("looking up the pod: %w", err)
	}
	if err != nil || string(pod.UID) != r.Pod || pod.Spec.NodeName != m.node {
		return fmt.Errorf("%w: its pod %s/%s does not run on this node", ErrRefused, r.Machine.Namespace, r.Machine.Name)
	}
	spec, err := machinev1.Parse([]byte(pod.Annotations[machinev1.Annotation]))
	if err != nil {
		return err
	}
	if !named(spec, r.Volume, r.Machine.Memory) {
		return fmt.Errorf("%w: its pod does not name it", ErrRefused)
	}
	volume, err := m.volume(ctx, r.Volume)
	if err != nil {
		return err
	}
	if claim := volume.Spec.ClaimRef; claim == nil || claim.Namespace != pod.Namespace {
		return fmt.Errorf("%w: it is not bound to a claim in namespace %s", ErrRefused, pod.Namespace)
	}
	if r.Machine.Memory {
		return nil
	}
	attachments, err := m.client.StorageV1().VolumeAttachments().List(ctx, metav1.ListOptions{})
	if err != nil {
		return fmt.Errorf("listing volume attachments: %w", err)
	}
	for _, a := range attachments.Items {
		name := a.Spec.Source.PersistentVolumeName
		if a.Spec.Attacher == handover.Driver && a.Spec.NodeName == m.node && name != nil && *name == volume.Name {
			return nil
		}
	}
	return fmt.Errorf("%w: it is not attached to node %s", ErrRefused, m.node)
}

// named tells whether a machine has a volume, as a disk or for memory.
func named(m *machinev1.Machine, handle string, memory bool) bool {
	if !memory {
		return slices.ContainsFunc(m.Disks, func(d machinev1.Disk) bool { return d.Volume == handle })
	}
	return m.Restore != nil && m.Restore.Volume == handle ||
		slices.ContainsFunc(m.Operations, func(o machinev1.Operation) bool { return o.Memory != nil && o.Memory.Volume == handle })
}

// volume finds the PersistentVolume of a handle.
func (m *Machines) volume(ctx context.Context, handle string) (*corev1.PersistentVolume, error) {
	options := metav1.ListOptions{Limit: pageSize}
	for {
		page, err := m.client.CoreV1().PersistentVolumes().List(ctx, options)
		if err != nil {
			return nil, fmt.Errorf("listing volumes: %w", err)
		}
		for i := range page.Items {
			if s := page.Items[i].Spec.CSI; s != nil && s.Driver == handover.Driver && s.VolumeHandle == handle {
				return &page.Items[i], nil
			}
		}
		if options.Continue = page.Continue; options.Continue == "" {
			return nil, fmt.Errorf("%w: there is no PersistentVolume for it", ErrRefused)
		}
	}
}
