package vmservice

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/events"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"
)

func reconciler(t *testing.T, objects ...client.Object) *Reconciler {
	t.Helper()
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{vmopv1.AddToScheme, corev1.AddToScheme, discoveryv1.AddToScheme} {
		if err := add(scheme); err != nil {
			t.Fatal(err)
		}
	}
	c := fake.NewClientBuilder().WithScheme(scheme).WithObjects(objects...).
		WithStatusSubresource(&vmopv1.VirtualMachineService{}, &vmopv1.VirtualMachine{}, &corev1.Service{}).Build()
	return &Reconciler{Client: c, Events: events.NewFakeRecorder(100), Portal: 443, Range: netip.MustParsePrefix("10.97.0.0/29")}
}

func service(kind vmopv1.VirtualMachineServiceType, port int32) *vmopv1.VirtualMachineService {
	return &vmopv1.VirtualMachineService{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: "team", Name: "web", UID: "service-uid",
			Labels: map[string]string{"team": "red"}, Annotations: map[string]string{"example.com/a": "b", lastApplied: "{}"},
		},
		Spec: vmopv1.VirtualMachineServiceSpec{
			Type:     kind,
			Ports:    []vmopv1.VirtualMachineServicePort{{Name: "http", Protocol: "TCP", Port: port, TargetPort: 8080}},
			Selector: map[string]string{"app": "web"},
		},
	}
}

// machine has the label of the selector.
func machine(name, ip4 string, change ...func(*vmopv1.VirtualMachine)) *vmopv1.VirtualMachine {
	vm := &vmopv1.VirtualMachine{
		ObjectMeta: metav1.ObjectMeta{Namespace: "team", Name: name, UID: types.UID(name), Labels: map[string]string{"app": "web"}},
		Status: vmopv1.VirtualMachineStatus{
			PowerState: vmopv1.VirtualMachinePowerStateOn, NodeName: "host-1",
			Network: &vmopv1.VirtualMachineNetworkStatus{PrimaryIP4: ip4},
		},
	}
	for _, c := range change {
		c(vm)
	}
	return vm
}

func probed(status metav1.ConditionStatus) func(*vmopv1.VirtualMachine) {
	return func(vm *vmopv1.VirtualMachine) {
		vm.Spec.ReadinessProbe = &vmopv1.VirtualMachineReadinessProbeSpec{GuestHeartbeat: &vmopv1.GuestHeartbeatAction{}}
		if status != "" {
			vm.Status.Conditions = []metav1.Condition{{Type: vmopv1.ReadyConditionType, Status: status, Reason: "x"}}
		}
	}
}

func node(name, address string) *corev1.Node {
	return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}, Status: corev1.NodeStatus{
		Addresses:  []corev1.NodeAddress{{Type: corev1.NodeHostName, Address: name}, {Type: corev1.NodeInternalIP, Address: address}},
		Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}},
	}}
}

func (r *Reconciler) run(t *testing.T) (*vmopv1.VirtualMachineService, error) {
	t.Helper()
	key := types.NamespacedName{Namespace: "team", Name: "web"}
	_, err := r.Reconcile(t.Context(), ctrl.Request{NamespacedName: key})
	s := &vmopv1.VirtualMachineService{}
	if getErr := r.Get(t.Context(), key, s); getErr != nil {
		t.Fatal(getErr)
	}
	return s, err
}

func get[T client.Object](t *testing.T, r client.Client, name string, into T) T {
	t.Helper()
	if err := r.Get(t.Context(), types.NamespacedName{Namespace: "team", Name: name}, into); err != nil {
		t.Fatal(err)
	}
	return into
}

