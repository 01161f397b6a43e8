package namespacebounds

import (
	"context"
	"errors"
	"io"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apiserver/pkg/admission"
	"k8s.io/apiserver/pkg/admission/initializer"
	"k8s.io/apiserver/pkg/authorization/authorizer"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/kubernetes/pkg/apis/apps"
	"k8s.io/kubernetes/pkg/apis/core"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
)

// PluginName is the name of the plugin in the admission chain.
const PluginName = "AtollNamespaceBounds"

// Plugin implements the rules of the package comment.
type Plugin struct {
	*admission.Handler
	source *Source
	authz  authorizer.Authorizer
}

var (
	_ admission.MutationInterface                  = (*Plugin)(nil)
	_ admission.ValidationInterface                = (*Plugin)(nil)
	_ initializer.WantsExternalKubeInformerFactory = (*Plugin)(nil)
	_ initializer.WantsExternalKubeClientSet       = (*Plugin)(nil)
	_ initializer.WantsDynamicClient               = (*Plugin)(nil)
	_ initializer.WantsAuthorizer                  = (*Plugin)(nil)
)

// New returns a plugin over a source that still needs its clients and informers.
func New(source *Source) *Plugin {
	p := &Plugin{Handler: admission.NewHandler(admission.Create, admission.Update, admission.Delete), source: source}
	p.SetReadyFunc(source.ready)
	return p
}

// Register adds the plugin to a set of known plugins.
func Register(plugins *admission.Plugins, source *Source) {
	plugins.Register(PluginName, func(io.Reader) (admission.Interface, error) { return New(source), nil })
}

// SetExternalKubeClientSet implements initializer.WantsExternalKubeClientSet.
func (p *Plugin) SetExternalKubeClientSet(client kubernetes.Interface) { p.source.client = client }

// SetDynamicClient implements initializer.WantsDynamicClient.
func (p *Plugin) SetDynamicClient(client dynamic.Interface) { p.source.setDynamic(client) }

// SetExternalKubeInformerFactory implements initializer.WantsExternalKubeInformerFactory.
func (p *Plugin) SetExternalKubeInformerFactory(f informers.SharedInformerFactory) {
	p.source.informers(f)
}

// SetAuthorizer implements initializer.WantsAuthorizer.
func (p *Plugin) SetAuthorizer(a authorizer.Authorizer) { p.authz = a }

// ValidateInitialization implements admission.InitializationValidator.
func (p *Plugin) ValidateInitialization() error {
	if p.source.client == nil || p.source.bounds == nil || p.source.namespaces == nil || p.authz == nil {
		return errors.New(PluginName + " needs clients, informers and an authorizer")
	}
	return nil
}

// errStarting is what is said while the caches are not filled.
var errStarting = errors.New("the API server is still starting; try again")

// isBounded tells whether a request is about something that limits are for.
func isBounded(a admission.Attributes) bool {
	if a.GetNamespace() == "" || a.GetOperation() == admission.Delete {
		return false
	}
	switch a.GetResource().GroupResource() {
	case core.Resource("pods"):
		switch a.GetSubresource() {
		case "", "ephemeralcontainers", "resize", "binding":
			return true
		}
	case core.Resource("bindings"), core.Resource("services"), core.Resource("persistentvolumeclaims"), apps.Resource("statefulsets"), machines(), machineSets():
		return a.GetSubresource() == ""
	}
	return false
}

// Admit ANDs the hosts of the namespace into new pods, names the encryption of new claims, and refuses what other plugins
// would refuse without saying which limit it is: AtollPodRuntime what needs the host, PodSecurity privileged containers.
func (p *Plugin) Admit(ctx context.Context, a admission.Attributes, _ admission.ObjectInterfaces) error {
	if a.GetOperation() != admission.Create || a.GetSubresource() != "" || !isBounded(a) {
		return nil
	}
	pod, isPod := a.GetObject().(*core.Pod)
	claim, isClaim := a.GetObject().(*core.PersistentVolumeClaim)
	if !isPod && !isClaim {
		return nil
	}
	b, err := p.boundsOf(ctx, a)
	if b == nil || err != nil {
		return err
	}
	if isClaim {
		p.nameEncryption(b, claim)
		return nil
	}
	if isMirror(pod) {
		return nil
	}
	if err := p.early(b, pod); err != nil {
		return admission.NewForbidden(a, err)
	}
	p.place(b, pod)
	return nil
}

