package machines

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"time"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	"github.com/vmware-tanzu/vm-operator/api/v1alpha5/cloudinit"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/bench/rig"
)

const (
	burstMachines = 20
	burstEvery    = 100 * time.Millisecond
)

// Burst makes 20 machines at 10 a second and measures until the host says that their QEMU runs.
func Burst(ctx context.Context, m *Machines) ([]rig.Row, error) {
	watch, err := m.Watch(ctx, &corev1.PodList{}, client.InNamespace(rig.Namespace), client.HasLabels{machinev1.NameLabel})
	if err != nil {
		return nil, err
	}
	defer watch.Stop()
	made := make(chan map[string]time.Time, 1)
	failed := make(chan error, 1)
	go func() {
		at := map[string]time.Time{}
		for i := range burstMachines {
			vm, next := m.machine(fmt.Sprintf("burst-%d", i), tinyImage, tinyClass), time.Now().Add(burstEvery)
			at[vm.Name] = time.Now()
			if err := m.Create(ctx, vm); err != nil {
				failed <- fmt.Errorf("making machine %s: %w", vm.Name, err)
				return
			}
			time.Sleep(time.Until(next))
		}
		made <- at
	}()
	running := map[string]time.Time{}
	timeout := time.After(10 * time.Minute)
	for len(running) < burstMachines {
		select {
		case event := <-watch.ResultChan():
			pod, ok := event.Object.(*corev1.Pod)
			if !ok || !running[pod.Name].IsZero() || stateOf(pod).Phase != machinev1.Running {
				continue
			}
			running[pod.Name] = time.Now()
		case err := <-failed:
			return nil, err
		case <-timeout:
			return nil, fmt.Errorf("only %d of %d machines run after ten minutes", len(running), burstMachines)
		}
	}
	at := <-made
	var took []float64
	for name, end := range running {
		took = append(took, rig.Milliseconds(end.Sub(at[name])))
	}
	row := rig.Compare("20 VMs at 10/s, created to QEMU running", "ms", took, nil)
	row.Note = "the bar is p95 <= 3000"
	return []rig.Row{row}, nil
}

// Address measures how long a tiny machine takes to its address, and to the first answer of its web server.
func Address(ctx context.Context, m *Machines) ([]rig.Row, error) {
	var addresses, answers []float64
	for i := range max(3, m.Options.N/6) {
		vm := m.machine(fmt.Sprintf("address-%d", i), tinyImage, tinyClass)
		begin := time.Now()
		if err := m.Create(ctx, vm); err != nil {
			return nil, err
		}
		address, err := m.address(ctx, vm)
		if err != nil {
			return nil, err
		}
		addresses = append(addresses, rig.Milliseconds(time.Since(begin)))
		if err := answers80(ctx, address); err != nil {
			return nil, err
		}
		answers = append(answers, rig.Milliseconds(time.Since(begin)))
		if err := m.remove(ctx, vm.Name); err != nil {
			return nil, err
		}
	}
	return []rig.Row{
		rig.Compare("tiny VM, created to address in status", "ms", addresses, nil),
		rig.Compare("tiny VM, created to its web server's answer", "ms", answers, nil),
	}, nil
}

// address waits until a machine's status has one.
func (m *Machines) address(ctx context.Context, vm *vmopv1.VirtualMachine) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, bootWithin)
	defer cancel()
	watch, err := m.Watch(ctx, &vmopv1.VirtualMachineList{}, client.InNamespace(rig.Namespace), client.MatchingFields{"metadata.name": vm.Name})
	if err != nil {
		return "", err
	}
	defer watch.Stop()
	for {
		select {
		case event := <-watch.ResultChan():
			if now, ok := event.Object.(*vmopv1.VirtualMachine); ok && now.Status.Network != nil && now.Status.Network.PrimaryIP4 != "" {
				return now.Status.Network.PrimaryIP4, nil
			}
		case <-ctx.Done():
			return "", fmt.Errorf("machine %s has no address: %w", vm.Name, ctx.Err())
		}
	}
}

// answers80 waits for an answer of the guest's web server.
func answers80(ctx context.Context, address string) error {
	c := http.Client{Timeout: 2 * time.Second}
	for end := time.Now().Add(bootWithin); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+"/", nil)
		if err != nil {
			return err
		}
		if resp, err := c.Do(req); err == nil {
			return resp.Body.Close()
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	return errors.New("the guest's web server does not answer")
}

// Debian measures how long a Debian with cloud-init takes until sshd greets.
func Debian(ctx context.Context, m *Machines) ([]rig.Row, error) {
	if err := m.importImage(ctx, debianImage, m.Options.Images+"/"+debianImage+".qcow2"); err != nil {
		return nil, fmt.Errorf("%w (make vm-images builds it)", err)
	}
	var took []float64
	for i := range 3 {
		vm := m.machine(fmt.Sprintf("debian-%d", i), debianImage, gibClass)
		vm.Spec.Bootstrap = &vmopv1.VirtualMachineBootstrapSpec{CloudInit: &vmopv1.VirtualMachineBootstrapCloudInitSpec{
			CloudConfig: &cloudinit.CloudConfig{Timezone: "Etc/UTC"},
		}}
		begin := time.Now()
		if err := m.Create(ctx, vm); err != nil {
			return nil, err
		}
		address, err := m.address(ctx, vm)
		if err != nil {
			return nil, err
		}
		if err := greets(ctx, net.JoinHostPort(address, "22")); err != nil {
			return nil, err
		}
		if i > 0 { // the first one converts the image
			took = append(took, time.Since(begin).Seconds())
		}
		if err := m.remove(ctx, vm.Name); err != nil {
			return nil, err
		}
	}
	row := rig.Compare("Debian VM with cloud-init, created to sshd's greeting", "s", took, nil)
	row.Note = "one processor, 1 GiB"
	return []rig.Row{row}, nil
}

// greets waits until an SSH server says its first line.
func greets(ctx context.Context, address string) error {
	for end := time.Now().Add(bootWithin); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		d := net.Dialer{Timeout: 2 * time.Second}
		conn, err := d.DialContext(ctx, "tcp", address)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			continue
		}
		_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
		line, _ := bufio.NewReader(conn).ReadString('\n')
		_ = conn.Close()
		if strings.HasPrefix(line, "SSH-2.0-") {
			return nil
		}
	}
	return fmt.Errorf("no SSH server greets at %s", address)
}
