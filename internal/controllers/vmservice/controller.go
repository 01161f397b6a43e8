package vmservice

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"sync"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/events"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
)

// ProblemAnnotation of a VirtualMachineService says in words why it does not work.
const ProblemAnnotation = "atoll.dev/problem"

const (
	// ingressAnnotation of a Service remembers the ingress address that this controller has chosen. Whoever may change
	// the Service can change it, so that nothing but what becomes of that address may depend on it.
	ingressAnnotation = "atoll.dev/ingress"
	// Annotations of VM Operator that say how the Service is to be.
	trafficPolicyAnnotation = "virtualmachineservice." + vmopv1.GroupName + "/service.externalTrafficPolicy"
	healthPortAnnotation    = "virtualmachineservice." + vmopv1.GroupName + "/service.healthCheckNodePort"

	lastApplied = "kubectl.kubernetes.io/last-applied-configuration"
	eventReason = "NotServed"
)

// errRefused marks what only the user can mend.
var errRefused = errors.New("refused")

// refusal is an error that only the user can mend.
func refusal(format string, args ...any) error {
	return fmt.Errorf("%w%s", errRefused, ": "+fmt.Sprintf(format, args...))
}

// Reconciler keeps Services as VirtualMachineServices want them.
type Reconciler struct {
	client.Client
	Events events.EventRecorder
	// Portal is the port of hosts that people log in at. Who had it could take their passwords.
	Portal int32
	// Range are the addresses for Services that cannot have that of a node.
	Range netip.Prefix

	// ingresses is held while an address is chosen and written.
	ingresses sync.Mutex
}

// Setup adds the controller to a manager, with the port of the portal and the addresses of Reconciler.Range.
func Setup(portal int, addresses netip.Prefix) func(ctrl.Manager) error {
	return func(mgr ctrl.Manager) error { return setup(mgr, portal, addresses) }
}

func setup(mgr ctrl.Manager, portal int, addresses netip.Prefix) error {
	r := &Reconciler{Client: mgr.GetClient(), Events: mgr.GetEventRecorder("virtualmachineservice"), Portal: int32(portal), Range: addresses}
	err := ctrl.NewControllerManagedBy(mgr).
		Named("virtualmachineservice").
		For(&vmopv1.VirtualMachineService{}).
		Owns(&corev1.Service{}).
		Owns(&discoveryv1.EndpointSlice{}).
		Watches(&vmopv1.VirtualMachine{}, handler.EnqueueRequestsFromMapFunc(r.inNamespace)).
		Complete(r)
	if err != nil {
		return fmt.Errorf("setting up the controller of VirtualMachineServices: %w", err)
	}
	return nil
}

// inNamespace names the services that a virtual machine may belong to, also one whose labels it does not have any
// more.
func (r *Reconciler) inNamespace(ctx context.Context, vm client.Object) []reconcile.Request {
	var list vmopv1.VirtualMachineServiceList
	if err := r.List(ctx, &list, client.InNamespace(vm.GetNamespace())); err != nil {
		return nil // the informer that failed will tell
	}
	var out []reconcile.Request
	for _, s := range list.Items {
		if len(s.Spec.Selector) > 0 {
			out = append(out, reconcile.Request{NamespacedName: types.NamespacedName{Namespace: s.Namespace, Name: s.Name}})
		}
	}
	return out
}

// Reconcile makes one service as it is to be.
func (r *Reconciler) Reconcile(ctx context.Context, req ctrl.Request) (ctrl.Result, error) {
	service := &vmopv1.VirtualMachineService{}
	if err := r.Get(ctx, req.NamespacedName, service); err != nil {
		return ctrl.Result{}, client.IgnoreNotFound(err)
	}
	if !service.DeletionTimestamp.IsZero() {
		return ctrl.Result{}, nil
	}
	before := service.DeepCopy()
	err := r.serve(ctx, service)
	problem := ""
	if err != nil {
		problem = err.Error()
	}
	if tellErr := r.tell(ctx, before, service, problem); tellErr != nil {
		return ctrl.Result{}, errors.Join(err, tellErr)
	}
	if errors.Is(err, errRefused) || apierrors.IsInvalid(err) {
		return ctrl.Result{}, nil // nothing will help until somebody changes the object
	}
	return ctrl.Result{}, err
}