func TestEndpoints(t *testing.T) {
	r := reconciler(t, service("ClusterIP", 80),
		machine("plain", "10.244.0.5"),
		machine("probed", "10.244.0.6", probed(metav1.ConditionTrue)),
		machine("unready", "10.244.0.7", probed(metav1.ConditionFalse)),
		machine("unknown", "10.244.0.8", probed("")),
		machine("off", "10.244.0.9", func(vm *vmopv1.VirtualMachine) { vm.Status.PowerState = vmopv1.VirtualMachinePowerStateOff }),
		machine("other", "10.244.0.10", func(vm *vmopv1.VirtualMachine) { vm.Labels = nil }),
		machine("nonsense", "localhost"),
		machine("loop", "127.0.0.1"),
		machine("both", "10.244.0.11", func(vm *vmopv1.VirtualMachine) { vm.Status.Network.PrimaryIP6 = "fd00::11" }),
		machine("deleted", "10.244.0.12", func(vm *vmopv1.VirtualMachine) {
			vm.DeletionTimestamp, vm.Finalizers = new(metav1.Now()), []string{"x/y"}
		}),
	)
	s, err := r.run(t)
	if err != nil || s.Annotations[ProblemAnnotation] != "" {
		t.Fatalf("%v, %q", err, s.Annotations[ProblemAnnotation])
	}
	made := get(t, r.Client, "web", &corev1.Service{})
	if len(made.Spec.Selector) != 0 || made.Labels["team"] != "red" || made.Annotations["example.com/a"] != "b" || made.Annotations[lastApplied] != "" {
		t.Errorf("Service %+v", made)
	}
	if p := made.Spec.Ports; len(p) != 1 || p[0].Port != 80 || p[0].TargetPort.IntVal != 8080 {
		t.Errorf("ports %+v", p)
	}
	slice := get(t, r.Client, "web-vm", &discoveryv1.EndpointSlice{})
	var got []string
	for _, e := range slice.Endpoints {
		state := "-"
		if *e.Conditions.Ready {
			state = "+"
		}
		got = append(got, e.Addresses[0]+state)
	}
	if want := "10.244.0.11+ 10.244.0.5+ 10.244.0.6+ 10.244.0.8- 10.244.0.7-"; strings.Join(got, " ") != want {
		t.Errorf("endpoints %v, want %s", got, want)
	}
	if slice.Labels[discoveryv1.LabelServiceName] != "web" || *slice.Ports[0].Port != 8080 || *slice.Endpoints[0].NodeName != "host-1" {
		t.Errorf("slice %+v", slice)
	}
	if six := get(t, r.Client, "web-vm6", &discoveryv1.EndpointSlice{}); len(six.Endpoints) != 1 || six.AddressType != discoveryv1.AddressTypeIPv6 {
		t.Errorf("slice of IPv6 %+v", six)
	}
	//nolint:staticcheck // what clients of VM Operator read
	old := get(t, r.Client, "web", &corev1.Endpoints{})
	if len(old.Subsets) != 1 || len(old.Subsets[0].Addresses) != 4 || len(old.Subsets[0].NotReadyAddresses) != 2 || old.Labels[skipMirror] != "true" {
		t.Errorf("Endpoints %+v", old)
	}
}

func TestUnsupportedType(t *testing.T) {
	r := reconciler(t, service("ExternalName", 80))
	s, err := r.run(t)
	if err != nil || !strings.Contains(s.Annotations[ProblemAnnotation], "use ClusterIP or LoadBalancer") {
		t.Errorf("%v, %q", err, s.Annotations[ProblemAnnotation])
	}
	if err := r.Get(t.Context(), client.ObjectKeyFromObject(s), &corev1.Service{}); !apierrors.IsNotFound(err) {
		t.Errorf("a Service was made: %v", err)
	}
	s.Spec.Type = vmopv1.VirtualMachineServiceTypeClusterIP
	if err := r.Update(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	if s, err = r.run(t); err != nil || s.Annotations[ProblemAnnotation] != "" {
		t.Errorf("mended: %v, %q", err, s.Annotations[ProblemAnnotation])
	}
}

func TestForeignServiceStays(t *testing.T) {
	r := reconciler(t, service("ClusterIP", 80), &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: "team", Name: "web"}, Spec: corev1.ServiceSpec{Selector: map[string]string{"a": "b"}},
	})
	s, err := r.run(t)
	if err != nil || !strings.Contains(s.Annotations[ProblemAnnotation], "choose another name") {
		t.Errorf("%v, %q", err, s.Annotations[ProblemAnnotation])
	}
	if made := get(t, r.Client, "web", &corev1.Service{}); made.Spec.Selector["a"] != "b" {
		t.Error("a foreign Service was changed")
	}
}

func TestLoadBalancer(t *testing.T) {
	r := reconciler(t, service("LoadBalancer", 8443), node("host-2", "192.0.2.2"), node("host-1", "192.0.2.1"))
	s, err := r.run(t)
	if err != nil || len(s.Status.LoadBalancer.Ingress) != 1 || s.Status.LoadBalancer.Ingress[0].IP != "192.0.2.1" {
		t.Fatalf("%+v, %v", s.Status, err)
	}
	if made := get(t, r.Client, "web", &corev1.Service{}); made.Status.LoadBalancer.Ingress[0].IP != "192.0.2.1" {
		t.Errorf("Service %+v", made.Status)
	}
	// Others that want the same port get addresses of their own, as long as there are some, and keep them.
	for i := range 8 {
		other := service("LoadBalancer", 8443)
		other.Name, other.UID = fmt.Sprintf("web%d", i), types.UID(fmt.Sprint(i))
		if err := r.Create(t.Context(), other); err != nil {
			t.Fatal(err)
		}
		key := client.ObjectKeyFromObject(other)
		for range 2 {
			_, err := r.Reconcile(t.Context(), ctrl.Request{NamespacedName: key})
			got := &vmopv1.VirtualMachineService{}
			if err := r.Get(t.Context(), key, got); err != nil {
				t.Fatal(err)
			}
			if i >= 6 {
				if err == nil || len(got.Status.LoadBalancer.Ingress) != 0 || !strings.Contains(got.Annotations[ProblemAnnotation], "--load-balancer-range") {
					t.Errorf("%s: %+v, %q, %v", key.Name, got.Status, got.Annotations[ProblemAnnotation], err)
				}
				continue
			}
			if want := fmt.Sprintf("10.97.0.%d", i+1); err != nil || len(got.Status.LoadBalancer.Ingress) != 1 || got.Status.LoadBalancer.Ingress[0].IP != want {
				t.Errorf("%s: %+v, %v, want %s", key.Name, got.Status, err, want)
			}
		}
	}
}

