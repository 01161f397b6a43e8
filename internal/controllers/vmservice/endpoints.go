package vmservice

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"

	"atoll.dev/atoll/internal/controllers/condition"
)

const (
	managedBy = "virtualmachineservice.atoll.dev"
	// skipMirror: the EndpointSlices are not made of the Endpoints.
	skipMirror = "endpointslice.kubernetes.io/skip-mirror"
	// maxEndpoints is what an EndpointSlice takes.
	maxEndpoints = 1000
)

// endpoint is one virtual machine behind a service.
type endpoint struct {
	vm      *vmopv1.VirtualMachine
	address netip.Addr
	ready   bool
}

// endpoints writes the addresses of the matching virtual machines.
func (r *Reconciler) endpoints(ctx context.Context, s *vmopv1.VirtualMachineService, made *corev1.Service) error {
	var vms vmopv1.VirtualMachineList
	err := r.List(ctx, &vms, client.InNamespace(s.Namespace), client.MatchingLabelsSelector{Selector: labels.SelectorFromSet(s.Spec.Selector)})
	if err != nil {
		return fmt.Errorf("listing the virtual machines of the selector: %w", err)
	}
	list := match(vms.Items)
	if len(list) > maxEndpoints {
		return refusal("spec.selector matches %d virtual machines, a service takes %d; narrow it", len(list), maxEndpoints)
	}
	for _, family := range []discoveryv1.AddressType{discoveryv1.AddressTypeIPv4, discoveryv1.AddressTypeIPv6} {
		if err := r.slice(ctx, s, made, family, list); err != nil {
			return err
		}
	}
	return r.legacy(ctx, s, made, list)
}

// match returns the endpoints that virtual machines are, in the order of their names.
func match(vms []vmopv1.VirtualMachine) []endpoint {
	var out []endpoint
	for i := range vms {
		vm := &vms[i]
		if !vm.DeletionTimestamp.IsZero() || vm.Status.PowerState != vmopv1.VirtualMachinePowerStateOn || vm.Status.Network == nil {
			continue
		}
		for _, text := range []string{vm.Status.Network.PrimaryIP4, vm.Status.Network.PrimaryIP6} {
			address, err := netip.ParseAddr(text)
			if err != nil || address.IsLoopback() || address.IsUnspecified() || address.IsMulticast() || address.IsLinkLocalUnicast() || address.Zone() != "" {
				continue // what the guest said is no address to send anybody to
			}
			out = append(out, endpoint{vm: vm, address: address.Unmap(), ready: isReady(vm)})
		}
	}
	slices.SortFunc(out, func(a, b endpoint) int {
		return cmp.Or(cmp.Compare(a.vm.Name, b.vm.Name), a.address.Compare(b.address))
	})
	return out
}

// isReady tells whether a virtual machine may get connections.
func isReady(vm *vmopv1.VirtualMachine) bool {
	p := vm.Spec.ReadinessProbe
	//nolint:staticcheck // TCP probes are deprecated by VMware, and work here
	if p == nil || p.TCPSocket == nil && p.GuestHeartbeat == nil && len(p.GuestInfo) == 0 {
		return true
	}
	return condition.IsTrue(vm.Status.Conditions, vmopv1.ReadyConditionType)
}

