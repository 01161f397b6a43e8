// Package pod makes the pod that a VirtualMachine runs as.
//
// It is pure. The pod has the name of the VirtualMachine, its labels, and one container that stands for the machine: the
// serial console is its output, kubectl exec goes to the guest agent, and its requests and limits are the machine's
// processors and memory (what QEMU needs beside that is the overhead of the RuntimeClass). It meets the restricted Pod
// Security Standard.
//
// What can go wrong: a Machine too large for an annotation, which is an error.
package pod

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"maps"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/controllers/virtualmachine/size"
)

const (
	// nobody is who the container is said to run as; there is no process of that user.
	nobody = 65534
	// hardGrace is how long a machine that is to be cut off may take, and what TrySoft has beyond its timeout.
	hardGrace = 30
	// softGrace is the grace of a machine whose guest alone decides.
	softGrace = 365 * 24 * 3600
	// maxMachine is what fits in the annotations of a pod beside the State.
	maxMachine = 128 << 10
	// moduleAnnotation of a VirtualMachine is its cluster module group; machines of one group have the same groupLabel.
	moduleAnnotation = "vsphere-cluster-module-group"
	groupLabel       = "atoll.dev/cluster-module-group"
	// maxTerms bounds the alternatives of the node affinity.
	maxTerms = 64
)

// Inputs are what a pod is made of.
type Inputs struct {
	VM      *vmopv1.VirtualMachine
	Machine machinev1.Machine
	Size    size.Size
	// BootClaim is the claim of the boot disk, SeedSecret the Secret with the files of the seed; both may be empty.
	BootClaim  string
	SeedSecret string
	// Reach are what the volumes that are not the pod's own ask of the node.
	Reach []*corev1.NodeSelector
}

// Build makes the pod.
func Build(in Inputs) (*corev1.Pod, error) {
	text, err := Encode(in.Machine)
	if err != nil {
		return nil, err
	}
	vm := in.VM
	pod := &corev1.Pod{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"},
		ObjectMeta: metav1.ObjectMeta{
			Name: vm.Name, Namespace: vm.Namespace, Labels: Labels(vm),
			Annotations: map[string]string{
				machinev1.Annotation:        text,
				machinev1.AddressAnnotation: "vm-" + string(vm.UID),
			},
			OwnerReferences: []metav1.OwnerReference{*metav1.NewControllerRef(vm, vmopv1.GroupVersion.WithKind("VirtualMachine"))},
		},
		Spec: corev1.PodSpec{
			RuntimeClassName:              new(machinev1.RuntimeClass),
			RestartPolicy:                 corev1.RestartPolicyNever,
			TerminationGracePeriodSeconds: new(min(Grace(in.Machine.Stop), hardGrace+24*3600)),
			AutomountServiceAccountToken:  new(false),
			EnableServiceLinks:            new(false),
			SecurityContext: &corev1.PodSecurityContext{
				RunAsNonRoot: new(true), RunAsUser: new(int64(nobody)), RunAsGroup: new(int64(nobody)),
				SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault},
			},
			Containers: []corev1.Container{container(in)},
			Affinity:   affinity(vm, in.Reach),
		},
	}
	if len(validation.IsDNS1123Label(in.Machine.Hostname)) == 0 {
		pod.Spec.Hostname = in.Machine.Hostname
	}
	if zone := vm.Labels[corev1.LabelTopologyZone]; zone != "" {
		pod.Spec.NodeSelector = map[string]string{corev1.LabelTopologyZone: zone}
	}
	if in.BootClaim != "" {
		pod.Spec.Volumes = append(pod.Spec.Volumes, corev1.Volume{Name: machinev1.BootVolume, VolumeSource: corev1.VolumeSource{
			PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: in.BootClaim},
		}})
	}
	if in.SeedSecret != "" {
		pod.Spec.Volumes = append(pod.Spec.Volumes, corev1.Volume{Name: machinev1.SeedVolume, VolumeSource: corev1.VolumeSource{
			Secret: &corev1.SecretVolumeSource{SecretName: in.SeedSecret, DefaultMode: new(int32(0o400))},
		}})
	}
	return pod, nil
}

