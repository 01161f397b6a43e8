package admission

import (
	"context"
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"strings"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/util/sets"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/apimachinery/pkg/util/validation/field"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/webhook/admission"

	"atoll.dev/atoll/internal/controllers/virtualmachine/machine"
	"atoll.dev/atoll/internal/controllers/virtualmachine/placement"
	"atoll.dev/atoll/internal/controllers/virtualmachine/pod"
	"atoll.dev/atoll/internal/datadir/pki"
)

// storageQuotaSuffix ends the names of quotas for storage classes, which are the list of those a namespace may use.
const storageQuotaSuffix = ".storageclass.storage.k8s.io/requests.storage"

func unmarshal(data []byte, into any) error { return json.Unmarshal(data, into) }

// ValidateCreate implements admission.Validator.
func (w *Webhook) ValidateCreate(ctx context.Context, vm *vmopv1.VirtualMachine) (admission.Warnings, error) {
	var errs field.ErrorList
	spec := field.NewPath("spec")
	if len(vm.Name) > validation.LabelValueMaxLength {
		errs = append(errs, field.TooLong(field.NewPath("metadata", "name"), vm.Name, validation.LabelValueMaxLength))
	}
	switch vm.Spec.PowerState {
	case vmopv1.VirtualMachinePowerStateSuspended:
		errs = append(errs, field.Invalid(spec.Child("powerState"), vm.Spec.PowerState, "cannot set a new VM's power state to Suspended: make it PoweredOn first"))
	}
	if vm.Spec.ClassName == "" && vm.Spec.Class == nil {
		errs = append(errs, field.Required(spec.Child("className"), "name a VirtualMachineClass; kubectl get vmclass lists them"))
	}
	if vm.Spec.Image == nil && vm.Spec.ImageName == "" && (vm.Spec.Hardware == nil || len(vm.Spec.Hardware.Cdrom) == 0) {
		errs = append(errs, field.Required(spec.Child("image"), "name an image, or a CD-ROM in spec.hardware.cdrom to install from"))
	}
	if vm.Spec.CurrentSnapshotName != "" {
		errs = append(errs, field.Forbidden(spec.Child("currentSnapshotName"), "a new virtual machine has no snapshots"))
	}
	errs = append(errs, w.common(ctx, vm)...)
	more, err := w.storageClass(ctx, vm)
	if err != nil {
		return nil, err
	}
	taken, err := w.duplicates(ctx, vm)
	if err != nil {
		return nil, err
	}
	return nil, refuse(vm, slices.Concat(errs, more, taken))
}

// ours tells whether the request is one of our own controllers.
func ours(ctx context.Context) bool {
	req, err := admission.RequestFromContext(ctx)
	return err == nil && req.UserInfo.Username == pki.VMControllerUser
}

// ValidateDelete implements admission.Validator.
func (w *Webhook) ValidateDelete(context.Context, *vmopv1.VirtualMachine) (admission.Warnings, error) {
	return nil, nil
}

// ValidateUpdate implements admission.Validator.
func (w *Webhook) ValidateUpdate(ctx context.Context, before, vm *vmopv1.VirtualMachine) (admission.Warnings, error) {
	if vm.DeletionTimestamp != nil || equality.Semantic.DeepEqual(before.Spec, vm.Spec) &&
		before.Annotations[machine.CrashAnnotation] == vm.Annotations[machine.CrashAnnotation] {
		return nil, nil
	}
	var errs field.ErrorList
	if !ours(ctx) { // going back to a snapshot changes what people cannot
		errs = changes(before, vm)
	}
	errs = append(errs, w.common(ctx, vm)...)
	taken, err := w.duplicates(ctx, vm)
	if err != nil {
		return nil, err
	}
	return nil, refuse(vm, append(errs, taken...))
}

