package namespacebounds

import (
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/validation/field"
	"k8s.io/apiserver/pkg/admission"
	"k8s.io/kubernetes/pkg/apis/core"
	corev1conversion "k8s.io/kubernetes/pkg/apis/core/v1"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/kube/admission/podimages"
	"atoll.dev/atoll/internal/kube/admission/podruntime"
)

// external is a pod of the API's kind. The conversion shares memory with the pod and does not change it.
func external(pod *core.Pod) (*corev1.Pod, error) {
	var out corev1.Pod
	if err := corev1conversion.Convert_core_Pod_To_v1_Pod(pod, &out, nil); err != nil {
		return nil, fmt.Errorf("reading what pod %s requests: %w", pod.Name, err)
	}
	return &out, nil
}

// isMirror tells whether a pod describes what a kubelet runs from a file of its host.
func isMirror(pod *core.Pod) bool {
	_, mirror := pod.Annotations[corev1.MirrorPodAnnotationKey]
	return mirror
}

// pod holds a pod to the limits. Of an old one, what is new is held to them.
func (p *Plugin) pod(a admission.Attributes, b *atoll.SupervisorNamespace, pod, old *core.Pod) error {
	if isMirror(pod) || a.GetSubresource() == "resize" {
		return nil
	}
	create := a.GetOperation() == admission.Create
	if create {
		if err := p.placed(b, pod); err != nil {
			return err
		}
	}
	if p.handler(pod) == machinev1.RuntimeClass { // AtollMachinePods sees to who makes it; its VirtualMachine is held to limits
		return nil
	}
	if create || a.GetSubresource() == "ephemeralcontainers" { // nothing more begins in a pod that has stayed outside of micro-VMs
		if err := p.runtime(b, pod); err != nil {
			return err
		}
	}
	if create {
		if name := pod.Spec.PriorityClassName; strings.HasPrefix(name, systemPriority) {
			return fmt.Errorf("namespace %q: the priority classes of the system may not be used, since pods of others would have to go; asked: spec.priorityClassName %s; "+
				"administrators can offer another PriorityClass; %s", b.Name, name, owners(b))
		}
		if err := p.ephemeralVolumes(b, pod); err != nil {
			return err
		}
	}
	if err := privileged(b, pod, old); err != nil {
		return err
	}
	return images(b, pod, old)
}

// handler is that of the pod's runtime class; a class that is not there stands for itself.
func (p *Plugin) handler(pod *core.Pod) string {
	if pod.Spec.RuntimeClassName == nil {
		return ""
	}
	if rc, err := p.source.classes.Get(*pod.Spec.RuntimeClassName); err == nil {
		return rc.Handler
	}
	return *pod.Spec.RuntimeClassName
}

// systemPriority begins the names of upstream's own priority classes, which preempt everything else.
const systemPriority = "system-"

const limitPolicy = "spec.podRuntime.policy"

// onlyMicroVM tells whether the pods of a namespace run in micro-VMs only.
func onlyMicroVM(b *atoll.SupervisorNamespace) bool {
	return b.Spec.PodRuntime.Policy != atoll.RuntimeRunc
}

// early holds a new pod to the limits that other plugins enforce too.
func (p *Plugin) early(b *atoll.SupervisorNamespace, pod *core.Pod) error {
	if p.handler(pod) == machinev1.RuntimeClass {
		return nil
	}
	if err := p.needsHost(b, pod); err != nil {
		return err
	}
	return privileged(b, pod, nil)
}

// needsHost refuses a pod that cannot run in a micro-VM where that is all there is.
func (p *Plugin) needsHost(b *atoll.SupervisorNamespace, pod *core.Pod) error {
	if !onlyMicroVM(b) {
		return nil
	}
	if needs := append(podruntime.HostNeeds(pod), reachesHost(pod)...); len(needs) > 0 {
		return refuseText(b, limitPolicy, "MicroVM, pods in micro-VMs, which cannot use the host", list(needs))
	}
	return nil
}

