// Package admission sets defaults of VirtualMachines and refuses those that cannot be, as VM Operator's webhooks do.
//
// The API server calls it with v1alpha5, whatever version a client wrote. What only time can tell, such as a class that
// is not there yet, is accepted and named in a condition by the controller. An error names the field and the way out.
//
// What can go wrong: the cache is behind, so what is looked for is looked for again past it before a request is refused.
package admission

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/google/uuid"
	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/util/validation/field"
	"k8s.io/utils/clock"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"
	"sigs.k8s.io/controller-runtime/pkg/webhook/admission"

	admissionv1 "k8s.io/api/admission/v1"

	"atoll.dev/atoll/internal/controllers/virtualmachine"
	"atoll.dev/atoll/internal/controllers/virtualmachine/placement"
	"atoll.dev/atoll/internal/controllers/virtualmachineclass"
	"atoll.dev/atoll/internal/controllers/vmgroup"
)

// Index of VirtualMachines by what must be unique: UUIDs and MAC addresses.
const uniqueIndex = "atoll.unique"

// Webhook sets defaults and validates.
type Webhook struct {
	// Cached and Live read; Live past the cache.
	Cached client.Reader
	Live   client.Reader
	Clock  clock.PassiveClock
}

// Setup adds the webhooks to a manager.
func Setup(mgr ctrl.Manager) error {
	err := mgr.GetFieldIndexer().IndexField(context.Background(), &vmopv1.VirtualMachine{}, uniqueIndex, unique)
	if err != nil {
		return fmt.Errorf("setting up the webhooks of VirtualMachines: %w", err)
	}
	w := &Webhook{Cached: mgr.GetClient(), Live: mgr.GetAPIReader(), Clock: clock.RealClock{}}
	if err := ctrl.NewWebhookManagedBy(mgr, &vmopv1.VirtualMachine{}).WithDefaulter(w).WithValidator(w).Complete(); err != nil {
		return fmt.Errorf("setting up the webhooks of VirtualMachines: %w", err)
	}
	return nil
}

// old is the object before an update, nil at a creation.
func old(ctx context.Context, scheme decoder) (*vmopv1.VirtualMachine, error) {
	req, err := admission.RequestFromContext(ctx)
	if err != nil || req.Operation != admissionv1.Update {
		return nil, nil
	}
	vm := &vmopv1.VirtualMachine{}
	if err := scheme(req.OldObject.Raw, vm); err != nil {
		return nil, fmt.Errorf("reading the object before the change: %w", err)
	}
	return vm, nil
}

type decoder func([]byte, any) error

// Default implements admission.Defaulter.
func (w *Webhook) Default(ctx context.Context, vm *vmopv1.VirtualMachine) error {
	before, err := old(ctx, unmarshal)
	if err != nil {
		return err
	}
	if vm.DeletionTimestamp != nil || before != nil && equality.Semantic.DeepEqual(before.Spec, vm.Spec) {
		return nil
	}
	var errs field.ErrorList
	errs = append(errs, w.restartTime(vm, before)...)
	if before != nil {
		keep(vm, before)
	}
	if before == nil {
		controllerutil.AddFinalizer(vm, virtualmachine.Finalizer) // else it is the controller's first write
		if vm.Spec.PowerState == "" {
			if vm.Spec.PowerState, err = w.firstState(ctx, vm); err != nil {
				return err
			}
		}
	}
	if vm.Spec.BiosUUID == "" {
		vm.Spec.BiosUUID = uuid.NewString()
	}
	if vm.Spec.InstanceUUID == "" {
		vm.Spec.InstanceUUID = uuid.NewString()
	}
	if b := vm.Spec.Bootstrap; b != nil && b.CloudInit != nil && b.CloudInit.InstanceID == "" && before == nil {
		b.CloudInit.InstanceID = vm.Spec.BiosUUID
	}
	network(vm)
	if before == nil || vm.Spec.Image == nil && vm.Spec.ImageName != "" {
		problems, err := w.image(ctx, vm)
		if err != nil {
			return err
		}
		errs = append(errs, problems...)
	}
	if err := w.class(ctx, vm); err != nil {
		return err
	}
	modes(vm)
	if err := w.places(ctx, vm); err != nil {
		return err
	}
	return refuse(vm, errs)
}