func (r *Reconciler) serve(ctx context.Context, s *vmopv1.VirtualMachineService) error {
	switch s.Spec.Type {
	case vmopv1.VirtualMachineServiceTypeClusterIP, vmopv1.VirtualMachineServiceTypeLoadBalancer:
	default:
		return refusal("spec.type %q is not supported; use ClusterIP or LoadBalancer", s.Spec.Type)
	}
	if err := r.release(ctx, s); err != nil {
		return err
	}
	made, err := r.service(ctx, s)
	if err != nil {
		return err
	}
	if len(s.Spec.Selector) > 0 { // without one somebody else writes the endpoints
		if err := r.endpoints(ctx, s, made); err != nil {
			return err
		}
	}
	ingressErr := r.ingress(ctx, s, made)
	s.Status.LoadBalancer = vmopv1.LoadBalancerStatus{}
	for _, i := range made.Status.LoadBalancer.Ingress {
		s.Status.LoadBalancer.Ingress = append(s.Status.LoadBalancer.Ingress, vmopv1.LoadBalancerIngress{IP: i.IP, Hostname: i.Hostname})
	}
	return ingressErr
}

// tell writes status and problem, and an event when there is a new problem.
func (r *Reconciler) tell(ctx context.Context, before, s *vmopv1.VirtualMachineService, problem string) error {
	if !equality.Semantic.DeepEqual(before.Status, s.Status) {
		if err := r.Status().Patch(ctx, s, client.MergeFrom(before)); err != nil {
			return client.IgnoreNotFound(err)
		}
	}
	if s.Annotations[ProblemAnnotation] == problem {
		return nil
	}
	base := s.DeepCopy()
	s.Annotations = maps.Clone(s.Annotations)
	if problem == "" {
		delete(s.Annotations, ProblemAnnotation)
	} else {
		metav1.SetMetaDataAnnotation(&s.ObjectMeta, ProblemAnnotation, problem)
		r.Events.Eventf(s, nil, corev1.EventTypeWarning, eventReason, "Serve", "%s", problem)
	}
	return client.IgnoreNotFound(r.Patch(ctx, s, client.MergeFrom(base)))
}

// service makes or changes the Service.
func (r *Reconciler) service(ctx context.Context, s *vmopv1.VirtualMachineService) (*corev1.Service, error) {
	want := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: s.Namespace, Name: s.Name}}
	_, err := controllerutil.CreateOrUpdate(ctx, r.Client, want, func() error {
		if want.ResourceVersion != "" && !metav1.IsControlledBy(want, s) {
			return refusal("there is a Service %q that was not made for it; remove that, or choose another name", s.Name)
		}
		shape(want, s)
		return controllerutil.SetControllerReference(s, want, r.Scheme())
	})
	if err != nil {
		return nil, fmt.Errorf("making Service %s: %w", s.Name, err)
	}
	return want, nil
}

// shape makes a Service as its VirtualMachineService wants it. What it does not say keeps what the API server has
// chosen.
func shape(want *corev1.Service, s *vmopv1.VirtualMachineService) {
	if want.Labels == nil {
		want.Labels = map[string]string{}
	}
	maps.Copy(want.Labels, s.Labels)
	for k, v := range s.Annotations {
		if k != lastApplied && k != ProblemAnnotation && k != ingressAnnotation {
			metav1.SetMetaDataAnnotation(&want.ObjectMeta, k, v)
		}
	}
	want.Spec.Type = corev1.ServiceType(s.Spec.Type)
	want.Spec.Selector = nil
	want.Spec.LoadBalancerIP = s.Spec.LoadBalancerIP
	want.Spec.LoadBalancerSourceRanges = s.Spec.LoadBalancerSourceRanges
	if s.Spec.ClusterIP != "" && want.Spec.ClusterIP == "" {
		want.Spec.ClusterIP = s.Spec.ClusterIP
	}
	if s.Spec.Type == vmopv1.VirtualMachineServiceTypeLoadBalancer {
		if policy, ok := s.Annotations[trafficPolicyAnnotation]; ok {
			want.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicy(policy)
		}
		if port := number(s.Annotations[healthPortAnnotation]); port > 0 && want.Spec.ExternalTrafficPolicy == corev1.ServiceExternalTrafficPolicyLocal {
			want.Spec.HealthCheckNodePort = port
		}
	} else {
		want.Spec.ExternalTrafficPolicy, want.Spec.HealthCheckNodePort, want.Spec.AllocateLoadBalancerNodePorts = "", 0, nil
	}
	want.Spec.Ports = ports(want.Spec.Ports, s)
}
