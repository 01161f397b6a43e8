// Package image is the controller of images: each library item has a VirtualMachineImage, or for items of the cluster
// a ClusterVirtualMachineImage, that says what virtual machines can know of it.
//
// The image's name is made of the item's UUID the way VMware makes it; the item owns the image, which goes with it.
// Everything comes from the item's status, which the agent of the host with the content writes
// (internal/controllers/libraryitem). It is set up in the server's manager, and touches no host.
//
// What can go wrong: an item is not complete, or never will be. The image's condition Ready says so with the item's
// own words.
package image

import (
	"context"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	vmopv1common "github.com/vmware-tanzu/vm-operator/api/v1alpha5/common"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"

	api "atoll.dev/atoll/api/imageregistry/v1alpha1"
)

// Setup adds the controller to a manager.
func Setup(mgr ctrl.Manager) error {
	err := ctrl.NewControllerManagedBy(mgr).Named("image").For(&api.ContentLibraryItem{}).Owns(&vmopv1.VirtualMachineImage{}).
		Complete(&reconciler{client: mgr.GetClient()})
	if err != nil {
		return fmt.Errorf("image controller: %w", err)
	}
	err = ctrl.NewControllerManagedBy(mgr).Named("clusterimage").For(&api.ClusterContentLibraryItem{}).Owns(&vmopv1.ClusterVirtualMachineImage{}).
		Complete(&reconciler{client: mgr.GetClient(), cluster: true})
	if err != nil {
		return fmt.Errorf("image controller: %w", err)
	}
	return nil
}

// reconciler makes images of items, of one scope.
type reconciler struct {
	client  client.Client
	cluster bool
}

// item is what both kinds of items have.
type item struct {
	client.Object
	spec   *api.ContentLibraryItemSpec
	status *api.ContentLibraryItemStatus
}

// image is what both kinds of images have.
type image struct {
	client.Object
	spec   *vmopv1.VirtualMachineImageSpec
	status *vmopv1.VirtualMachineImageStatus
}

func (r *reconciler) empty() (item, image) {
	if r.cluster {
		i, v := &api.ClusterContentLibraryItem{}, &vmopv1.ClusterVirtualMachineImage{}
		return item{i, &i.Spec, &i.Status}, image{v, &v.Spec, &v.Status}
	}
	i, v := &api.ContentLibraryItem{}, &vmopv1.VirtualMachineImage{}
	return item{i, &i.Spec, &i.Status}, image{v, &v.Spec, &v.Status}
}

// Reconcile implements reconcile.Reconciler.
func (r *reconciler) Reconcile(ctx context.Context, req ctrl.Request) (ctrl.Result, error) {
	i, v := r.empty()
	if err := r.client.Get(ctx, req.NamespacedName, i.Object); err != nil {
		return ctrl.Result{}, client.IgnoreNotFound(err)
	}
	if i.GetDeletionTimestamp() != nil {
		return ctrl.Result{}, nil
	}
	uuid := i.spec.UUID
	if uuid == "" {
		uuid = i.GetUID()
	}
	v.SetName(api.ImageName(uuid))
	v.SetNamespace(i.GetNamespace())
	err := r.client.Get(ctx, client.ObjectKeyFromObject(v), v.Object)
	missing := apierrors.IsNotFound(err)
	if err != nil && !missing {
		return ctrl.Result{}, fmt.Errorf("reading image %s: %w", v.GetName(), err)
	}
	was := v.DeepCopyObject().(client.Object)
	v.spec.ProviderRef = &vmopv1common.LocalObjectRef{APIVersion: api.GroupVersion().String(), Kind: r.kind(), Name: i.GetName()}
	v.SetLabels(labels(v.GetLabels(), i))
	if err := controllerutil.SetControllerReference(i.Object, v.Object, r.client.Scheme()); err != nil {
		return ctrl.Result{}, fmt.Errorf("image %s is not of item %s: %w", v.GetName(), i.GetName(), err)
	}
	switch {
	case missing:
		if err := r.client.Create(ctx, v.Object); err != nil {
			return ctrl.Result{}, fmt.Errorf("making image %s: %w", v.GetName(), err)
		}
		was = v.DeepCopyObject().(client.Object)
	case !equality.Semantic.DeepEqual(was, v.Object):
		if err := r.client.Patch(ctx, v.Object, client.MergeFrom(was)); err != nil {
			return ctrl.Result{}, fmt.Errorf("changing image %s: %w", v.GetName(), err)
		}
		was = v.DeepCopyObject().(client.Object)
	}
	fill(v.status, i, string(uuid))
	if equality.Semantic.DeepEqual(was, v.Object) {
		return ctrl.Result{}, nil
	}
	if err := r.client.Status().Patch(ctx, v.Object, client.MergeFrom(was)); err != nil {
		return ctrl.Result{}, fmt.Errorf("writing the status of image %s: %w", v.GetName(), err)
	}
	return ctrl.Result{}, nil
}

func (r *reconciler) kind() string {
	if r.cluster {
		return "ClusterContentLibraryItem"
	}
	return "ContentLibraryItem"
}

// capabilitiesProperty is the OVF property that lists what an image can do.
const capabilitiesProperty = "capabilities.image.vmoperator.vmware.com"

