// Package attachment makes the volumes of claims available to a virtual machine on its host, and takes them away.
//
// A volume that is not the pod's own comes in three steps, each of which waits for somebody else: the claim is bound
// (the provisioner needs to know the node), a VolumeAttachment is made (the agent of the host performs it), and
// the host is told the volume's handle in the Machine. Before anything else a claim is held: an annotation names
// the VirtualMachine that has it, so that two never have one, and a finalizer keeps it from being deleted under a
// machine. Claims that are shared by all who have them (ReadWriteMany and MultiWriter) have no holder.
//
// It is used by the controllers of VirtualMachines and of their snapshots. Every step can be repeated. What can go
// wrong is a Problem, which is for people and goes into a status, or an error of the API server.
package attachment

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strings"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/component-helpers/scheduling/corev1/nodeaffinity"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"

	machinev1 "atoll.dev/atoll/api/machine/v1"
)

// Names in claims and VolumeAttachments.
const (
	// Driver is the only one whose volumes a machine can have.
	Driver = "csi.atoll.dev"
	// Finalizer keeps a claim that a VirtualMachine has.
	Finalizer = "atoll.dev/vm-attached"
	// HolderAnnotation of a claim is the uid of the VirtualMachine that has it, HolderNameAnnotation its name.
	HolderAnnotation     = "atoll.dev/vm-attached"
	HolderNameAnnotation = "atoll.dev/vm-attached-name"
	// SharedPrefix and the uid of a VirtualMachine is an annotation of a claim that several may have.
	SharedPrefix = "shared.vm.atoll.dev/"
	// NamespaceLabel and ClaimLabel of a VolumeAttachment say whose it is, besides machinev1's NameLabel and UIDLabel.
	NamespaceLabel = "atoll.dev/vm-namespace"
	ClaimLabel     = "atoll.dev/claim-uid"
	// PurposeLabel says what an attachment is for: Disks, or whatever its maker calls it.
	PurposeLabel = "atoll.dev/attached-for"
	// Disks are attachments of disks of the machine. The controller of VirtualMachines ends them, and all others
	// when there is no machine.
	Disks = "disks"

	selectedNode = "volume.kubernetes.io/selected-node"
)

// Problem is why a volume is not available, for people. A problem that time alone can solve is Waiting.
type Problem struct {
	Text    string
	Waiting bool
}

// Error implements error.
func (p *Problem) Error() string { return p.Text }

func problem(format string, args ...any) error { return &Problem{Text: fmt.Sprintf(format, args...)} }

func waiting(format string, args ...any) error {
	return &Problem{Text: fmt.Sprintf(format, args...), Waiting: true}
}

// Text is what a status says about an error, and whether it is one of the API server that must be tried again.
func Text(err error) (text string, retry bool) {
	if p := (*Problem)(nil); errors.As(err, &p) {
		return p.Text, false
	}
	return err.Error(), true
}

// Hold takes a claim for a VirtualMachine.
func Hold(ctx context.Context, c client.Client, vm *vmopv1.VirtualMachine, claim *corev1.PersistentVolumeClaim, shared bool) error {
	key := HolderAnnotation
	if shared {
		key = SharedPrefix + string(vm.UID)
	}
	if claim.DeletionTimestamp != nil && claim.Annotations[key] == "" {
		return problem("PersistentVolumeClaim %s is being deleted: remove the volume", claim.Name)
	}
	if holder := claim.Annotations[HolderAnnotation]; holder != "" && holder != string(vm.UID) {
		return problem("PersistentVolumeClaim %s is in use by VirtualMachine %s: remove it from one of the two, or, with access mode ReadWriteMany, set sharingMode MultiWriter in both",
			claim.Name, claim.Annotations[HolderNameAnnotation])
	}
	if holders := Holders(claim); !shared && slices.ContainsFunc(holders, func(uid string) bool { return uid != string(vm.UID) }) {
		return problem("PersistentVolumeClaim %s is shared by other virtual machines: set sharingMode MultiWriter here, too", claim.Name)
	}
	before := claim.DeepCopy()
	changed := claim.DeletionTimestamp == nil && controllerutil.AddFinalizer(claim, Finalizer)
	for k, value := range map[string]string{key: string(vm.UID), HolderNameAnnotation: vm.Name} {
		if claim.Annotations[k] != value && (k == key || !shared) {
			metav1.SetMetaDataAnnotation(&claim.ObjectMeta, k, value)
			changed = true
		}
	}
	if !changed {
		return nil
	}
	if err := c.Patch(ctx, claim, client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{})); err != nil {
		return fmt.Errorf("holding PersistentVolumeClaim %s: %w", claim.Name, err)
	}
	return nil
}