// firstState is the power state of a new machine that has none: on. One whose group, or a group above that, has a power
// state and an order in which its members get it, waits for its turn; the groups' controller gives it that state then.
func (w *Webhook) firstState(ctx context.Context, vm *vmopv1.VirtualMachine) (vmopv1.VirtualMachinePowerState, error) {
	const on, off = vmopv1.VirtualMachinePowerStateOn, vmopv1.VirtualMachinePowerStateOff
	var member vmgroup.Member = vm
	for range vmgroup.MaxDepth {
		name := member.GetGroupName()
		if name == "" {
			break
		}
		g := &vmopv1.VirtualMachineGroup{}
		err := w.Live.Get(ctx, client.ObjectKey{Namespace: vm.Namespace, Name: name}, g)
		if err != nil && !apierrors.IsNotFound(err) {
			return "", fmt.Errorf("reading the group of the machine: %w", err)
		}
		if err != nil || g.DeletionTimestamp != nil || !vmgroup.Lists(g, member) {
			break
		}
		if state := g.Spec.PowerState; state == on || state == off {
			return off, nil
		} else if state != "" { // a machine that is off cannot become suspended
			break
		}
		member = g
	}
	return on, nil
}

// refuse is the answer of the API server to errors.
func refuse(vm *vmopv1.VirtualMachine, errs field.ErrorList) error {
	if len(errs) == 0 {
		return nil
	}
	return apierrors.NewInvalid(vmopv1.GroupVersion.WithKind("VirtualMachine").GroupKind(), vm.Name, errs)
}

// restartTime makes a time of "now".
func (w *Webhook) restartTime(vm, before *vmopv1.VirtualMachine) field.ErrorList {
	path := field.NewPath("spec", "nextRestartTime")
	last := ""
	if before != nil {
		last = before.Spec.NextRestartTime
	}
	switch value := vm.Spec.NextRestartTime; {
	case value == last:
	case value == "":
		vm.Spec.NextRestartTime = last
	case !strings.EqualFold(value, "now"):
		return field.ErrorList{field.Invalid(path, value, `may only be set to "now"`)}
	case before == nil:
		vm.Spec.NextRestartTime = "" // it has not run yet
	case vm.Spec.PowerState != vmopv1.VirtualMachinePowerStateOn:
		return field.ErrorList{field.Forbidden(path, "only a virtual machine whose spec.powerState is PoweredOn can be restarted")}
	default:
		at := w.Clock.Now().UTC()
		// Restarts are told apart by the second.
		if was, err := time.Parse(time.RFC3339Nano, last); err == nil && !at.Truncate(time.Second).After(was) {
			at = was.Truncate(time.Second).Add(time.Second)
		}
		vm.Spec.NextRestartTime = at.Format(time.RFC3339Nano)
	}
	return nil
}

// keep gives back what a client has left out that must not change.
func keep(vm, before *vmopv1.VirtualMachine) {
	for _, s := range []struct{ now, was *string }{
		{&vm.Spec.BiosUUID, &before.Spec.BiosUUID},
		{&vm.Spec.InstanceUUID, &before.Spec.InstanceUUID},
	} {
		if *s.now == "" {
			*s.now = *s.was
		}
	}
	if vm.Spec.Image == nil && (vm.Spec.ImageName == "" || vm.Spec.ImageName == before.Spec.ImageName) {
		vm.Spec.Image = before.Spec.Image.DeepCopy()
	}
	for i := range vm.Spec.Volumes {
		v := &vm.Spec.Volumes[i]
		for _, was := range before.Spec.Volumes {
			if v.Name == was.Name && v.ControllerType == "" && v.ControllerBusNumber == nil && v.UnitNumber == nil {
				v.ControllerType, v.ControllerBusNumber, v.UnitNumber = was.ControllerType, was.ControllerBusNumber, was.UnitNumber
			}
		}
	}
	if vm.Spec.Hardware == nil || before.Spec.Hardware == nil {
		return
	}
	for i := range vm.Spec.Hardware.Cdrom {
		c := &vm.Spec.Hardware.Cdrom[i]
		for _, was := range before.Spec.Hardware.Cdrom {
			if c.Name == was.Name && c.ControllerType == "" && c.ControllerBusNumber == nil && c.UnitNumber == nil {
				c.ControllerType, c.ControllerBusNumber, c.UnitNumber = was.ControllerType, was.ControllerBusNumber, was.UnitNumber
			}
		}
	}
}

