// Package machines measures virtual machines: until they run, have an address and answer, what idle ones take of the
// host's memory, copies of boot disks, and how long a snapshot with memory stops them.
//
// The bench calls each exported function as one part, inside With, which makes classes and imports the tiny image, and
// deletes all machines afterwards. Images come from the directory of the options and are not built here: a part fails if
// its own is missing. Without KVM a boot takes minutes, so all waiting is long.
package machines

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"time"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/bench/rig"
)

// Classes and images of virtual machines in the bench.
const (
	tinyImage   = "tiny"
	debianImage = "debian-12"
	tinyClass   = "bench-tiny"
	gibClass    = "bench-gib"
	efiClass    = "bench-efi"
	vmStorage   = "atoll" // the class that is always there
)

// Machines makes virtual machines.
type Machines struct {
	*rig.Host
	client.WithWatch
}

// With measures with the classes and the tiny image there, and takes all of it away afterwards.
func With(run func(context.Context, *Machines) ([]rig.Row, error)) rig.Part {
	return func(ctx context.Context, h *rig.Host) (rows []rig.Row, err error) {
		scheme := runtime.NewScheme()
		if err := errors.Join(vmopv1.AddToScheme(scheme), corev1.AddToScheme(scheme)); err != nil {
			return nil, err
		}
		c, err := client.NewWithWatch(h.REST, client.Options{Scheme: scheme})
		if err != nil {
			return nil, err
		}
		m := &Machines{Host: h, WithWatch: c}
		defer func() {
			end, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Minute)
			defer cancel()
			err = errors.Join(err, m.deleteAll(end))
		}()
		for name, memory := range map[string]string{tinyClass: "192Mi", efiClass: "512Mi", gibClass: "1Gi"} {
			class := &vmopv1.VirtualMachineClass{ObjectMeta: metav1.ObjectMeta{Namespace: rig.Namespace, Name: name}}
			class.Spec.Hardware = vmopv1.VirtualMachineClassHardware{Cpus: 1, Memory: resource.MustParse(memory)}
			if err := m.Create(ctx, class); err != nil && !apierrors.IsAlreadyExists(err) {
				return nil, fmt.Errorf("making class %s: %w", name, err)
			}
		}
		if err := m.importImage(ctx, tinyImage, filepath.Join(h.Options.Images, tinyImage+".qcow2")); err != nil {
			return nil, err
		}
		// The first one waits until the image is in the datastore.
		if err := m.boot(ctx, m.machine("warm-up", tinyImage, tinyClass)); err != nil {
			return nil, err
		}
		if err := m.remove(ctx, "warm-up"); err != nil {
			return nil, err
		}
		return run(ctx, m)
	}
}

// importImage brings an image in with the command that people use.
func (m *Machines) importImage(ctx context.Context, name, path string) error {
	out, err := exec.CommandContext(ctx, m.Options.Atoll, "image", "import", path, "--name", name, "-n", rig.Namespace, "--data-dir", m.Options.DataDir).CombinedOutput()
	if err != nil {
		return fmt.Errorf("importing %s: %w: %s", path, err, out)
	}
	return nil
}

// machine is a virtual machine that is not made yet.
func (m *Machines) machine(name, image, class string) *vmopv1.VirtualMachine {
	vm := &vmopv1.VirtualMachine{ObjectMeta: metav1.ObjectMeta{Namespace: rig.Namespace, Name: name}}
	vm.Spec.ImageName, vm.Spec.ClassName, vm.Spec.StorageClass = image, class, vmStorage
	vm.Spec.PowerOffMode = vmopv1.VirtualMachinePowerOpModeHard
	return vm
}

// boot makes a machine and waits for the first answer of its guest agent.
func (m *Machines) boot(ctx context.Context, vm *vmopv1.VirtualMachine) error {
	if err := m.Create(ctx, vm); err != nil {
		return fmt.Errorf("making machine %s: %w", vm.Name, err)
	}
	return m.up(ctx, vm.Name)
}

// up waits for the first answer of a machine's guest agent.
func (m *machines) up(ctx context.Context, name string) error {
	_, err := m.state(ctx, name, "its guest agent answers", func(st machinev1.State) bool { return st.Guest != nil && st.Guest.Agent })
	return err
}

// bootWithin bounds how long a machine may take to be as wanted.
const bootWithin = 20 * time.Minute

// state waits until the host says that a machine is as wanted.
func (m *Machines) state(ctx context.Context, name, what string, wanted func(machinev1.State) bool) (machinev1.State, error) {
	ctx, cancel := context.WithTimeout(ctx, bootWithin)
	defer cancel()
	var st machinev1.State
	watch, err := m.Watch(ctx, &corev1.PodList{}, client.InNamespace(rig.Namespace), client.MatchingFields{"metadata.name": name})
	if err != nil {
		return st, err
	}
	defer watch.Stop()
	for {
		select {
		case event, ok := <-watch.ResultChan():
			if !ok {
				return st, fmt.Errorf("machine %s: waiting until %s: the watch has ended", name, what)
			}
			if pod, ok := event.Object.(*corev1.Pod); ok {
				if st = stateOf(pod); wanted(st) {
					return st, nil
				}
			}
		case <-ctx.Done():
			return st, fmt.Errorf("machine %s: waiting until %s: %w (%s %s %s)", name, what, ctx.Err(), st.Phase, st.Message, st.End.Message)
		}
	}
}

// stateOf is what the host says about the machine of a pod.
func stateOf(pod *corev1.Pod) machinev1.State {
	var st machinev1.State
	_ = json.Unmarshal([]byte(pod.Annotations[machinev1.StateAnnotation]), &st) // nothing yet
	return st
}

// remove deletes a machine and waits until it is gone.
func (m *Machines) remove(ctx context.Context, name string) error {
	vm := m.machine(name, "", "")
	if err := m.Delete(ctx, vm); client.IgnoreNotFound(err) != nil {
		return err
	}
	return rig.Until(ctx, "machine "+name+" is gone", func() (bool, error) {
		err := m.Get(ctx, client.ObjectKeyFromObject(vm), vm)
		return apierrors.IsNotFound(err), client.IgnoreNotFound(err)
	})
}

// deleteAll deletes all machines of the bench and waits until they are gone.
func (m *Machines) deleteAll(ctx context.Context) error {
	for _, kind := range []client.Object{&vmopv1.VirtualMachineSnapshot{}, &vmopv1.VirtualMachine{}} {
		if err := m.DeleteAllOf(ctx, kind, client.InNamespace(rig.Namespace)); err != nil {
			return fmt.Errorf("deleting machines: %w", err)
		}
	}
	return rig.Until(ctx, "all machines are gone", func() (bool, error) {
		var list vmopv1.VirtualMachineList
		err := m.List(ctx, &list, client.InNamespace(rig.Namespace))
		return err == nil && len(list.Items) == 0, err
	})
}