// Holders are the uids of the VirtualMachines that have a claim.
func Holders(claim *corev1.PersistentVolumeClaim) []string {
	var out []string
	for key, value := range claim.Annotations {
		if key == HolderAnnotation || strings.HasPrefix(key, SharedPrefix) {
			out = append(out, value)
		}
	}
	slices.Sort(out)
	return out
}

// LetGo ends Hold. The claim must have no attachment of the VirtualMachine any more.
func LetGo(ctx context.Context, c client.Client, vm *vmopv1.VirtualMachine, claim *corev1.PersistentVolumeClaim) error {
	before := claim.DeepCopy()
	delete(claim.Annotations, SharedPrefix+string(vm.UID))
	if claim.Annotations[HolderAnnotation] == string(vm.UID) {
		delete(claim.Annotations, HolderAnnotation)
		delete(claim.Annotations, HolderNameAnnotation)
	}
	if len(Holders(claim)) == 0 {
		controllerutil.RemoveFinalizer(claim, Finalizer)
	}
	if len(before.Finalizers) == len(claim.Finalizers) && len(before.Annotations) == len(claim.Annotations) {
		return nil
	}
	err := c.Patch(ctx, claim, client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{}))
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("letting go of PersistentVolumeClaim %s: %w", claim.Name, err)
	}
	return nil
}

// Volume is the bound volume of a claim. Without a node, or until it is bound, that is a Problem. A claim that waits for
// its first consumer is told the node.
func Volume(ctx context.Context, c client.Client, claim *corev1.PersistentVolumeClaim, node string) (*corev1.PersistentVolume, error) {
	if claim.Status.Phase == corev1.ClaimLost {
		return nil, problem("PersistentVolumeClaim %s has lost its volume %s: delete the claim and make it anew", claim.Name, claim.Spec.VolumeName)
	}
	if claim.Spec.VolumeName == "" || claim.Status.Phase != corev1.ClaimBound {
		if node != "" && claim.Spec.VolumeName == "" && claim.Annotations[selectedNode] == "" {
			if err := selectNode(ctx, c, claim, node); err != nil {
				return nil, err
			}
		}
		return nil, waiting("PersistentVolumeClaim %s is not bound yet", claim.Name)
	}
	pv := &corev1.PersistentVolume{}
	if err := c.Get(ctx, client.ObjectKey{Name: claim.Spec.VolumeName}, pv); err != nil {
		if apierrors.IsNotFound(err) {
			return nil, waiting("PersistentVolume %s of PersistentVolumeClaim %s is not there", claim.Spec.VolumeName, claim.Name)
		}
		return nil, fmt.Errorf("reading PersistentVolume %s: %w", claim.Spec.VolumeName, err)
	}
	if pv.Spec.CSI == nil || pv.Spec.CSI.Driver != Driver {
		return nil, problem("PersistentVolumeClaim %s is not a volume of %s, which is the only kind a virtual machine can have: use a StorageClass of that provisioner", claim.Name, Driver)
	}
	return pv, nil
}

// selectNode tells the provisioner where the volume is wanted, if it waits for that.
func selectNode(ctx context.Context, c client.Client, claim *corev1.PersistentVolumeClaim, node string) error {
	if claim.Spec.StorageClassName == nil || *claim.Spec.StorageClassName == "" {
		return problem("PersistentVolumeClaim %s is not bound, and has no StorageClass that could make a volume for it", claim.Name)
	}
	class := &storagev1.StorageClass{}
	if err := c.Get(ctx, client.ObjectKey{Name: *claim.Spec.StorageClassName}, class); err != nil {
		if apierrors.IsNotFound(err) {
			return problem("PersistentVolumeClaim %s names StorageClass %s, which does not exist: delete the claim, and make it with one that does", claim.Name, *claim.Spec.StorageClassName)
		}
		return fmt.Errorf("reading StorageClass %s: %w", *claim.Spec.StorageClassName, err)
	}
	if class.VolumeBindingMode == nil || *class.VolumeBindingMode != storagev1.VolumeBindingWaitForFirstConsumer {
		return nil
	}
	before := claim.DeepCopy()
	metav1.SetMetaDataAnnotation(&claim.ObjectMeta, selectedNode, node)
	if err := c.Patch(ctx, claim, client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{})); err != nil {
		return fmt.Errorf("choosing the node of PersistentVolumeClaim %s: %w", claim.Name, err)
	}
	return nil
}

