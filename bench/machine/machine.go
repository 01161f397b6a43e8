// Package machine measures virtual machines for the bench: how soon they run, what they take of the host, and how long
// they stand still.
//
// Package main of the bench calls With with one of the measures. It needs a running supervisor and the disks that make
// vm-images builds. What can go wrong: a machine does not get as far as is wanted within bootWithin.
package machine

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
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/bench/report"
	"atoll.dev/atoll/internal/controllers/virtualmachine/claims"
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

// Config is what there is to measure.
type Config struct {
	Rest *rest.Config
	// Namespace to work in, and a storage class whose volumes are made at once.
	Namespace, Class string
	DataDir          string
	Atoll            string // the binary
	Images           string // directory with the disks
	N                int    // repetitions
}

// Host is the supervisor under measurement.
type Host struct {
	Config
	client.WithWatch
}

// With measures with the classes and the tiny image there, and takes all machines away afterwards.
func With(ctx context.Context, cfg Config, run func(context.Context, *Host) ([]report.Row, error)) (rows []report.Row, err error) {
	scheme := runtime.NewScheme()
	if err := errors.Join(vmopv1.AddToScheme(scheme), corev1.AddToScheme(scheme)); err != nil {
		return nil, err
	}
	c, err := client.NewWithWatch(cfg.Rest, client.Options{Scheme: scheme})
	if err != nil {
		return nil, err
	}
	m := &Host{Config: cfg, WithWatch: c}
	defer func() {
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Minute)
		defer cancel()
		err = errors.Join(err, m.deleteAll(end))
	}()
	for name, memory := range map[string]string{tinyClass: "192Mi", efiClass: "512Mi", gibClass: "1Gi"} {
		class := &vmopv1.VirtualMachineClass{ObjectMeta: metav1.ObjectMeta{Namespace: m.Namespace, Name: name}}
		class.Spec.Hardware = vmopv1.VirtualMachineClassHardware{Cpus: 1, Memory: resource.MustParse(memory)}
		if err := m.Create(ctx, class); err != nil && !apierrors.IsAlreadyExists(err) {
			return nil, fmt.Errorf("making class %s: %w", name, err)
		}
	}
	if err := m.importImage(ctx, tinyImage, filepath.Join(m.Images, tinyImage+".qcow2")); err != nil {
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

// importImage brings an image in with the command that people use.
func (m *Host) importImage(ctx context.Context, name, path string) error {
	out, err := exec.CommandContext(ctx, m.Atoll, "image", "import", path, "--name", name, "-n", m.Namespace, "--data-dir", m.DataDir).CombinedOutput()
	if err != nil {
		return fmt.Errorf("importing %s: %w: %s", path, err, out)
	}
	return nil
}

// machine is a virtual machine that is not made yet.
func (m *Host) machine(name, image, class string) *vmopv1.VirtualMachine {
	vm := &vmopv1.VirtualMachine{ObjectMeta: metav1.ObjectMeta{Namespace: m.Namespace, Name: name}}
	vm.Spec.ImageName, vm.Spec.ClassName, vm.Spec.StorageClass = image, class, vmStorage
	vm.Spec.PowerOffMode = vmopv1.VirtualMachinePowerOpModeHard
	return vm
}

// boot makes a machine and waits for the first answer of its guest agent.
func (m *Host) boot(ctx context.Context, vm *vmopv1.VirtualMachine) error {
	if err := m.Create(ctx, vm); err != nil {
		return fmt.Errorf("making machine %s: %w", vm.Name, err)
	}
	return m.up(ctx, vm.Name)
}

// up waits for the first answer of a machine's guest agent.
func (m *Host) up(ctx context.Context, name string) error {
	_, err := m.state(ctx, name, "its guest agent answers", func(st machinev1.State) bool { return st.Guest != nil && st.Guest.Agent })
	return err
}

// bootWithin bounds how long a machine may take to be as wanted.
const bootWithin = 20 * time.Minute

// state waits until the host says that a machine is as wanted.
func (m *Host) state(ctx context.Context, name, what string, wanted func(machinev1.State) bool) (machinev1.State, error) {
	ctx, cancel := context.WithTimeout(ctx, bootWithin)
	defer cancel()
	var st machinev1.State
	watch, err := m.Watch(ctx, &corev1.PodList{}, client.InNamespace(m.Namespace), client.MatchingFields{"metadata.name": name})
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
func (m *Host) remove(ctx context.Context, name string) error {
	vm := m.machine(name, "", "")
	if err := m.Delete(ctx, vm); client.IgnoreNotFound(err) != nil {
		return err
	}
	return until(ctx, "machine "+name+" is gone", func() (bool, error) {
		err := m.Get(ctx, client.ObjectKeyFromObject(vm), vm)
		return apierrors.IsNotFound(err), client.IgnoreNotFound(err)
	})
}

// deleteAll deletes all machines of the bench and waits until they are gone.
func (m *Host) deleteAll(ctx context.Context) error {
	for _, kind := range []client.Object{&vmopv1.VirtualMachineSnapshot{}, &vmopv1.VirtualMachine{}} {
		if err := m.DeleteAllOf(ctx, kind, client.InNamespace(m.Namespace)); err != nil {
			return fmt.Errorf("deleting machines: %w", err)
		}
	}
	return until(ctx, "all machines are gone", func() (bool, error) {
		var list vmopv1.VirtualMachineList
		err := m.List(ctx, &list, client.InNamespace(m.Namespace))
		return err == nil && len(list.Items) == 0, err
	})
}

// BootDisks measures the copy of an image of 10 GiB, of which 1 GiB is data, beside that of one of a few MiB.
func BootDisks(ctx context.Context, m *Host) ([]report.Row, error) {
	large := filepath.Join(m.DataDir, "bench-10g.qcow2")
	defer func() { _ = exec.Command("rm", "-f", large).Run() }()
	for _, command := range [][]string{
		{"qemu-img", "create", "-q", "-f", "qcow2", large, "10G"},
		{"qemu-io", "-f", "qcow2", "-c", "write -q -P 85 510 1", "-c", "write -q -P 170 511 1", "-c", "write -q -P 7 1G 1G", large},
	} {
		if out, err := exec.CommandContext(ctx, command[0], command[1:]...).CombinedOutput(); err != nil {
			return nil, fmt.Errorf("making an image: %w: %s", err, out)
		}
	}
	begin := time.Now()
	if err := m.importImage(ctx, "large", large); err != nil {
		return nil, err
	}
	imported := time.Since(begin)
	took := map[string][]float64{}
	var first time.Duration
	for i := range m.N + 1 {
		for image, size := range map[string]string{"large": "10Gi", tinyImage: "1Gi"} {
			d, err := m.copyImage(ctx, fmt.Sprintf("copy-%s-%d", image, i), image, size)
			switch {
			case err != nil:
				return nil, err
			case i > 0:
				took[image] = append(took[image], report.Milliseconds(d))
			case image == "large":
				first = d
			}
		}
	}
	row := report.Versus("boot disk from an image of 10 GiB, claim made to bound", "ms", took["large"], "tiny image", took[tinyImage])
	row.Note = fmt.Sprintf("the bar is 1000; import %.1f s, first copy (converts) %.1f s", imported.Seconds(), first.Seconds())
	return []report.Row{row}, nil
}

// copyImage makes the claim of a boot disk and waits until it is bound.
func (m *Host) copyImage(ctx context.Context, name, display, size string) (time.Duration, error) {
	var images vmopv1.VirtualMachineImageList
	if err := m.List(ctx, &images, client.InNamespace(m.Namespace)); err != nil {
		return 0, err
	}
	image := ""
	for _, i := range images.Items {
		if i.Status.Name == display {
			image = i.Name
		}
	}
	vm := m.machine(name, "", "")
	claim := claims.New(vm, name, resource.MustParse(size))
	claim.OwnerReferences, claim.Labels = nil, nil
	claim.Spec.StorageClassName = new(m.Class) // which does not wait for a pod
	claims.FromImage(claim, vm, "VirtualMachineImage/"+image, 0)
	begin := time.Now()
	if err := m.Create(ctx, claim); err != nil {
		return 0, fmt.Errorf("making claim %s: %w", name, err)
	}
	watch, err := m.Watch(ctx, &corev1.PersistentVolumeClaimList{}, client.InNamespace(m.Namespace), client.MatchingFields{"metadata.name": name})
	if err != nil {
		return 0, err
	}
	defer watch.Stop()
	timeout := time.After(10 * time.Minute)
	for {
		select {
		case event := <-watch.ResultChan():
			if c, ok := event.Object.(*corev1.PersistentVolumeClaim); ok && c.Status.Phase == corev1.ClaimBound {
				took := time.Since(begin)
				return took, m.Delete(ctx, c)
			}
		case <-timeout:
			return 0, fmt.Errorf("claim %s is not bound within ten minutes", name)
		}
	}
}

// until waits for five minutes at most.
func until(ctx context.Context, what string, done func() (bool, error)) error {
	var last error
	err := wait.PollUntilContextTimeout(ctx, 100*time.Millisecond, 5*time.Minute, true, func(context.Context) (bool, error) {
		var ok bool
		ok, last = done()
		return ok && last == nil, nil
	})
	if err != nil {
		return errors.Join(fmt.Errorf("waiting until %s: %w", what, err), last)
	}
	return nil
}
