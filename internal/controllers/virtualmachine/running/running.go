// Package running is how controllers deal with the pod of a VirtualMachine that is powered on: they read what the
// machine was told and how it is, and ask for operations.
//
// The Machine in the pod's annotation is changed by the controller of VirtualMachines and, for operations only, by
// others through Request and Forget; each write names the version of the pod it is based on, so none is lost. The
// State comes from the host and holds words of the guest, so it is bounded here.
//
// What can go wrong: the pod has changed meanwhile, which is a conflict that the caller tries again.
package running

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/controllers/virtualmachine/pod"
)

// maxState is the largest State that is read.
const maxState = 192 << 10

// ErrNotRunning is in the chain when a VirtualMachine has no pod that runs.
var ErrNotRunning = errors.New("the virtual machine is not running")

// ErrForeign is in the chain when the pod of a VirtualMachine's name is somebody else's.
var ErrForeign = errors.New("the pod is not this virtual machine's")

// Pod is the pod of a VirtualMachine, nil when there is none. A pod of that name that is somebody else's is an error.
func Pod(ctx context.Context, c client.Reader, vm *vmopv1.VirtualMachine) (*corev1.Pod, error) {
	p := &corev1.Pod{}
	err := c.Get(ctx, client.ObjectKeyFromObject(vm), p)
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading the pod: %w", err)
	}
	if !metav1.IsControlledBy(p, vm) {
		return nil, fmt.Errorf("%w: delete pod %s, or give the virtual machine another name", ErrForeign, p.Name)
	}
	return p, nil
}

// Machine is what the machine was told last.
func Machine(p *corev1.Pod) (machinev1.Machine, error) {
	var m machinev1.Machine
	if err := json.Unmarshal([]byte(p.Annotations[machinev1.Annotation]), &m); err != nil {
		return m, fmt.Errorf("annotation %s of pod %s: %w", machinev1.Annotation, p.Name, err)
	}
	return m, nil
}

// State is how the machine is, the zero State when the host has not said yet or what it said cannot be read.
func State(p *corev1.Pod) machinev1.State {
	var s machinev1.State
	text := p.Annotations[machinev1.StateAnnotation]
	if text == "" || len(text) > maxState || json.Unmarshal([]byte(text), &s) != nil {
		return machinev1.State{}
	}
	return s
}

// Ended tells that the machine of the pod does not run any more and will not again.
func Ended(p *corev1.Pod) bool {
	return p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed
}

// Write tells the machine of the pod what it is to be.
func Write(ctx context.Context, c client.Client, p *corev1.Pod, m machinev1.Machine) error {
	text, err := pod.Encode(m)
	if err != nil {
		return err
	}
	before := p.DeepCopy()
	p.Annotations[machinev1.Annotation] = text
	if err := c.Patch(ctx, p, client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{})); err != nil {
		return fmt.Errorf("changing the running machine: %w", err)
	}
	return nil
}

// Request asks for an operation. Asking again for one of the same id changes nothing.
func Request(ctx context.Context, c client.Client, p *corev1.Pod, op machinev1.Operation) error {
	if p == nil || Ended(p) || p.DeletionTimestamp != nil {
		return ErrNotRunning
	}
	m, err := Machine(p)
	if err != nil {
		return err
	}
	if slices.ContainsFunc(m.Operations, func(o machinev1.Operation) bool { return o.ID == op.ID }) {
		return nil
	}
	m.Operations = append(m.Operations, op)
	m.Revision++
	return Write(ctx, c, p, m)
}

// Result is how far an operation is, nil when the host has not begun it.
func Result(p *corev1.Pod, id string) *machinev1.OperationState {
	s := State(p)
	for i := range s.Operations {
		if s.Operations[i].ID == id {
			return &s.Operations[i]
		}
	}
	return nil
}

// Forget removes an operation that is done.
func Forget(ctx context.Context, c client.Client, p *corev1.Pod, id string) error {
	m, err := Machine(p)
	if err != nil {
		return err
	}
	left := slices.DeleteFunc(slices.Clone(m.Operations), func(o machinev1.Operation) bool { return o.ID == id })
	if len(left) == len(m.Operations) {
		return nil
	}
	m.Operations = left
	m.Revision++
	return Write(ctx, c, p, m)
}