// Attach makes the volume available on a node, and returns its handle when that is done.
func Attach(ctx context.Context, c client.Client, vm *vmopv1.VirtualMachine, claim *corev1.PersistentVolumeClaim, node, purpose string) (handle string, err error) {
	pv, err := Volume(ctx, c, claim, node)
	if err != nil {
		return "", err
	}
	if err := reachable(ctx, c, claim, pv, node); err != nil {
		return "", err
	}
	a := &storagev1.VolumeAttachment{}
	err = c.Get(ctx, client.ObjectKey{Name: name(vm, pv.Name, node)}, a)
	if apierrors.IsNotFound(err) {
		a = newAttachment(vm, claim, pv.Name, node, purpose)
		if err := c.Create(ctx, a); err != nil && !apierrors.IsAlreadyExists(err) {
			return "", fmt.Errorf("attaching PersistentVolumeClaim %s: %w", claim.Name, err)
		}
		return "", waiting("PersistentVolumeClaim %s is being attached to node %s", claim.Name, node)
	}
	switch {
	case err != nil:
		return "", fmt.Errorf("reading the attachment of PersistentVolumeClaim %s: %w", claim.Name, err)
	case a.DeletionTimestamp != nil:
		return "", waiting("PersistentVolumeClaim %s is still being detached", claim.Name)
	case a.Status.Attached:
		return pv.Spec.CSI.VolumeHandle, nil
	case a.Status.AttachError != nil:
		return "", problem("attaching PersistentVolumeClaim %s to node %s: %s", claim.Name, node, a.Status.AttachError.Message)
	}
	return "", waiting("PersistentVolumeClaim %s is being attached to node %s", claim.Name, node)
}

// reachable tells whether the volume is to be had on the node.
func reachable(ctx context.Context, c client.Client, claim *corev1.PersistentVolumeClaim, pv *corev1.PersistentVolume, node string) error {
	if pv.Spec.NodeAffinity == nil || pv.Spec.NodeAffinity.Required == nil {
		return nil
	}
	n := &corev1.Node{}
	if err := c.Get(ctx, client.ObjectKey{Name: node}, n); err != nil {
		return fmt.Errorf("reading Node %s: %w", node, err)
	}
	selector, err := nodeaffinity.NewNodeSelector(pv.Spec.NodeAffinity.Required)
	if err != nil {
		return problem("PersistentVolume %s of PersistentVolumeClaim %s: %v", pv.Name, claim.Name, err)
	}
	if !selector.Match(n) {
		return problem("the volume of PersistentVolumeClaim %s cannot be reached from node %s, on which the virtual machine runs: power it off and on, and it is started where the volume is", claim.Name, node)
	}
	return nil
}

func newAttachment(vm *vmopv1.VirtualMachine, claim *corev1.PersistentVolumeClaim, pv, node, purpose string) *storagev1.VolumeAttachment {
	return &storagev1.VolumeAttachment{
		ObjectMeta: metav1.ObjectMeta{Name: name(vm, pv, node), Labels: map[string]string{
			machinev1.UIDLabel: string(vm.UID), machinev1.NameLabel: vm.Name, NamespaceLabel: vm.Namespace, ClaimLabel: string(claim.UID), PurposeLabel: purpose,
		}},
		Spec: storagev1.VolumeAttachmentSpec{Attacher: Driver, NodeName: node, Source: storagev1.VolumeAttachmentSource{PersistentVolumeName: &pv}},
	}
}

// name is unique for a machine, a volume and a node.
func name(vm *vmopv1.VirtualMachine, pv, node string) string {
	return fmt.Sprintf("vm-%x", sha256.Sum256([]byte(string(vm.UID)+"/"+pv+"/"+node)))[:43]
}

// List is all attachments of a VirtualMachine.
func List(ctx context.Context, c client.Reader, vm *vmopv1.VirtualMachine) ([]storagev1.VolumeAttachment, error) {
	var list storagev1.VolumeAttachmentList
	if err := c.List(ctx, &list, client.MatchingLabels{machinev1.UIDLabel: string(vm.UID)}); err != nil {
		return nil, fmt.Errorf("listing attachments: %w", err)
	}
	return list.Items, nil
}

// Detach ends an attachment. The host lets go of the volume some time later, and then the attachment is gone.
func Detach(ctx context.Context, c client.Client, a *storagev1.VolumeAttachment) error {
	if a.DeletionTimestamp != nil {
		return nil
	}
	if err := c.Delete(ctx, a); err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("detaching a volume: %w", err)
	}
	return nil
}