// common is what holds at any time.
func (w *Webhook) common(ctx context.Context, vm *vmopv1.VirtualMachine) field.ErrorList {
	spec := field.NewPath("spec")
	var errs field.ErrorList
	if crash := []string{machine.CrashRestart, machine.CrashKeep}; vm.Annotations[machine.CrashAnnotation] != "" && !slices.Contains(crash, vm.Annotations[machine.CrashAnnotation]) {
		errs = append(errs, field.NotSupported(field.NewPath("metadata", "annotations").Key(machine.CrashAnnotation), vm.Annotations[machine.CrashAnnotation], crash))
	}
	if ref := vm.Spec.Image; ref != nil {
		errs = append(errs, imageRef(spec.Child("image"), *ref)...)
	}
	if vm.Spec.Affinity != nil && vm.Spec.GroupName == "" {
		errs = append(errs, field.Required(spec.Child("groupName"), "affinity needs a group: name a VirtualMachineGroup, or remove spec.affinity"))
	}
	errs = append(errs, affinity(spec.Child("affinity"), vm.Spec.Affinity)...)
	errs = append(errs, disks(vm)...)
	if boot, err := w.boot(ctx, vm); err == nil {
		errs = append(errs, placement.Assign(&vm.DeepCopy().Spec, boot)...)
	}
	errs = append(errs, hardware(vm)...)
	errs = append(errs, networks(vm)...)
	errs = append(errs, probe(spec.Child("readinessProbe"), vm.Spec.ReadinessProbe)...)
	errs = append(errs, bootstrap(spec.Child("bootstrap"), vm.Spec.Bootstrap)...)
	errs = append(errs, bootOrder(vm)...)
	if a := vm.Spec.Advanced; a != nil && a.BootDiskCapacity != nil && a.BootDiskCapacity.Sign() < 0 {
		errs = append(errs, field.Invalid(spec.Child("advanced", "bootDiskCapacity"), a.BootDiskCapacity.String(), "must not be negative"))
	}
	return errs
}

func imageRef(path *field.Path, ref vmopv1.VirtualMachineImageRef) field.ErrorList {
	var errs field.ErrorList
	if ref.Kind != namespaceImage && ref.Kind != clusterImage {
		errs = append(errs, field.NotSupported(path.Child("kind"), ref.Kind, []string{namespaceImage, clusterImage}))
	}
	if ref.Name == "" {
		errs = append(errs, field.Required(path.Child("name"), "name an image"))
	}
	return errs
}

func affinity(path *field.Path, a *vmopv1.AffinitySpec) field.ErrorList {
	var errs field.ErrorList
	if a == nil {
		return nil
	}
	terms := func(path *field.Path, list []vmopv1.VMAffinityTerm) {
		for i, t := range list {
			if t.TopologyKey == "" {
				errs = append(errs, field.Required(path.Index(i).Child("topologyKey"), "name a label of nodes, such as topology.kubernetes.io/zone or kubernetes.io/hostname"))
			}
		}
	}
	const required, preferred = "requiredDuringSchedulingPreferredDuringExecution", "preferredDuringSchedulingPreferredDuringExecution"
	if v := a.VMAffinity; v != nil {
		terms(path.Child("vmAffinity", required), v.RequiredDuringSchedulingPreferredDuringExecution)
		terms(path.Child("vmAffinity", preferred), v.PreferredDuringSchedulingPreferredDuringExecution)
	}
	if v := a.VMAntiAffinity; v != nil {
		terms(path.Child("vmAntiAffinity", required), v.RequiredDuringSchedulingPreferredDuringExecution)
		terms(path.Child("vmAntiAffinity", preferred), v.PreferredDuringSchedulingPreferredDuringExecution)
	}
	return errs
}

// disks checks volumes.
func disks(vm *vmopv1.VirtualMachine) field.ErrorList {
	var errs field.ErrorList
	names, claims := sets.New[string](), sets.New[string]()
	for i, v := range vm.Spec.Volumes {
		path := field.NewPath("spec", "volumes").Index(i)
		for _, problem := range validation.IsDNS1123Subdomain(v.Name) {
			errs = append(errs, field.Invalid(path.Child("name"), v.Name, problem))
		}
		if names.Has(v.Name) {
			errs = append(errs, field.Duplicate(path.Child("name"), v.Name))
		}
		names.Insert(v.Name)
		if v.PersistentVolumeClaim == nil || v.PersistentVolumeClaim.ClaimName == "" {
			errs = append(errs, field.Required(path.Child("persistentVolumeClaim", "claimName"), "name a PersistentVolumeClaim"))
			continue
		}
		claim := v.PersistentVolumeClaim.ClaimName
		if claims.Has(claim) {
			errs = append(errs, field.Duplicate(path.Child("persistentVolumeClaim", "claimName"), claim))
		}
		claims.Insert(claim)
		if v.SharingMode == vmopv1.VolumeSharingModeMultiWriter && (v.DiskMode == vmopv1.VolumeDiskModeNonPersistent || v.DiskMode == vmopv1.VolumeDiskModeIndependentNonPersistent) {
			errs = append(errs, field.Invalid(path.Child("diskMode"), v.DiskMode, "a shared volume is always persistent: use Persistent or IndependentPersistent"))
		}
	}
	return errs
}