// network adds the interface that every machine has.
func network(vm *vmopv1.VirtualMachine) {
	if vm.Spec.Network == nil {
		vm.Spec.Network = &vmopv1.VirtualMachineNetworkSpec{}
	}
	if n := vm.Spec.Network; !n.Disabled && len(n.Interfaces) == 0 {
		n.Interfaces = []vmopv1.VirtualMachineNetworkInterfaceSpec{{Name: "eth0"}}
	}
}

// class fills in the class of a class instance.
func (w *Webhook) class(ctx context.Context, vm *vmopv1.VirtualMachine) error {
	if vm.Spec.Class == nil || vm.Spec.Class.Name == "" || vm.Spec.ClassName != "" {
		return nil
	}
	i := &vmopv1.VirtualMachineClassInstance{}
	err := w.get(ctx, client.ObjectKey{Namespace: vm.Namespace, Name: vm.Spec.Class.Name}, i)
	if err == nil {
		vm.Spec.ClassName = virtualmachineclass.ClassOf(i)
	}
	return client.IgnoreNotFound(err)
}

// get asks the cache, and if that does not know, the API server.
func (w *Webhook) get(ctx context.Context, key client.ObjectKey, obj client.Object) error {
	err := w.Cached.Get(ctx, key, obj)
	if apierrors.IsNotFound(err) {
		err = w.Live.Get(ctx, key, obj)
	}
	return err
}

// modes sets how volumes are used.
func modes(vm *vmopv1.VirtualMachine) {
	for i := range vm.Spec.Volumes {
		v := &vm.Spec.Volumes[i]
		if v.DiskMode == "" {
			v.DiskMode = vmopv1.VolumeDiskModePersistent
			if v.ApplicationType != "" {
				v.DiskMode = vmopv1.VolumeDiskModeIndependentPersistent
			}
		}
		if v.SharingMode == "" {
			v.SharingMode = vmopv1.VolumeSharingModeNone
			if v.ApplicationType == vmopv1.VolumeApplicationTypeOracleRAC {
				v.SharingMode = vmopv1.VolumeSharingModeMultiWriter
			}
		}
	}
}

// places puts disks and drives on controllers. What cannot be is for Validate to say.
func (w *Webhook) places(ctx context.Context, vm *vmopv1.VirtualMachine) error {
	boot, err := w.boot(ctx, vm)
	if err != nil {
		return err
	}
	_ = placement.Assign(&vm.Spec, boot)
	return nil
}

// boot is the place of the boot disk, nil when there is none.
func (w *Webhook) boot(ctx context.Context, vm *vmopv1.VirtualMachine) (*placement.Slot, error) {
	ref := vm.Spec.Image
	if ref == nil {
		return nil, nil
	}
	var status *vmopv1.VirtualMachineImageStatus
	var err error
	if ref.Kind == clusterImage {
		i := &vmopv1.ClusterVirtualMachineImage{}
		err, status = w.Cached.Get(ctx, client.ObjectKey{Name: ref.Name}, i), &i.Status
	} else {
		i := &vmopv1.VirtualMachineImage{}
		err, status = w.Cached.Get(ctx, client.ObjectKey{Namespace: vm.Namespace, Name: ref.Name}, i), &i.Status
	}
	slot := placement.Boot(status)
	return &slot, client.IgnoreNotFound(err)
}
