package virtualmachine

import (
	"context"
	"fmt"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/types"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	netop "atoll.dev/atoll/api/netoperator/v1alpha1"
	"atoll.dev/atoll/internal/controllers/virtualmachine/attachment"
)

// Indexes of VirtualMachines by what they name, and of claims by who holds them.
const (
	refersIndex = "atoll.refers"
	holderIndex = "atoll.holder"
)

func addIndexes(mgr ctrl.Manager) error {
	ctx := context.Background()
	if err := mgr.GetFieldIndexer().IndexField(ctx, &vmopv1.VirtualMachine{}, refersIndex, refersTo); err != nil {
		return err
	}
	return mgr.GetFieldIndexer().IndexField(ctx, &corev1.PersistentVolumeClaim{}, holderIndex, heldBy)
}

func heldBy(obj client.Object) []string {
	if claim, ok := obj.(*corev1.PersistentVolumeClaim); ok {
		return attachment.Holders(claim)
	}
	return nil
}

// refersTo lists the objects that a VirtualMachine names, as kind/name.
func refersTo(obj client.Object) []string {
	vm, ok := obj.(*vmopv1.VirtualMachine)
	if !ok {
		return nil
	}
	out := []string{"VirtualMachineClass/" + vm.Spec.ClassName, "StorageClass/" + vm.Spec.StorageClass, "PersistentVolumeClaim/" + BootClaim(vm), "PersistentVolumeClaim/" + MemoryClaim(vm)}
	if vm.Spec.Image != nil {
		out = append(out, vm.Spec.Image.Kind+"/"+vm.Spec.Image.Name)
	}
	if vm.Spec.Reserved != nil {
		out = append(out, "VirtualMachineSetResourcePolicy/"+vm.Spec.Reserved.ResourcePolicyName)
	}
	for _, v := range vm.Spec.Volumes {
		if v.PersistentVolumeClaim != nil {
			out = append(out, "PersistentVolumeClaim/"+v.PersistentVolumeClaim.ClaimName)
		}
	}
	if vm.Spec.Hardware != nil {
		for _, c := range vm.Spec.Hardware.Cdrom {
			out = append(out, c.Image.Kind+"/"+c.Image.Name)
		}
	}
	if vm.Spec.Network != nil {
		for _, i := range vm.Spec.Network.Interfaces {
			if i.Network != nil {
				out = append(out, "Network/"+i.Network.Name)
			}
		}
	}
	return out
}

// watch adds what VirtualMachines depend on.
func (r *Reconciler) watch(b *builder.Builder) *builder.Builder {
	for kind, object := range map[string]client.Object{
		"VirtualMachineClass":             &vmopv1.VirtualMachineClass{},
		"VirtualMachineImage":             &vmopv1.VirtualMachineImage{},
		"ClusterVirtualMachineImage":      &vmopv1.ClusterVirtualMachineImage{},
		"VirtualMachineSetResourcePolicy": &vmopv1.VirtualMachineSetResourcePolicy{},
		"PersistentVolumeClaim":           &corev1.PersistentVolumeClaim{},
		"StorageClass":                    &storagev1.StorageClass{},
		"Network":                         &netop.Network{},
	} {
		b = b.Watches(object, handler.EnqueueRequestsFromMapFunc(func(ctx context.Context, obj client.Object) []reconcile.Request {
			return r.thatName(ctx, kind, obj)
		}))
	}
	return b.Watches(&storagev1.VolumeAttachment{}, handler.EnqueueRequestsFromMapFunc(ofAttachment))
}

// thatName are the VirtualMachines that name an object.
func (r *Reconciler) thatName(ctx context.Context, kind string, obj client.Object) []reconcile.Request {
	var list vmopv1.VirtualMachineList
	options := []client.ListOption{client.MatchingFields{refersIndex: kind + "/" + obj.GetName()}}
	if ns := obj.GetNamespace(); ns != "" {
		options = append(options, client.InNamespace(ns))
	}
	if err := r.List(ctx, &list, options...); err != nil {
		return nil // only when the cache has ended
	}
	var out []reconcile.Request
	for i := range list.Items {
		out = append(out, reconcile.Request{NamespacedName: client.ObjectKeyFromObject(&list.Items[i])})
	}
	if claim, ok := obj.(*corev1.PersistentVolumeClaim); ok && len(out) == 0 && claim.Labels[machinev1.UIDLabel] != "" {
		out = append(out, reconcile.Request{NamespacedName: types.NamespacedName{Namespace: claim.Namespace, Name: claim.Labels[machinev1.NameLabel]}})
	}
	return out
}

// ofAttachment is the VirtualMachine that a VolumeAttachment is for.
func ofAttachment(_ context.Context, obj client.Object) []reconcile.Request {
	labels := obj.GetLabels()
	if labels[machinev1.UIDLabel] == "" {
		return nil
	}
	return []reconcile.Request{{NamespacedName: types.NamespacedName{Namespace: labels[attachment.NamespaceLabel], Name: labels[machinev1.NameLabel]}}}
}

// ClassInstancesInUse lists the class instances that VirtualMachines of a namespace have or name.
func ClassInstancesInUse(ctx context.Context, c client.Reader, namespace string) (map[string]bool, error) {
	var list vmopv1.VirtualMachineList
	if err := c.List(ctx, &list, client.InNamespace(namespace)); err != nil {
		return nil, fmt.Errorf("listing VirtualMachines: %w", err)
	}
	out := map[string]bool{}
	for _, vm := range list.Items {
		out[vm.Annotations[ClassAnnotation]] = true
		if vm.Spec.Class != nil {
			out[vm.Spec.Class.Name] = true
		}
	}
	return out, nil
}
