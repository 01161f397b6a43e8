// Package machinepods is the admission plugin AtollMachinePods, which keeps the pods of virtual machines in the hands
// of their controller.
//
// A VirtualMachine that is powered on is a pod of runtime class atoll-vm. What the machine is to be, and which
// volumes and networks of the host it gets, is in annotations of the pod, so only the controller of VirtualMachines
// may make such a pod or change what it is. The rules, where "reserved" are the annotations of atoll.dev about
// machines and the label with a machine's uid:
//
//	request                                       by                        outcome
//	create a pod of the class                     the controller            accepted
//	                                              others                    refused
//	create another pod with anything reserved     the controller            accepted
//	                                              others                    refused
//	make or change another pod to have the image  the controller            accepted
//	    of such pods                              others                    refused
//	change spec, owners, reserved of such a pod   the controller            accepted
//	                                              others                    refused
//	change its status                             anybody who may           accepted
//	    with the state of the machine             its node, the controller  accepted
//	add ephemeral containers                      anybody                   refused
//	delete                                        the controller, nodes,    accepted
//	                                              parts of the control plane
//	                                              others                    refused, unless nothing owns the pod
//	evict (pods/eviction), exec, attach, logs     anybody who may           accepted
//
// The image is theirs alone since the kubelet does not start a pod with imagePullPolicy Never while it pulls an image of
// the same name for another.
//
// Administrators are no exception: a machine is stopped by its powerState, and the error says how. Who must get
// around this can impersonate the controller.
//
// internal/kube/apiserver registers it. It keeps nothing and asks nobody but the cache of runtime classes. What can go
// wrong: nothing that is not a refusal.
package machinepods

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	apiequality "k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apiserver/pkg/admission"
	"k8s.io/apiserver/pkg/admission/initializer"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/client-go/informers"
	nodelisters "k8s.io/client-go/listers/node/v1"
	"k8s.io/kubernetes/pkg/apis/core"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/datadir/pki"
	"atoll.dev/atoll/internal/kube/admission/podimages"
)

// PluginName is the name of the plugin in the admission chain.
const PluginName = "AtollMachinePods"

// Controller is the user that the controller of VirtualMachines is.
const Controller = pki.VMControllerUser

// Plugin implements the rules of the package comment.
type Plugin struct {
	*admission.Handler
	classes nodelisters.RuntimeClassLister
}

var (
	_ admission.ValidationInterface                = (*Plugin)(nil)
	_ initializer.WantsExternalKubeInformerFactory = (*Plugin)(nil)
)

// New returns a plugin that still needs its informers.
func New() *Plugin {
	return &Plugin{Handler: admission.NewHandler(admission.Create, admission.Update, admission.Delete)}
}

// Register adds the plugin to a set of known plugins.
func Register(plugins *admission.Plugins) {
	plugins.Register(PluginName, func(io.Reader) (admission.Interface, error) { return New(), nil })
}

// SetExternalKubeInformerFactory implements
// initializer.WantsExternalKubeInformerFactory.
func (p *Plugin) SetExternalKubeInformerFactory(f informers.SharedInformerFactory) {
	classes := f.Node().V1().RuntimeClasses()
	p.classes = classes.Lister()
	p.SetReadyFunc(classes.Informer().HasSynced)
}

// ValidateInitialization implements admission.InitializationValidator.
func (p *Plugin) ValidateInitialization() error {
	if p.classes == nil {
		return errors.New(PluginName + " needs informers")
	}
	return nil
}

// Validate holds requests to the rules.
func (p *Plugin) Validate(_ context.Context, a admission.Attributes, _ admission.ObjectInterfaces) error {
	if a.GetResource().GroupResource() != core.Resource("pods") || a.GetUserInfo().GetName() == Controller {
		return nil
	}
	pod, _ := a.GetObject().(*core.Pod)
	old, _ := a.GetOldObject().(*core.Pod)
	var err error
	switch {
	case !p.WaitForReady():
		err = errors.New("the API server is still starting; try again")
	case a.GetOperation() == admission.Create && a.GetSubresource() == "" && pod != nil:
		err = p.create(pod)
	case a.GetOperation() == admission.Update && pod != nil && old != nil:
		err = p.update(a, pod, old)
	case a.GetOperation() == admission.Delete && a.GetSubresource() == "" && old != nil:
		err = p.remove(a, old)
	}
	if err != nil {
		return admission.NewForbidden(a, err)
	}
	return nil
}

// isMachine tells whether a pod is a virtual machine, by its class or the handler of that.
func (p *Plugin) isMachine(pod *core.Pod) bool {
	class := pod.Spec.RuntimeClassName
	if class == nil {
		return false
	}
	if rc, err := p.classes.Get(*class); err == nil {
		return rc.Handler == machinev1.RuntimeClass
	}
	return *class == machinev1.RuntimeClass
}

