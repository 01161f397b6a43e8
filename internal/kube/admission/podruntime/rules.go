package podruntime

import (
	"fmt"
	"strings"

	"k8s.io/apimachinery/pkg/util/validation/field"
	"k8s.io/kubernetes/pkg/apis/core"
	"k8s.io/kubernetes/pkg/apis/core/helper"
	podutil "k8s.io/kubernetes/pkg/apis/core/pods"
)

// choose returns the class of a pod that names none.
func choose(pod *core.Pod, namespace string, hostAllowed bool) (string, error) {
	needs := HostNeeds(pod)
	switch {
	case len(needs) > 0 && !hostAllowed:
		return "", errNamespace(strings.Join(needs, ", "), namespace)
	case hostAllowed && (len(needs) > 0 || mayNeedDevices(pod)):
		return ClassHost, nil
	default:
		return ClassMicroVM, nil
	}
}

// check says whether a pod may run under the given handler in the namespace.
func check(pod *core.Pod, namespace, handler string, hostAllowed bool) error {
	needs := HostNeeds(pod)
	if handler != ClassMicroVM {
		needs = append(needs, privileged(pod)...)
	}
	switch {
	case handler == "":
		return fmt.Errorf("spec.runtimeClassName is empty after admission: a mutating webhook or policy removed it; it must leave the field as it is")
	case handler == ClassMicroVM && len(needs) > 0:
		return fmt.Errorf("%s needs the host, which a pod in a micro-VM (runtimeClassName %s) cannot use; remove it, or leave out spec.runtimeClassName in a namespace labelled %s=%s",
			strings.Join(needs, ", "), className(pod), HostAccessLabel, HostAccessAllowed)
	case handler == ClassHost && !hostAllowed:
		return errNamespace("spec.runtimeClassName: "+className(pod), namespace)
	case handler != ClassMicroVM && len(needs) > 0 && !hostAllowed:
		return errNamespace(strings.Join(needs, ", "), namespace)
	}
	return nil
}

// errNamespace is the refusal of a pod that needs the host where it may not.
func errNamespace(what, namespace string) error {
	return fmt.Errorf("%s needs the host, but pods of namespace %q run in micro-VMs; remove it, or have an administrator run: kubectl label namespace %s %s=%s",
		what, namespace, namespace, HostAccessLabel, HostAccessAllowed)
}

// HostNeeds lists the fields of a pod that cannot work in a micro-VM because
// they reach for the host.
func HostNeeds(pod *core.Pod) []string {
	var needs []string
	spec := field.NewPath("spec")
	if sc := pod.Spec.SecurityContext; sc != nil {
		for _, f := range []struct {
			name string
			set  bool
		}{
			{"hostNetwork", sc.HostNetwork},
			{"hostPID", sc.HostPID},
			{"hostIPC", sc.HostIPC},
		} {
			if f.set {
				needs = append(needs, spec.Child(f.name).String())
			}
		}
	}
	for i := range pod.Spec.Volumes {
		if at := spec.Child("volumes").Index(i); !inMachine(&pod.Spec.Volumes[i].VolumeSource) {
			if kind := mounted(&pod.Spec.Volumes[i].VolumeSource); kind != "" {
				at = at.Child(kind)
			}
			needs = append(needs, at.String())
		}
	}
	return needs
}

// inMachine tells whether a volume is of a kind that gets into a micro-VM without the kubelet mounting, on the host, what
// the pod names. An image is for the shim to refuse; the kubelet pulls it like any other.
func inMachine(v *core.VolumeSource) bool {
	return v.EmptyDir != nil || v.ConfigMap != nil || v.Secret != nil || v.Projected != nil || v.DownwardAPI != nil ||
		v.PersistentVolumeClaim != nil || v.Ephemeral != nil || v.Image != nil
}

// mounted names the kind of a volume that the kubelet, or a driver on its behalf, mounts on the host: its own or that of
// a server that the pod names. "" is a kind that is not known here.
func mounted(v *core.VolumeSource) string {
	for _, k := range []struct {
		name string
		is   bool
	}{
		{"hostPath", v.HostPath != nil},
		{"nfs", v.NFS != nil},
		{"iscsi", v.ISCSI != nil},
		{"fc", v.FC != nil},
		{"csi", v.CSI != nil},
		{"cephfs", v.CephFS != nil},
		{"rbd", v.RBD != nil},
		{"glusterfs", v.Glusterfs != nil},
		{"gitRepo", v.GitRepo != nil},
		{"flexVolume", v.FlexVolume != nil},
		{"flocker", v.Flocker != nil},
		{"cinder", v.Cinder != nil},
		{"quobyte", v.Quobyte != nil},
		{"scaleIO", v.ScaleIO != nil},
		{"storageos", v.StorageOS != nil},
		{"portworxVolume", v.PortworxVolume != nil},
		{"photonPersistentDisk", v.PhotonPersistentDisk != nil},
		{"vsphereVolume", v.VsphereVolume != nil},
		{"azureFile", v.AzureFile != nil},
		{"azureDisk", v.AzureDisk != nil},
		{"gcePersistentDisk", v.GCEPersistentDisk != nil},
		{"awsElasticBlockStore", v.AWSElasticBlockStore != nil},
	} {
		if k.is {
			return k.name
		}
	}
	return ""
}

// privileged lists the fields that make containers privileged: with all rights
// over the kernel they run in. In a micro-VM that is the pod's own.
func privileged(pod *core.Pod) []string {
	var list []string
	podutil.VisitContainersWithPath(&pod.Spec, field.NewPath("spec"), func(c *core.Container, path *field.Path) bool {
		if sc := c.SecurityContext; sc != nil && sc.Privileged != nil && *sc.Privileged {
			list = append(list, path.Child("securityContext", "privileged").String())
		}
		return true
	})
	return list
}

// mayNeedDevices reports whether a pod asks for resources a device plugin or a
// resource driver may serve.
func mayNeedDevices(pod *core.Pod) bool {
	if len(pod.Spec.ResourceClaims) > 0 {
		return true
	}
	found := false
	podutil.VisitContainersWithPath(&pod.Spec, field.NewPath("spec"), func(c *core.Container, _ *field.Path) bool {
		for name := range c.Resources.Limits {
			found = found || helper.IsExtendedResourceName(name)
		}
		return !found
	})
	return found
}
