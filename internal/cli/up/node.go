package up

import (
	"context"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
)

// Node is what the cluster says about this host.
type Node struct {
	Name string `json:"name"`
	// Ready is the node's condition.
	Ready bool `json:"ready"`
	// Message says why it is not ready.
	Message        string `json:"message,omitempty"`
	KubeletVersion string `json:"kubeletVersion,omitempty"`
	Kernel         string `json:"kernel,omitempty"`
	Accelerator    string `json:"accelerator,omitempty"`
	Pods           int    `json:"pods"`
}

// watchNode asks the API server for the node, often until it is ready and
// seldom then.
func (u *Up) watchNode(ctx context.Context) error {
	wasReady := false
	for {
		node := u.askNode(ctx)
		u.node.Set(node)
		if node.Ready && !wasReady {
			u.cfg.Progress(fmt.Sprintf("%-12s Ready after %.1f s", "node "+node.Name, time.Since(u.began).Seconds()))
		}
		wasReady = node.Ready
		pause := 500 * time.Millisecond
		if node.Ready {
			pause = 10 * time.Second
		}
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return nil
		}
	}
}

// askNode makes one request with the administrator's kubeconfig.
func (u *Up) askNode(ctx context.Context) Node {
	node := Node{Name: u.cfg.Settings.NodeName}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	config, err := clientcmd.BuildConfigFromFlags("", u.cfg.Tree.AdminKubeconfig())
	if err != nil {
		node.Message = "there is no kubeconfig yet"
		return node
	}
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		node.Message = err.Error()
		return node
	}
	object, err := client.CoreV1().Nodes().Get(ctx, node.Name, metav1.GetOptions{})
	if err != nil {
		node.Message = err.Error()
		return node
	}
	node.KubeletVersion = object.Status.NodeInfo.KubeletVersion
	node.Kernel = object.Status.NodeInfo.KernelVersion
	node.Accelerator = object.Labels["atoll.dev/accelerator"]
	node.Message = "the kubelet has not reported yet"
	for _, c := range object.Status.Conditions {
		if c.Type == corev1.NodeReady {
			node.Ready, node.Message = c.Status == corev1.ConditionTrue, c.Message
		}
	}
	pods, err := client.CoreV1().Pods("").List(ctx, metav1.ListOptions{
		FieldSelector: "spec.nodeName=" + node.Name, ResourceVersion: "0",
	})
	if err == nil {
		node.Pods = len(pods.Items)
	}
	return node
}
