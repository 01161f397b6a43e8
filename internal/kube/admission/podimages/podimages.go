// Package podimages finds the containers of pods and their images, for the admission plugins.
//
// It is pure, keeps nothing, and nothing can go wrong.
package podimages

import (
	"k8s.io/apimachinery/pkg/util/validation/field"
	"k8s.io/kubernetes/pkg/apis/core"
	podutil "k8s.io/kubernetes/pkg/apis/core/pods"
)

// Each calls f for each image of a pod, of containers of all kinds and of volumes, with the path of its field.
func Each(pod *core.Pod, f func(image, path string)) {
	Containers(pod, func(c *core.Container, path *field.Path) {
		if c.Image != "" { // a container without one is for validation
			f(c.Image, path.Child("image").String())
		}
	})
	for i, v := range pod.Spec.Volumes {
		if v.Image != nil && v.Image.Reference != "" {
			f(v.Image.Reference, field.NewPath("spec", "volumes").Index(i).Child("image", "reference").String())
		}
	}
}

// Containers calls f for each container of a pod, of all kinds, with the path of its field.
func Containers(pod *core.Pod, f func(*core.Container, *field.Path)) {
	podutil.VisitContainersWithPath(&pod.Spec, field.NewPath("spec"), func(c *core.Container, path *field.Path) bool {
		f(c, path)
		return true
	})
}