// systemPrefix begins the keys of properties for the system and not for people.
const systemPrefix = "vmware-system"

// fill writes the status of an image.
func fill(s *vmopv1.VirtualMachineImageStatus, i item, uuid string) {
	s.Name, s.ProviderItemID = i.status.Name, uuid
	if s.Name == "" {
		s.Name = i.GetName()
	}
	ready := metav1.Condition{Type: api.ReadyCondition, Status: metav1.ConditionTrue, Reason: "True"}
	if !i.status.Ready {
		ready.Status, ready.Reason = metav1.ConditionFalse, vmopv1.VirtualMachineImageProviderNotReadyReason
		ready.Message = "no host has looked at the library item yet"
		if c := meta.FindStatusCondition(i.status.Conditions, api.ReadyCondition); c != nil {
			ready.Message = strings.TrimSuffix(c.Reason+": "+c.Message, ": ")
		}
	}
	meta.SetStatusCondition(&s.Conditions, ready)
	if !i.status.Ready {
		return
	}
	s.ProviderContentVersion = i.status.ContentVersion
	s.Type = strings.ToUpper(string(i.status.Type))
	s.Firmware, s.OSInfo = i.spec.Firmware, osOf(i)
	s.Disks = disks(i.status)
	s.Capabilities, s.OVFProperties, s.VMwareSystemProperties, s.HardwareVersion = nil, nil, nil, nil
	s.ProductInfo = vmopv1.VirtualMachineImageProductInfo{}
	h := i.status.Hardware
	if h == nil {
		return
	}
	if h.Firmware != "" {
		s.Firmware = h.Firmware
	}
	if h.Version > 0 {
		s.HardwareVersion = &h.Version
	}
	s.ProductInfo = vmopv1.VirtualMachineImageProductInfo(h.Product)
	s.Capabilities = capabilities(i.status)
	for _, p := range h.Properties {
		switch {
		case p.UserConfigurable:
			s.OVFProperties = append(s.OVFProperties, vmopv1.OVFProperty{Key: p.Key, Type: p.Type, Default: p.Default})
		case strings.HasPrefix(p.Key, systemPrefix):
			value := ""
			if p.Default != nil {
				value = *p.Default
			}
			s.VMwareSystemProperties = append(s.VMwareSystemProperties, vmopv1common.KeyValuePair{Key: p.Key, Value: value})
		}
	}
}

// disks are the disks of an image. An ISO has none to be a machine's.
func disks(s *api.ContentLibraryItemStatus) []vmopv1.VirtualMachineImageDiskInfo {
	var out []vmopv1.VirtualMachineImageDiskInfo
	for _, d := range s.Disks {
		capacity := d.Capacity.DeepCopy()
		disk := vmopv1.VirtualMachineImageDiskInfo{Name: d.Name, Limit: &capacity, ControllerType: vmopv1.VirtualControllerType(d.ControllerType)}
		if len(s.Disks) == 1 {
			size := s.SizeInBytes.DeepCopy()
			disk.Requested = &size
		}
		if d.ControllerType != "" {
			bus, unit := d.ControllerBusNumber, d.UnitNumber
			disk.ControllerBusNumber, disk.UnitNumber = &bus, &unit
		}
		out = append(out, disk)
	}
	return out
}

func osOf(i item) vmopv1.VirtualMachineImageOSInfo {
	out := vmopv1.VirtualMachineImageOSInfo(i.spec.OS)
	if h := i.status.Hardware; h != nil && h.OS != (api.OSInfo{}) {
		out = vmopv1.VirtualMachineImageOSInfo(h.OS)
	}
	return out
}

func capabilities(s *api.ContentLibraryItemStatus) []string {
	var out []string
	if s.Hardware == nil {
		return nil
	}
	for _, p := range s.Hardware.Properties {
		if p.Key != capabilitiesProperty || p.Default == nil {
			continue
		}
		for c := range strings.SplitSeq(*p.Default, ",") {
			if c = strings.TrimSpace(c); labelName().MatchString(c) && !slices.Contains(out, c) {
				out = append(out, c)
			}
		}
	}
	return out
}

func labelName() *regexp.Regexp {
	return regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$`)
}

// labels are those of an image, with those that others have set.
func labels(old map[string]string, i item) map[string]string {
	out := maps.Clone(old)
	if out == nil {
		out = map[string]string{}
	}
	maps.DeleteFunc(out, func(k, _ string) bool { return strings.HasPrefix(k, vmopv1.VirtualMachineImageCapabilityLabel) })
	os := osOf(i)
	for key, value := range map[string]string{
		vmopv1.VirtualMachineImageOSIDLabel: os.ID, vmopv1.VirtualMachineImageOSTypeLabel: os.Type,
		vmopv1.VirtualMachineImageOSVersionLabel: os.Version, vmopv1.VirtualMachineImageTypeLabel: strings.ToUpper(string(i.status.Type)),
	} {
		delete(out, key)
		if labelName().MatchString(value) {
			out[key] = value
		}
	}
	for _, c := range capabilities(i.status) {
		out[vmopv1.VirtualMachineImageCapabilityLabel+c] = "true"
	}
	return out
}