// hardware checks controllers and drives.
func hardware(vm *vmopv1.VirtualMachine) field.ErrorList {
	h := vm.Spec.Hardware
	if h == nil {
		return nil
	}
	path := field.NewPath("spec", "hardware")
	var errs field.ErrorList
	check := func(name string, typ vmopv1.VirtualControllerType, numbers []int32) {
		seen := sets.New[int32]()
		for i, n := range numbers {
			at := path.Child(name).Index(i).Child("busNumber")
			if n < 0 || n >= typ.MaxCount() {
				errs = append(errs, field.Invalid(at, n, fmt.Sprintf("%s controllers have the numbers 0 to %d", typ, typ.MaxCount()-1)))
			}
			if seen.Has(n) {
				errs = append(errs, field.Duplicate(at, n))
			}
			seen.Insert(n)
		}
	}
	check("ideControllers", vmopv1.VirtualControllerTypeIDE, numbers(h.IDEControllers, func(c vmopv1.IDEControllerSpec) int32 { return c.BusNumber }))
	check("nvmeControllers", vmopv1.VirtualControllerTypeNVME, numbers(h.NVMEControllers, func(c vmopv1.NVMEControllerSpec) int32 { return c.BusNumber }))
	check("sataControllers", vmopv1.VirtualControllerTypeSATA, numbers(h.SATAControllers, func(c vmopv1.SATAControllerSpec) int32 { return c.BusNumber }))
	check("scsiControllers", vmopv1.VirtualControllerTypeSCSI, numbers(h.SCSIControllers, func(c vmopv1.SCSIControllerSpec) int32 { return c.BusNumber }))
	if len(h.Cdrom) > 0 && vm.Spec.GuestID == "" {
		errs = append(errs, field.Required(field.NewPath("spec", "guestID"), "a virtual machine with a CD-ROM must say what system its guest has, such as otherLinux64Guest"))
	}
	names := sets.New[string]()
	for i, c := range h.Cdrom {
		at := path.Child("cdrom").Index(i)
		errs = append(errs, imageRef(at.Child("image"), c.Image)...)
		if names.Has(c.Name) {
			errs = append(errs, field.Duplicate(at.Child("name"), c.Name))
		}
		names.Insert(c.Name)
		if c.ControllerType != "" && c.ControllerType != vmopv1.VirtualControllerTypeIDE && c.ControllerType != vmopv1.VirtualControllerTypeSATA && c.ControllerType != vmopv1.VirtualControllerTypeSCSI {
			errs = append(errs, field.NotSupported(at.Child("controllerType"), c.ControllerType, []string{"IDE", "SATA", "SCSI"}))
		}
	}
	return errs
}

func numbers[T any](list []T, number func(T) int32) []int32 {
	var out []int32
	for _, c := range list {
		out = append(out, number(c))
	}
	return out
}

func probe(path *field.Path, p *vmopv1.VirtualMachineReadinessProbeSpec) field.ErrorList {
	if p == nil {
		return nil
	}
	var errs field.ErrorList
	actions := 0
	for _, set := range []bool{pod.TCPSocket(p) != nil, p.GuestHeartbeat != nil, len(p.GuestInfo) > 0} {
		if set {
			actions++
		}
	}
	if actions != 1 {
		errs = append(errs, field.Forbidden(path, "must have exactly one of tcpSocket, guestHeartbeat and guestInfo"))
	}
	if s := pod.TCPSocket(p); s != nil && (s.Port.IntValue() < 1 || s.Port.IntValue() > 65535) {
		errs = append(errs, field.Invalid(path.Child("tcpSocket", "port"), s.Port.String(), "must be a number from 1 to 65535"))
	}
	if s := pod.TCPSocket(p); s != nil && s.Host != "" {
		errs = append(errs, field.Invalid(path.Child("tcpSocket", "host"), s.Host, "the probe goes to the machine's own address: leave it empty"))
	}
	for i, info := range p.GuestInfo {
		if _, err := regexp.Compile(info.Value); err != nil {
			errs = append(errs, field.Invalid(path.Child("guestInfo").Index(i).Child("value"), info.Value, "must be a regular expression: "+err.Error()))
		}
	}
	return errs
}

