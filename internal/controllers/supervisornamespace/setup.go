package supervisornamespace

import (
	"fmt"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/selection"
	"k8s.io/client-go/tools/clientcmd"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/cluster"
	"sigs.k8s.io/controller-runtime/pkg/controller"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/controllers/supervisornamespace/admission"
	"atoll.dev/atoll/internal/controllers/supervisornamespace/expand"
	"atoll.dev/atoll/internal/controllers/supervisornamespace/selfservice"
)

// Config of the controller.
type Config struct {
	// Kubeconfig is a file with the identity of this controller, User its name.
	Kubeconfig, User string
	Network          expand.Network
	// EndpointURL is where people reach the API server.
	EndpointURL string
	// RegistryHost is the portable name of the registry, empty when there is none.
	RegistryHost string
	// Registry may be nil: then nothing is said about images.
	Registry Registry
}

// workers is how many SupervisorNamespaces are looked at together: most of the time is waiting for the API server.
const workers = 16

// Setup returns a function that adds the controllers and webhooks to a manager.
func Setup(cfg Config) func(ctrl.Manager) error {
	return func(mgr ctrl.Manager) error {
		if err := setup(mgr, cfg); err != nil {
			return fmt.Errorf("setting up the controller of SupervisorNamespaces: %w", err)
		}
		return nil
	}
}

func setup(mgr ctrl.Manager, cfg Config) error {
	own, err := newCluster(mgr, cfg.Kubeconfig)
	if err != nil {
		return err
	}
	if err := mgr.Add(own); err != nil {
		return err
	}
	r := &Reconciler{
		Client: own.GetClient(), Shared: mgr.GetClient(), Live: own.GetAPIReader(),
		Network: cfg.Network, EndpointURL: cfg.EndpointURL, RegistryHost: cfg.RegistryHost, Registry: cfg.Registry,
	}
	b := ctrl.NewControllerManagedBy(mgr).
		Named("supervisornamespace").
		WithOptions(controller.Options{MaxConcurrentReconciles: workers})
	if err := r.watch(b, own.GetCache()).Complete(r); err != nil {
		return err
	}
	if err := selfservice.Setup(mgr, own); err != nil {
		return err
	}
	return admission.Setup(mgr, own, admission.Config{Controller: cfg.User, Network: cfg.Network})
}

// newCluster is a client and a cache of the controller's own identity.
func newCluster(mgr ctrl.Manager, kubeconfig string) (cluster.Cluster, error) {
	rest, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return nil, err
	}
	rest.QPS, rest.Burst = -1, 0 // the API server's own priority and fairness does it
	rest.UserAgent = "atoll-supervisor-namespaces"
	owned, err := labels.NewRequirement(atoll.SupervisorNamespaceLabel, selection.Exists, nil)
	if err != nil {
		return nil, err
	}
	selector := cache.ByObject{Label: labels.NewSelector().Add(*owned)}
	return cluster.New(rest, func(o *cluster.Options) {
		o.Scheme, o.Logger = mgr.GetScheme(), mgr.GetLogger()
		o.Cache.DefaultTransform = cache.TransformStripManagedFields()
		o.Cache.ByObject = map[client.Object]cache.ByObject{
			&corev1.LimitRange{}:          selector,
			&rbacv1.RoleBinding{}:         selector,
			&rbacv1.ClusterRole{}:         selector,
			&rbacv1.ClusterRoleBinding{}:  selector,
			&networkingv1.NetworkPolicy{}: selector,
			&corev1.Pod{}:                 {Transform: bare},
		}
	})
}

// bare leaves of a pod what it asks for.
func bare(obj any) (any, error) {
	pod, ok := obj.(*corev1.Pod)
	if !ok {
		return obj, nil
	}
	out := &corev1.Pod{}
	out.Name, out.Namespace, out.UID, out.ResourceVersion = pod.Name, pod.Namespace, pod.UID, pod.ResourceVersion
	if vm, machine := pod.Labels[machinev1.NameLabel]; machine {
		out.Labels = map[string]string{machinev1.NameLabel: vm}
	}
	out.Spec.Overhead, out.Spec.Resources = pod.Spec.Overhead, pod.Spec.Resources
	for _, c := range pod.Spec.Containers {
		out.Spec.Containers = append(out.Spec.Containers, corev1.Container{Name: c.Name, Resources: c.Resources})
	}
	for _, c := range pod.Spec.InitContainers {
		out.Spec.InitContainers = append(out.Spec.InitContainers, corev1.Container{Name: c.Name, Resources: c.Resources, RestartPolicy: c.RestartPolicy})
	}
	out.Status.Phase = pod.Status.Phase
	return out, nil
}