// Encode is the text of a Machine for the annotation.
func Encode(m machinev1.Machine) (string, error) {
	text, err := json.Marshal(m)
	if err != nil {
		return "", fmt.Errorf("encoding the machine: %w", err)
	}
	if len(text) > maxMachine {
		return "", fmt.Errorf("the machine takes %d bytes, and at most %d fit in its pod: use fewer disks, interfaces or routes", len(text), maxMachine)
	}
	return string(text), nil
}

// Labels of the pod are those of the VirtualMachine, so that Services and policies select both alike.
func Labels(vm *vmopv1.VirtualMachine) map[string]string {
	out := maps.Clone(vm.Labels)
	if out == nil {
		out = map[string]string{}
	}
	out[machinev1.NameLabel] = vm.Name
	out[machinev1.UIDLabel] = string(vm.UID)
	if group := moduleGroup(vm); group != "" {
		out[groupLabel] = group
	}
	return out
}

// moduleGroup is the cluster module group of a machine, with the policy it is of, as a label's value.
func moduleGroup(vm *vmopv1.VirtualMachine) string {
	group := vm.Annotations[moduleAnnotation]
	if group == "" || vm.Spec.Reserved == nil || vm.Spec.Reserved.ResourcePolicyName == "" {
		return ""
	}
	return fmt.Sprintf("%x", sha256.Sum256([]byte(vm.Spec.Reserved.ResourcePolicyName+"/"+group)))[:32]
}

// Grace is the seconds that a pod has for stopping.
func Grace(stop machinev1.Stop) int64 {
	switch stop.Mode {
	case machinev1.Soft:
		return softGrace
	case machinev1.TrySoft:
		return int64(stop.TimeoutSeconds) + hardGrace
	}
	return hardGrace
}

func container(in Inputs) corev1.Container {
	c := corev1.Container{
		Name: machinev1.Container, Image: machinev1.Image, ImagePullPolicy: corev1.PullNever,
		Stdin: true, TTY: true,
		Resources: corev1.ResourceRequirements{Requests: in.Size.Requests, Limits: in.Size.Limits},
		SecurityContext: &corev1.SecurityContext{
			AllowPrivilegeEscalation: new(false),
			Capabilities:             &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}},
		},
		ResizePolicy: []corev1.ContainerResizePolicy{
			{ResourceName: corev1.ResourceCPU, RestartPolicy: corev1.NotRequired},
			{ResourceName: corev1.ResourceMemory, RestartPolicy: corev1.NotRequired},
		},
		ReadinessProbe: Probe(in.VM.Spec.ReadinessProbe),
	}
	if in.BootClaim != "" {
		c.VolumeDevices = []corev1.VolumeDevice{{Name: machinev1.BootVolume, DevicePath: machinev1.BootDevice}}
	}
	if in.SeedSecret != "" {
		c.VolumeMounts = []corev1.VolumeMount{{Name: machinev1.SeedVolume, MountPath: machinev1.SeedDir, ReadOnly: true}}
	}
	return c
}

// TCPSocket is the probe of a port. VMware deprecates it for one kind of its networks; here it always works.
func TCPSocket(p *vmopv1.VirtualMachineReadinessProbeSpec) *vmopv1.TCPSocketAction {
	return p.TCPSocket //nolint:staticcheck // see above
}

// Probe is a VirtualMachine's readiness probe as one of its pod, nil when there is none.
func Probe(p *vmopv1.VirtualMachineReadinessProbeSpec) *corev1.Probe {
	if p == nil {
		return nil
	}
	const everySeconds = 10
	out := &corev1.Probe{TimeoutSeconds: everySeconds, PeriodSeconds: everySeconds, FailureThreshold: 1}
	if p.TimeoutSeconds > 0 {
		out.TimeoutSeconds = p.TimeoutSeconds
	}
	if p.PeriodSeconds > 0 {
		out.PeriodSeconds = p.PeriodSeconds
	}
	switch {
	case TCPSocket(p) != nil:
		out.TCPSocket = &corev1.TCPSocketAction{Port: TCPSocket(p).Port} // of the machine: a host would be for the kubelet to reach
	case p.GuestHeartbeat != nil:
		out.Exec = &corev1.ExecAction{Command: []string{machinev1.CommandHeartbeat}}
	case len(p.GuestInfo) > 0:
		command := []string{machinev1.CommandGuestInfo}
		for _, info := range p.GuestInfo {
			command = append(command, info.Key, info.Value)
		}
		out.Exec = &corev1.ExecAction{Command: command}
	default:
		return nil
	}
	return out
}