// Validate holds requests to the rules, after everything that changes them.
func (p *Plugin) Validate(ctx context.Context, a admission.Attributes, _ admission.ObjectInterfaces) error {
	if err := p.protect(ctx, a); err != nil {
		return err
	}
	if err := p.protectEncryption(ctx, a); err != nil {
		return err
	}
	if !isBounded(a) {
		return nil
	}
	b, err := p.boundsOf(ctx, a)
	if err != nil {
		return err
	}
	if b != nil {
		err = p.bounds(ctx, a, b)
	}
	if err == nil {
		err = p.reservations(a, b)
	}
	if err != nil {
		return admission.NewForbidden(a, err)
	}
	return nil
}

// boundsOf is the SupervisorNamespace of a request's namespace, nil if it has none.
func (p *Plugin) boundsOf(ctx context.Context, a admission.Attributes) (*atoll.SupervisorNamespace, error) {
	if !p.WaitForReady() {
		return nil, admission.NewForbidden(a, errStarting)
	}
	b, err := p.source.of(ctx, a.GetNamespace())
	if err != nil {
		return nil, admission.NewForbidden(a, err)
	}
	return b, nil
}

// bounds holds one request to the limits of its namespace.
func (p *Plugin) bounds(ctx context.Context, a admission.Attributes, b *atoll.SupervisorNamespace) error {
	switch obj := a.GetObject().(type) {
	case *core.Pod:
		old, _ := a.GetOldObject().(*core.Pod)
		return p.pod(a, b, obj, old)
	case *core.Binding:
		return p.node(b, obj.Target.Name, "a binding to host "+obj.Target.Name)
	case *core.Service:
		old, _ := a.GetOldObject().(*core.Service)
		return service(b, obj, old)
	case *core.PersistentVolumeClaim:
		old, _ := a.GetOldObject().(*core.PersistentVolumeClaim)
		return p.claim(ctx, b, obj, old)
	case *apps.StatefulSet:
		if a.GetOperation() != admission.Create { // the templates cannot change
			return nil
		}
		for i := range obj.Spec.VolumeClaimTemplates {
			t := &obj.Spec.VolumeClaimTemplates[i]
			if err := p.claimSpec(b, &t.Spec, t.Annotations, "spec.volumeClaimTemplates "+t.Name); err != nil {
				return err
			}
		}
		return nil
	case runtime.Unstructured:
		return p.machine(ctx, a, b)
	}
	return nil
}

// reservations holds what a pod requests, or requests more than before, to what is reserved for other namespaces.
func (p *Plugin) reservations(a admission.Attributes, b *atoll.SupervisorNamespace) error {
	pod, ok := a.GetObject().(*core.Pod)
	if !ok || a.GetSubresource() != "" && a.GetSubresource() != "resize" || exempt(a.GetNamespace()) || !p.source.ledger.others(a.GetNamespace()) {
		return nil
	}
	asks, err := external(pod)
	if err != nil {
		return err
	}
	more := requests(asks)
	uid := pod.UID
	if a.IsDryRun() {
		uid = ""
	}
	if old, ok := a.GetOldObject().(*core.Pod); ok && a.GetOperation() == admission.Update {
		was, err := external(old)
		if err != nil {
			return err
		}
		if r := (request{amount: requests(was), placed: old.Spec.NodeName != ""}); p.source.ledger.counted(r) {
			more, uid = more.minus(r.amount), ""
		}
	}
	if more.cpu <= 0 && more.memory <= 0 {
		return nil
	}
	if err := p.source.ledger.fit(a.GetNamespace(), more, uid, "pod "+pod.Name); err != nil {
		return beyondReservations(a.GetNamespace(), b, err)
	}
	return nil
}
