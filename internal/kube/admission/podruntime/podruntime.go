// Package podruntime is the admission plugin AtollPodRuntime, which decides
// whether a pod runs in a micro-VM or on the host.
//
// Every pod runs in a micro-VM (RuntimeClass atoll) unless it needs the host:
// its network, process or IPC namespace, its files or its devices. Its files are
// all volumes that the kubelet mounts there before a micro-VM gets to see them:
// every kind but emptyDir, configMap, secret, projected, downwardAPI, image and
// claims. Such pods run under RuntimeClass runc, and only in namespaces that carry the label
// atoll.dev/host-access=allowed. A privileged container does not need the host:
// in a micro-VM it has the pod's own kernel and devices, and who may make one is
// for Pod Security to say. Under any other class it counts as need of the host.
// The rules, where "allowed" means that label:
//
//	runtimeClassName  pod needs the host   namespace       outcome
//	none              no                   any             set to atoll
//	none              yes                  allowed         set to runc
//	none              yes                  not allowed     refused
//	atoll             no                   any             accepted
//	atoll             yes                  any             refused
//	runc              any                  allowed         accepted
//	runc              any                  not allowed     refused
//	another           no                   any             accepted
//	another           yes                  allowed         accepted
//	another           yes                  not allowed     refused
//
// A RuntimeClass of another name counts as what its handler is. Extended
// resources and resource claims may stand for devices of the host or for plain
// counters; a pod with them that names no class gets runc where that is allowed
// and atoll elsewhere. Ephemeral containers are held to the same rules. Mirror
// pods are left alone: they describe what a kubelet already runs from a file
// that only the host's administrator can write.
//
// The label can only be set by who may update namespaces, which the role admin
// of a namespace does not include.
//
// It is registered by internal/kube/apiserver, in front of the upstream plugin
// RuntimeClass, which adds the overhead of the chosen class. What can go wrong:
// a namespace unknown to the cache is read from the API; if that fails the
// request fails.
package podruntime

import (
	"context"
	"errors"
	"fmt"
	"io"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apiserver/pkg/admission"
	"k8s.io/apiserver/pkg/admission/initializer"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	corelisters "k8s.io/client-go/listers/core/v1"
	nodelisters "k8s.io/client-go/listers/node/v1"
	"k8s.io/kubernetes/pkg/apis/core"

	machinev1 "atoll.dev/atoll/api/machine/v1"
)

// PluginName is the name of the plugin in the admission chain.
const PluginName = "AtollPodRuntime"

// Names of the runtime classes; their handlers have the same names.
const (
	ClassMicroVM = "atoll"
	ClassMachine = machinev1.RuntimeClass
	ClassHost    = "runc"
)

// The label an administrator puts on a namespace whose pods may use the host.
const (
	HostAccessLabel   = "atoll.dev/host-access"
	HostAccessAllowed = "allowed"
)

// Plugin implements the rules of the package comment.
type Plugin struct {
	*admission.Handler
	client     kubernetes.Interface
	namespaces corelisters.NamespaceLister
	classes    nodelisters.RuntimeClassLister
}

var (
	_ admission.MutationInterface                  = (*Plugin)(nil)
	_ admission.ValidationInterface                = (*Plugin)(nil)
	_ initializer.WantsExternalKubeInformerFactory = (*Plugin)(nil)
	_ initializer.WantsExternalKubeClientSet       = (*Plugin)(nil)
)

// New returns a plugin that still needs its client and informers.
func New() *Plugin {
	return &Plugin{Handler: admission.NewHandler(admission.Create, admission.Update)}
}

// Register adds the plugin to a set of known plugins.
func Register(plugins *admission.Plugins) {
	plugins.Register(PluginName, func(io.Reader) (admission.Interface, error) { return New(), nil })
}

// SetExternalKubeClientSet implements initializer.WantsExternalKubeClientSet.
func (p *Plugin) SetExternalKubeClientSet(client kubernetes.Interface) { p.client = client }