func affinity(vm *vmopv1.VirtualMachine, reach []*corev1.NodeSelector) *corev1.Affinity {
	var out corev1.Affinity
	if terms := allOf(reach); len(terms) > 0 {
		out.NodeAffinity = &corev1.NodeAffinity{RequiredDuringSchedulingIgnoredDuringExecution: &corev1.NodeSelector{NodeSelectorTerms: terms}}
	}
	if a := vm.Spec.Affinity; a != nil && a.VMAffinity != nil {
		out.PodAffinity = &corev1.PodAffinity{
			RequiredDuringSchedulingIgnoredDuringExecution:  required(a.VMAffinity.RequiredDuringSchedulingPreferredDuringExecution),
			PreferredDuringSchedulingIgnoredDuringExecution: preferred(a.VMAffinity.PreferredDuringSchedulingPreferredDuringExecution),
		}
	}
	if a := vm.Spec.Affinity; a != nil && a.VMAntiAffinity != nil {
		out.PodAntiAffinity = &corev1.PodAntiAffinity{
			RequiredDuringSchedulingIgnoredDuringExecution:  required(a.VMAntiAffinity.RequiredDuringSchedulingPreferredDuringExecution),
			PreferredDuringSchedulingIgnoredDuringExecution: preferred(a.VMAntiAffinity.PreferredDuringSchedulingPreferredDuringExecution),
		}
	}
	if group := moduleGroup(vm); group != "" {
		if out.PodAntiAffinity == nil {
			out.PodAntiAffinity = &corev1.PodAntiAffinity{}
		}
		list := &out.PodAntiAffinity.PreferredDuringSchedulingIgnoredDuringExecution
		*list = append(*list, preferred([]vmopv1.VMAffinityTerm{{
			LabelSelector: &metav1.LabelSelector{MatchLabels: map[string]string{groupLabel: group}}, TopologyKey: corev1.LabelHostname,
		}})...)
	}
	if out == (corev1.Affinity{}) {
		return nil
	}
	return &out
}

func required(terms []vmopv1.VMAffinityTerm) []corev1.PodAffinityTerm {
	var out []corev1.PodAffinityTerm
	for _, t := range terms {
		out = append(out, corev1.PodAffinityTerm{LabelSelector: t.LabelSelector.DeepCopy(), TopologyKey: t.TopologyKey})
	}
	return out
}

func preferred(terms []vmopv1.VMAffinityTerm) []corev1.WeightedPodAffinityTerm {
	var out []corev1.WeightedPodAffinityTerm
	for _, t := range required(terms) {
		out = append(out, corev1.WeightedPodAffinityTerm{Weight: 100, PodAffinityTerm: t})
	}
	return out
}

// allOf is one list of alternatives that meets all selectors, each of which is a list of alternatives itself.
func allOf(selectors []*corev1.NodeSelector) []corev1.NodeSelectorTerm {
	var out []corev1.NodeSelectorTerm
	for _, s := range selectors {
		if s == nil || len(s.NodeSelectorTerms) == 0 {
			continue
		}
		if out == nil {
			out = []corev1.NodeSelectorTerm{{}}
		}
		var next []corev1.NodeSelectorTerm
		for _, have := range out {
			for _, more := range s.NodeSelectorTerms {
				term := *have.DeepCopy()
				term.MatchExpressions = append(term.MatchExpressions, more.MatchExpressions...)
				term.MatchFields = append(term.MatchFields, more.MatchFields...)
				next = append(next, term)
			}
		}
		out = next[:min(len(next), maxTerms)]
	}
	return out
}