func TestReservedPorts(t *testing.T) {
	for port, want := range map[int32]string{
		22: "10.97.0.1", 53: "10.97.0.1", 80: "192.0.2.1", 443: "10.97.0.1", 5432: "192.0.2.1", 6443: "10.97.0.1", 10250: "10.97.0.1",
		30000: "10.97.0.1", 40000: "192.0.2.1",
	} {
		r := reconciler(t, service("LoadBalancer", port), node("host-1", "192.0.2.1"))
		s, err := r.run(t)
		if err != nil || len(s.Status.LoadBalancer.Ingress) != 1 || s.Status.LoadBalancer.Ingress[0].IP != want || s.Annotations[ProblemAnnotation] != "" {
			t.Errorf("port %d: %+v, %q, %v", port, s.Status, s.Annotations[ProblemAnnotation], err)
		}
	}
}

// TestNodeAddressIsGivenUp: a Service that has the address of a node loses it before it gets ports that the host has
// there, or others, whatever its annotations say of that address.
func TestNodeAddressIsGivenUp(t *testing.T) {
	for _, port := range []int32{6443, 443, 5432} {
		for _, says := range []string{"", "203.0.113.1", "192.0.2.1"} {
			other := service("LoadBalancer", 5432)
			other.Name, other.UID = "other", "other-uid"
			r := reconciler(t, service("LoadBalancer", 8443), other, node("host-1", "192.0.2.1"))
			if _, err := r.Reconcile(t.Context(), ctrl.Request{NamespacedName: client.ObjectKeyFromObject(other)}); err != nil {
				t.Fatal(err)
			}
			s, err := r.run(t)
			if err != nil || s.Status.LoadBalancer.Ingress[0].IP != "192.0.2.1" {
				t.Fatalf("%+v, %v", s.Status, err)
			}
			metav1.SetMetaDataAnnotation(&s.ObjectMeta, ingressAnnotation, says)
			s.Spec.Ports[0].Port = port
			if err := r.Update(t.Context(), s); err != nil {
				t.Fatal(err)
			}
			r.Client = interceptor.NewClient(r.Client.(client.WithWatch), interceptor.Funcs{Update: func(ctx context.Context, c client.WithWatch, o client.Object, opts ...client.UpdateOption) error {
				if made, ok := o.(*corev1.Service); ok && len(made.Status.LoadBalancer.Ingress) > 0 {
					t.Errorf("port %d: %s gets ports %+v", port, made.Status.LoadBalancer.Ingress[0].IP, made.Spec.Ports)
				}
				return c.Update(ctx, o, opts...)
			}})
			if s, err = r.run(t); err != nil || len(s.Status.LoadBalancer.Ingress) != 1 || s.Status.LoadBalancer.Ingress[0].IP != "10.97.0.1" {
				t.Errorf("port %d, %q: %+v, %v", port, says, s.Status, err)
			}
		}
	}
}

// TestWantedAddress: an address of the range can be asked for; another is the node's business.
func TestWantedAddress(t *testing.T) {
	for wanted, want := range map[string]string{"10.97.0.5": "10.97.0.5", "203.0.113.4": "192.0.2.1", "nonsense": "192.0.2.1"} {
		s := service("LoadBalancer", 8443)
		s.Spec.LoadBalancerIP = wanted
		r := reconciler(t, s, node("host-1", "192.0.2.1"))
		got, err := r.run(t)
		if err != nil || len(got.Status.LoadBalancer.Ingress) != 1 || got.Status.LoadBalancer.Ingress[0].IP != want {
			t.Errorf("%s: %+v, %v", wanted, got.Status, err)
		}
	}
}

// TestForeignIngressStays: when there is a load balancer, its address is the one that is shown.
func TestForeignIngressStays(t *testing.T) {
	r := reconciler(t, service("LoadBalancer", 8443), node("host-1", "192.0.2.1"))
	if _, err := r.run(t); err != nil {
		t.Fatal(err)
	}
	made := get(t, r.Client, "web", &corev1.Service{})
	made.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{IP: "203.0.113.9"}}
	if err := r.Status().Update(context.Background(), made); err != nil {
		t.Fatal(err)
	}
	if s, err := r.run(t); err != nil || s.Status.LoadBalancer.Ingress[0].IP != "203.0.113.9" {
		t.Errorf("%+v, %v", s.Status, err)
	}
}
