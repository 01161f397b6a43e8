// Package podruntimes tells whether a pod runs in a micro-VM or on the host.
//
// The CSI node service asks, since it gives volumes to the two in different ways. It asks the API server each
// time, because a pod that has just been scheduled is in no cache for sure; a pod's runtime class never
// changes. What can go wrong: the API server is away; the kubelet makes the call again.
package podruntimes

import (
	"context"
	"fmt"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"atoll.dev/atoll/internal/kube/admission/podruntime"
)

// Pods looks pods up.
type Pods struct {
	client kubernetes.Interface
}

// New makes a reader. It does not talk to the API server.
func New(config *rest.Config) (*Pods, error) {
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("looking up pods: %w", err)
	}
	return &Pods{client: client}, nil
}

// MicroVM tells whether a pod runs in a micro-VM. A pod of the same name that is another one is an error.
func (p *Pods) MicroVM(ctx context.Context, namespace, name, uid string) (bool, error) {
	pod, err := p.client.CoreV1().Pods(namespace).Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return false, fmt.Errorf("looking up the pod: %w", err)
	}
	if string(pod.UID) != uid {
		return false, fmt.Errorf("pod %s/%s is another one by now", namespace, name)
	}
	class := pod.Spec.RuntimeClassName
	return class == nil || *class != podruntime.ClassHost, nil
}
