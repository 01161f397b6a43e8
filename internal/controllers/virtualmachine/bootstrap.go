package virtualmachine

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"slices"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/client"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/controllers/condition"
	"atoll.dev/atoll/internal/controllers/virtualmachine/machine"
	"atoll.dev/atoll/internal/controllers/virtualmachine/power"
)

// InstanceAnnotation of a VirtualMachine with linuxPrep is the instance that the guest was customized as last.
const InstanceAnnotation = "atoll.dev/instance-id"

// bootstrap makes the files of the seed disk. A machine that runs has its already; changes of user data have an effect
// at the next start.
func (r *Reconciler) bootstrap(ctx context.Context, v *view) error {
	vm := v.vm
	if v.alive() || v.phase() == power.PodStopping {
		return nil
	}
	if r.Bootstrap == nil {
		if vm.Spec.Bootstrap != nil {
			v.lacks(vmopv1.VirtualMachineConditionBootstrapReady, reasonNotReady, "spec.bootstrap is not supported by this server: remove it")
			return nil
		}
		condition.True(&vm.Status.Conditions, vmopv1.VirtualMachineConditionBootstrapReady)
		return nil
	}
	in := BootstrapInput{VM: vm, NICs: v.nics, Image: v.image, Hostname: machine.Hostname(vm), LastInstanceID: vm.Annotations[InstanceAnnotation]}
	if vm.Spec.Network != nil {
		in.Domain = vm.Spec.Network.DomainName
	}
	seed, err := r.Bootstrap.Render(ctx, in)
	if status := apierrors.APIStatus(nil); err != nil && errors.As(err, &status) && !apierrors.IsNotFound(err) {
		return fmt.Errorf("making the seed disk: %w", err)
	}
	if err != nil {
		reason := reasonNotReady
		if apierrors.IsNotFound(err) {
			reason = reasonNotFound
		}
		v.lacks(vmopv1.VirtualMachineConditionBootstrapReady, reason, "%v", err)
		v.soon(lookAgain) // Secrets are not watched
		return nil
	}
	v.seed = seed
	condition.True(&vm.Status.Conditions, vmopv1.VirtualMachineConditionBootstrapReady)
	return nil
}

// seedSecret writes the seed's files, and returns the name of their Secret, empty when there are none.
func (r *Reconciler) seedSecret(ctx context.Context, v *view) (string, error) {
	if v.seed == nil {
		return "", nil
	}
	sum := sha256.New()
	for _, name := range slices.Sorted(maps.Keys(v.seed.Files)) {
		fmt.Fprintf(sum, "%s %d\n", name, len(v.seed.Files[name]))
		sum.Write(v.seed.Files[name])
	}
	secret := &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: v.vm.Namespace, Name: fmt.Sprintf("%s-seed-%.5x", v.vm.Name, sum.Sum(nil)),
			Labels:          map[string]string{machinev1.NameLabel: v.vm.Name, machinev1.UIDLabel: string(v.vm.UID)},
			OwnerReferences: []metav1.OwnerReference{*metav1.NewControllerRef(v.vm, vmopv1.GroupVersion.WithKind("VirtualMachine"))},
		},
		Immutable: new(true),
		Data:      v.seed.Files,
	}
	switch err := r.Create(ctx, secret); {
	case err == nil || apierrors.IsAlreadyExists(err):
	case !apierrors.IsForbidden(err) || apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause):
		return "", fmt.Errorf("making the seed Secret: %w", err)
	case r.Live.Get(ctx, client.ObjectKeyFromObject(secret), &corev1.Secret{}) != nil: // a quota refuses also what is there already
		v.lacks(vmopv1.VirtualMachineConditionBootstrapReady, reasonNotReady, "the Secret of the seed disk cannot be made: %v", err)
		v.soon(retryMost)
		return "", nil
	}
	for _, note := range v.seed.Notes {
		r.Events.Eventf(v.vm, nil, corev1.EventTypeWarning, "Bootstrap", "Bootstrap", "%s", note)
	}
	return secret.Name, r.noteInstance(ctx, v)
}

// noteInstance keeps the instance that a guest is customized as, and takes note that what was asked for once is done.
func (r *Reconciler) noteInstance(ctx context.Context, v *view) error {
	vm := v.vm
	if vm.Spec.Bootstrap == nil || vm.Spec.Bootstrap.LinuxPrep == nil {
		return nil
	}
	again := vm.Spec.Bootstrap.LinuxPrep.CustomizeAtNextPowerOn
	if vm.Annotations[InstanceAnnotation] == v.seed.InstanceID && !ptr.Deref(again, false) {
		return nil
	}
	before, status := vm.DeepCopy(), vm.Status.DeepCopy()
	metav1.SetMetaDataAnnotation(&vm.ObjectMeta, InstanceAnnotation, v.seed.InstanceID)
	if again != nil {
		vm.Spec.Bootstrap.LinuxPrep.CustomizeAtNextPowerOn = new(false)
	}
	err := r.Patch(ctx, vm, client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{}))
	vm.Status = *status
	if err != nil {
		return fmt.Errorf("keeping the instance of the guest: %w", err)
	}
	return nil
}

// deleteSeed deletes the seed of a pod that has ended.
func (r *Reconciler) deleteSeed(ctx context.Context, p *corev1.Pod) error {
	for _, vol := range p.Spec.Volumes {
		if vol.Name != machinev1.SeedVolume || vol.Secret == nil {
			continue
		}
		secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: p.Namespace, Name: vol.Secret.SecretName}}
		if err := r.Delete(ctx, secret); err != nil && !apierrors.IsNotFound(err) {
			return fmt.Errorf("deleting the seed Secret: %w", err)
		}
	}
	return nil
}