// SetExternalKubeInformerFactory implements
// initializer.WantsExternalKubeInformerFactory.
func (p *Plugin) SetExternalKubeInformerFactory(f informers.SharedInformerFactory) {
	namespaces := f.Core().V1().Namespaces()
	classes := f.Node().V1().RuntimeClasses()
	p.namespaces = namespaces.Lister()
	p.classes = classes.Lister()
	namespacesSynced, classesSynced := namespaces.Informer().HasSynced, classes.Informer().HasSynced
	p.SetReadyFunc(func() bool { return namespacesSynced() && classesSynced() })
}

// ValidateInitialization implements admission.InitializationValidator.
func (p *Plugin) ValidateInitialization() error {
	if p.client == nil || p.namespaces == nil || p.classes == nil {
		return errors.New(PluginName + " needs a client and informers")
	}
	return nil
}

// Admit chooses a runtime class for new pods that name none.
func (p *Plugin) Admit(ctx context.Context, a admission.Attributes, _ admission.ObjectInterfaces) error {
	pod, err := podToCheck(a)
	if err != nil || pod == nil {
		return err
	}
	if a.GetOperation() != admission.Create || className(pod) != "" {
		return nil
	}
	if err := p.waitReady(a); err != nil {
		return err
	}
	allowed, err := p.hostAllowed(ctx, a.GetNamespace())
	if err != nil {
		return apierrors.NewInternalError(err)
	}
	class, err := choose(pod, a.GetNamespace(), allowed)
	if err != nil {
		return admission.NewForbidden(a, err)
	}
	pod.Spec.RuntimeClassName = &class
	return nil
}

// Validate holds pods, and the ephemeral containers added to them, to the class
// they have after all mutations.
func (p *Plugin) Validate(ctx context.Context, a admission.Attributes, _ admission.ObjectInterfaces) error {
	pod, err := podToCheck(a)
	if err != nil || pod == nil {
		return err
	}
	if err := p.waitReady(a); err != nil {
		return err
	}
	allowed, err := p.hostAllowed(ctx, a.GetNamespace())
	if err != nil {
		return apierrors.NewInternalError(err)
	}
	if err := check(pod, a.GetNamespace(), p.handler(className(pod)), allowed); err != nil {
		return admission.NewForbidden(a, err)
	}
	return nil
}

// podToCheck returns the pod of a request the rules apply to, or nil.
func podToCheck(a admission.Attributes) (*core.Pod, error) {
	if a.GetResource().GroupResource() != core.Resource("pods") {
		return nil, nil
	}
	switch {
	case a.GetSubresource() == "" && a.GetOperation() == admission.Create:
	case a.GetSubresource() == "ephemeralcontainers" && a.GetOperation() == admission.Update:
	default:
		return nil, nil
	}
	pod, ok := a.GetObject().(*core.Pod)
	if !ok {
		return nil, apierrors.NewBadRequest(fmt.Sprintf("a Pod was expected, got %T", a.GetObject()))
	}
	if _, mirror := pod.Annotations[corev1.MirrorPodAnnotationKey]; mirror {
		return nil, nil
	}
	return pod, nil
}

func (p *Plugin) waitReady(a admission.Attributes) error {
	if !p.WaitForReady() {
		return admission.NewForbidden(a, errors.New("the API server is still starting; try again"))
	}
	return nil
}

// hostAllowed reports whether the namespace carries the administrator's label.
func (p *Plugin) hostAllowed(ctx context.Context, name string) (bool, error) {
	ns, err := p.namespaces.Get(name)
	if apierrors.IsNotFound(err) {
		// The cache may lag behind a namespace made a moment ago.
		ns, err = p.client.CoreV1().Namespaces().Get(ctx, name, metav1.GetOptions{})
	}
	if apierrors.IsNotFound(err) {
		// NamespaceLifecycle refuses the pod; nothing is allowed until then.
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("reading namespace %s: %w", name, err)
	}
	return ns.Labels[HostAccessLabel] == HostAccessAllowed, nil
}

// handler returns the handler of a class. A class that does not exist is refused
// by the plugin RuntimeClass; until then its name stands for it.
func (p *Plugin) handler(class string) string {
	if rc, err := p.classes.Get(class); err == nil {
		return rc.Handler
	}
	return class
}

func className(pod *core.Pod) string {
	if pod.Spec.RuntimeClassName == nil {
		return ""
	}
	return *pod.Spec.RuntimeClassName
}
