package machines

import (
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"time"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"atoll.dev/atoll/bench/rig"
	"atoll.dev/atoll/internal/controllers/virtualmachine/claims"
)

// BootDisks measures the copy of an image of 10 GiB, of which 1 GiB is data, beside that of one of a few MiB.
func BootDisks(ctx context.Context, m *Machines) ([]rig.Row, error) {
	large := filepath.Join(m.Options.DataDir, "bench-10g.qcow2")
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
	for i := range m.Options.N + 1 {
		for image, size := range map[string]string{"large": "10Gi", tinyImage: "1Gi"} {
			d, err := m.copyImage(ctx, fmt.Sprintf("copy-%s-%d", image, i), image, size)
			switch {
			case err != nil:
				return nil, err
			case i > 0:
				took[image] = append(took[image], rig.Milliseconds(d))
			case image == "large":
				first = d
			}
		}
	}
	row := rig.Versus("boot disk from an image of 10 GiB, claim made to bound", "ms", took["large"], "tiny image", took[tinyImage])
	row.Note = fmt.Sprintf("the bar is 1000; import %.1f s, first copy (converts) %.1f s", imported.Seconds(), first.Seconds())
	return []rig.Row{row}, nil
}

// copyImage makes the claim of a boot disk and waits until it is bound.
func (m *Machines) copyImage(ctx context.Context, name, display, size string) (time.Duration, error) {
	var images vmopv1.VirtualMachineImageList
	if err := m.List(ctx, &images, client.InNamespace(rig.Namespace)); err != nil {
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
	claim.Spec.StorageClassName = new(rig.VolumeClass) // which does not wait for a pod
	claims.FromImage(claim, vm, "VirtualMachineImage/"+image, 0)
	begin := time.Now()
	if err := m.Create(ctx, claim); err != nil {
		return 0, fmt.Errorf("making claim %s: %w", name, err)
	}
	watch, err := m.Watch(ctx, &corev1.PersistentVolumeClaimList{}, client.InNamespace(rig.Namespace), client.MatchingFields{"metadata.name": name})
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