// reserved are the annotations and labels of a pod that only the controller writes.
func reserved(pod *core.Pod) map[string]string {
	out := map[string]string{}
	for _, name := range []string{machinev1.Annotation, machinev1.StateAnnotation, machinev1.AddressAnnotation} {
		if value, ok := pod.Annotations[name]; ok {
			out[name] = value
		}
	}
	if value, ok := pod.Labels[machinev1.UIDLabel]; ok {
		out[machinev1.UIDLabel] = value
	}
	return out
}

func (p *Plugin) create(pod *core.Pod) error {
	if p.isMachine(pod) {
		return fmt.Errorf("spec.runtimeClassName %s is for virtual machines, whose pods are made by the system; make a VirtualMachine (vmoperator.vmware.com) instead", *pod.Spec.RuntimeClassName)
	}
	for name := range reserved(pod) {
		return fmt.Errorf("metadata: %s is for the pods of virtual machines, which are made by the system; remove it", name)
	}
	return noMachineImage(pod)
}

// noMachineImage refuses the image of the pods of virtual machines, for containers as for volumes.
func noMachineImage(pod *core.Pod) error {
	repository, _, _ := strings.Cut(machinev1.Image, ":")
	var err error
	podimages.Each(pod, func(image, _ string) {
		if rest, ok := strings.CutPrefix(image, repository); err == nil && ok && (rest == "" || rest[0] == ':' || rest[0] == '@') {
			err = fmt.Errorf("image %s is for the pods of virtual machines, which are made by the system; name another image", image)
		}
	})
	return err
}

func (p *Plugin) update(a admission.Attributes, pod, old *core.Pod) error {
	machine := p.isMachine(old)
	if a.GetSubresource() == "ephemeralcontainers" && machine {
		return fmt.Errorf("%s has no ephemeral containers; use kubectl exec, which the guest agent serves, or kubectl attach for the serial console", what(old))
	}
	was, is := reserved(old), reserved(pod)
	if machine && a.GetSubresource() == "status" && isNode(a.GetUserInfo()) {
		delete(was, machinev1.StateAnnotation) // which node that may be is for NodeRestriction to say
		delete(is, machinev1.StateAnnotation)
	}
	if !apiequality.Semantic.DeepEqual(was, is) {
		return fmt.Errorf("metadata of %s: the annotations and labels of atoll.dev are the system's; change the VirtualMachine instead", what(old))
	}
	if !machine {
		return noMachineImage(pod)
	}
	if isControlPlane(a.GetUserInfo()) {
		return nil
	}
	switch {
	case a.GetSubresource() != "status" && !apiequality.Semantic.DeepEqual(old.Spec, pod.Spec):
		return fmt.Errorf("spec of %s: change the VirtualMachine instead: kubectl edit vm %s", what(old), name(old))
	case !apiequality.Semantic.DeepEqual(old.OwnerReferences, pod.OwnerReferences):
		return fmt.Errorf("owners of %s: they are the system's", what(old))
	}
	return nil
}

func (p *Plugin) remove(a admission.Attributes, old *core.Pod) error {
	owned := slices.ContainsFunc(old.OwnerReferences, func(r metav1.OwnerReference) bool { return r.Kind == "VirtualMachine" })
	if !p.isMachine(old) || !owned || isNode(a.GetUserInfo()) || isControlPlane(a.GetUserInfo()) {
		return nil
	}
	return fmt.Errorf(`it is %s: to stop it, run: kubectl patch vm %s -n %s --type merge -p '{"spec":{"powerState":"PoweredOff"}}'; to remove it, run: kubectl delete vm %s -n %s`,
		what(old), name(old), old.Namespace, name(old), old.Namespace)
}

// what names a pod.
func what(pod *core.Pod) string {
	return fmt.Sprintf("virtual machine %s/%s", pod.Namespace, name(pod))
}

func name(pod *core.Pod) string {
	if n := pod.Labels[machinev1.NameLabel]; n != "" {
		return n
	}
	return pod.Name
}

func isNode(u user.Info) bool { return slices.Contains(u.GetGroups(), user.NodesGroup) }

// isControlPlane tells whether a user is a part of the control plane that ends pods, or changes who owns them: the
// collectors of garbage and of namespaces, the eviction by taint, preemption.
func isControlPlane(u user.Info) bool {
	if u.GetName() == user.KubeControllerManager || u.GetName() == user.KubeScheduler || slices.Contains(u.GetGroups(), "system:serviceaccounts:kube-system") &&
		slices.Contains(controllers(), strings.TrimPrefix(u.GetName(), "system:serviceaccount:kube-system:")) {
		return true
	}
	return u.GetName() == user.APIServerUser
}

func controllers() []string {
	return []string{"generic-garbage-collector", "namespace-controller", "pod-garbage-collector", "node-controller", "taint-eviction-controller", "device-taint-eviction-controller"}
}