// bootstrap checks that the providers go together.
func bootstrap(path *field.Path, b *vmopv1.VirtualMachineBootstrapSpec) field.ErrorList {
	if b == nil {
		return nil
	}
	var errs field.ErrorList
	if b.CloudInit != nil && (b.LinuxPrep != nil || b.Sysprep != nil || b.VAppConfig != nil) {
		errs = append(errs, field.Forbidden(path.Child("cloudInit"), "CloudInit may not be used with any other bootstrap provider"))
	}
	if b.LinuxPrep != nil && b.Sysprep != nil {
		errs = append(errs, field.Forbidden(path.Child("linuxPrep"), "LinuxPrep may not be used with Sysprep"))
	}
	if c := b.CloudInit; c != nil && c.CloudConfig != nil && c.RawCloudConfig != nil {
		errs = append(errs, field.Forbidden(path.Child("cloudInit"), "cloudConfig and rawCloudConfig are mutually exclusive"))
	}
	if s := b.Sysprep; s != nil && s.Sysprep != nil && s.RawSysprep != nil {
		errs = append(errs, field.Forbidden(path.Child("sysprep"), "sysprep and rawSysprep are mutually exclusive"))
	}
	if v := b.VAppConfig; v != nil && len(v.Properties) > 0 && v.RawProperties != "" {
		errs = append(errs, field.Forbidden(path.Child("vAppConfig"), "properties and rawProperties are mutually exclusive"))
	}
	return errs
}

// bootOrder checks that there is what is to be booted from.
func bootOrder(vm *vmopv1.VirtualMachine) field.ErrorList {
	if vm.Spec.BootOptions == nil {
		return nil
	}
	var errs field.ErrorList
	for i, d := range vm.Spec.BootOptions.BootOrder {
		at := field.NewPath("spec", "bootOptions", "bootOrder").Index(i).Child("name")
		var known []string
		switch d.Type {
		case vmopv1.VirtualMachineBootOptionsBootableDiskDevice:
			for _, v := range vm.Spec.Volumes {
				known = append(known, v.Name)
			}
			known = append(known, "boot")
		case vmopv1.VirtualMachineBootOptionsBootableNetworkDevice:
			if vm.Spec.Network != nil {
				for _, n := range vm.Spec.Network.Interfaces {
					known = append(known, n.Name)
				}
			}
		case vmopv1.VirtualMachineBootOptionsBootableCDRomDevice:
			if vm.Spec.Hardware != nil {
				for _, c := range vm.Spec.Hardware.Cdrom {
					known = append(known, c.Name)
				}
			}
		}
		if d.Name != "" && !slices.Contains(known, d.Name) {
			errs = append(errs, field.NotSupported(at, d.Name, known))
		}
	}
	return errs
}

// storageClass refuses a class that the namespace's quotas do not have, if they have any.
func (w *Webhook) storageClass(ctx context.Context, vm *vmopv1.VirtualMachine) (field.ErrorList, error) {
	if vm.Spec.StorageClass == "" {
		return nil, nil
	}
	var quotas corev1.ResourceQuotaList
	if err := w.Cached.List(ctx, &quotas, client.InNamespace(vm.Namespace)); err != nil {
		return nil, fmt.Errorf("listing ResourceQuotas: %w", err)
	}
	var allowed []string
	for _, q := range quotas.Items {
		for name := range q.Spec.Hard {
			if class, ok := strings.CutSuffix(string(name), storageQuotaSuffix); ok {
				allowed = append(allowed, class)
			}
		}
	}
	if len(allowed) == 0 || slices.Contains(allowed, vm.Spec.StorageClass) {
		return nil, nil
	}
	slices.Sort(allowed)
	return field.ErrorList{field.Invalid(field.NewPath("spec", "storageClass"), vm.Spec.StorageClass,
		fmt.Sprintf("Storage policy is not associated with the namespace %s: use one of %s", vm.Namespace, strings.Join(slices.Compact(allowed), ", ")))}, nil
}