// slice writes the EndpointSlice of one address family, which goes when there are no addresses of the family.
func (r *Reconciler) slice(ctx context.Context, s *vmopv1.VirtualMachineService, made *corev1.Service, family discoveryv1.AddressType, list []endpoint) error {
	slice := &discoveryv1.EndpointSlice{ObjectMeta: metav1.ObjectMeta{Namespace: s.Namespace, Name: sliceName(s.Name, family)}}
	var out []discoveryv1.Endpoint
	for _, e := range list {
		if e.address.Is4() != (family == discoveryv1.AddressTypeIPv4) {
			continue
		}
		out = append(out, discoveryv1.Endpoint{
			Addresses:  []string{e.address.String()},
			Conditions: discoveryv1.EndpointConditions{Ready: new(e.ready), Serving: new(e.ready), Terminating: new(false)},
			TargetRef:  target(e.vm),
		})
		if e.vm.Status.NodeName != "" {
			out[len(out)-1].NodeName = new(e.vm.Status.NodeName)
		}
	}
	if len(out) == 0 && family == discoveryv1.AddressTypeIPv6 {
		if err := r.Get(ctx, client.ObjectKeyFromObject(slice), slice); err != nil {
			return client.IgnoreNotFound(err)
		}
		return client.IgnoreNotFound(r.Delete(ctx, slice))
	}
	_, err := controllerutil.CreateOrUpdate(ctx, r.Client, slice, func() error {
		if slice.ResourceVersion != "" && !metav1.IsControlledBy(slice, s) {
			return refusal("there is an EndpointSlice %q that was not made for it", slice.Name)
		}
		slice.Labels = maps.Clone(s.Labels)
		metav1.SetMetaDataLabel(&slice.ObjectMeta, discoveryv1.LabelServiceName, s.Name)
		metav1.SetMetaDataLabel(&slice.ObjectMeta, discoveryv1.LabelManagedBy, managedBy)
		slice.AddressType = family
		slice.Endpoints = out
		slice.Ports = nil
		for _, p := range made.Spec.Ports {
			slice.Ports = append(slice.Ports, discoveryv1.EndpointPort{Name: new(p.Name), Protocol: new(p.Protocol), Port: new(p.TargetPort.IntVal)})
		}
		return controllerutil.SetControllerReference(s, slice, r.Scheme())
	})
	if err != nil {
		return fmt.Errorf("writing EndpointSlice %s: %w", slice.Name, err)
	}
	return nil
}

func sliceName(service string, family discoveryv1.AddressType) string {
	if family == discoveryv1.AddressTypeIPv6 {
		return service + "-vm6"
	}
	return service + "-vm"
}

func target(vm *vmopv1.VirtualMachine) *corev1.ObjectReference {
	return &corev1.ObjectReference{APIVersion: vmopv1.GroupVersion.String(), Kind: "VirtualMachine", Namespace: vm.Namespace, Name: vm.Name, UID: vm.UID}
}

// legacy writes the Endpoints, which nothing but clients of VM Operator reads.
//
//nolint:staticcheck // Endpoints are deprecated, and part of what VM Operator promises.
func (r *Reconciler) legacy(ctx context.Context, s *vmopv1.VirtualMachineService, made *corev1.Service, list []endpoint) error {
	object := &corev1.Endpoints{ObjectMeta: metav1.ObjectMeta{Namespace: s.Namespace, Name: s.Name}}
	var subset corev1.EndpointSubset
	for _, e := range list {
		address := corev1.EndpointAddress{IP: e.address.String(), TargetRef: target(e.vm)}
		if e.vm.Status.NodeName != "" {
			address.NodeName = new(e.vm.Status.NodeName)
		}
		if e.ready {
			subset.Addresses = append(subset.Addresses, address)
		} else {
			subset.NotReadyAddresses = append(subset.NotReadyAddresses, address)
		}
	}
	for _, p := range made.Spec.Ports {
		subset.Ports = append(subset.Ports, corev1.EndpointPort{Name: p.Name, Protocol: p.Protocol, Port: p.TargetPort.IntVal})
	}
	_, err := controllerutil.CreateOrUpdate(ctx, r.Client, object, func() error {
		if object.ResourceVersion != "" && !metav1.IsControlledBy(object, s) {
			return refusal("there are Endpoints %q that were not made for it", object.Name)
		}
		object.Labels = maps.Clone(s.Labels)
		metav1.SetMetaDataLabel(&object.ObjectMeta, skipMirror, "true")
		for k, v := range s.Annotations {
			if k != lastApplied && k != ProblemAnnotation {
				metav1.SetMetaDataAnnotation(&object.ObjectMeta, k, v)
			}
		}
		object.Subsets = nil
		if len(list) > 0 && len(subset.Ports) > 0 {
			object.Subsets = []corev1.EndpointSubset{subset}
		}
		return controllerutil.SetControllerReference(s, object, r.Scheme())
	})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		return fmt.Errorf("writing Endpoints %s: %w", s.Name, err)
	}
	return nil
}