// reachesHost lists what takes ports of the host, or has its kubelet connect to other addresses than the pod's. A
// micro-VM can have both, and the host's own services and other people's would be within reach.
func reachesHost(pod *core.Pod) []string {
	var out []string
	podimages.Containers(pod, func(c *core.Container, path *field.Path) {
		for i, p := range c.Ports {
			if p.HostPort != 0 {
				out = append(out, path.Child("ports").Index(i).Child("hostPort").String())
			}
		}
		hook := func(name string, get *core.HTTPGetAction, socket *core.TCPSocketAction) {
			if get != nil && get.Host != "" || socket != nil && socket.Host != "" {
				out = append(out, path.Child(name, "host").String())
			}
		}
		for name, probe := range map[string]*core.Probe{"livenessProbe": c.LivenessProbe, "readinessProbe": c.ReadinessProbe, "startupProbe": c.StartupProbe} {
			if probe != nil {
				hook(name, probe.HTTPGet, probe.TCPSocket)
			}
		}
		if l := c.Lifecycle; l != nil {
			for name, h := range map[string]*core.LifecycleHandler{"lifecycle.postStart": l.PostStart, "lifecycle.preStop": l.PreStop} {
				if h != nil {
					hook(name, h.HTTPGet, h.TCPSocket)
				}
			}
		}
	})
	return out
}

// service refuses addresses that are not the cluster's to give: they could be those of hosts, or of others' Services.
func service(b *atoll.SupervisorNamespace, svc, old *core.Service) error {
	for _, ip := range svc.Spec.ExternalIPs {
		if old == nil || !slices.Contains(old.Spec.ExternalIPs, ip) {
			return fmt.Errorf("namespace %q: a Service may not take addresses by spec.externalIPs, which could be those of others; asked: %s; "+
				"use type LoadBalancer or NodePort, or ask administrators; %s", b.Name, ip, owners(b))
		}
	}
	return nil
}

// runtime holds the runtime class, and what needs the host, to the policy.
func (p *Plugin) runtime(b *atoll.SupervisorNamespace, pod *core.Pod) error {
	if !onlyMicroVM(b) {
		return nil
	}
	if p.handler(pod) != podruntime.ClassMicroVM {
		name := ""
		if pod.Spec.RuntimeClassName != nil {
			name = *pod.Spec.RuntimeClassName
		}
		return refuseText(b, limitPolicy, "MicroVM, only runtime class "+podruntime.ClassMicroVM+" may be used", fmt.Sprintf("spec.runtimeClassName %q", name))
	}
	return p.needsHost(b, pod)
}

// privileged refuses privileged containers where they are not allowed.
func privileged(b *atoll.SupervisorNamespace, pod, old *core.Pod) error {
	if b.Spec.PodRuntime.PrivilegedAllowed {
		return nil
	}
	known := map[string]bool{}
	if old != nil { // a container cannot become privileged, but ephemeral ones can come
		podimages.Containers(old, func(c *core.Container, _ *field.Path) { known[c.Name] = isPrivileged(c) })
	}
	var asked []string
	podimages.Containers(pod, func(c *core.Container, path *field.Path) {
		if isPrivileged(c) && !known[c.Name] {
			asked = append(asked, path.Child("securityContext", "privileged").String())
		}
	})
	if len(asked) == 0 {
		return nil
	}
	return refuseText(b, "spec.podRuntime.privilegedAllowed", "privileged containers may not be used", list(asked))
}

func isPrivileged(c *core.Container) bool {
	return c.SecurityContext != nil && c.SecurityContext.Privileged != nil && *c.SecurityContext.Privileged
}

// images holds container images and image volumes to the patterns.
func images(b *atoll.SupervisorNamespace, pod, old *core.Pod) error {
	if b.Spec.Images == nil {
		return nil
	}
	known := map[string]bool{}
	if old != nil {
		podimages.Each(old, func(image, _ string) { known[image] = true })
	}
	var asked string
	podimages.Each(pod, func(image, path string) {
		if asked == "" && !known[image] && !imageAllowed(b.Spec.Images, image) {
			asked = path + " " + image
		}
	})
	if asked == "" {
		return nil
	}
	return refuse(b, "spec.images", b.Spec.Images, asked)
}
