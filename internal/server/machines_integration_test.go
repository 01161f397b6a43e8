//go:build integration

package server

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	vmopv1a2 "github.com/vmware-tanzu/vm-operator/api/v1alpha2"
	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	corev1 "k8s.io/api/core/v1"
	nodev1 "k8s.io/api/node/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/util/retry"
	"sigs.k8s.io/controller-runtime/pkg/client"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/controllers/manager"
)

const namespace = "machines"

// clientOf knows all kinds.
func clientOf(t *testing.T, kubeconfig string) client.Client {
	t.Helper()
	rest, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	scheme, err := manager.NewScheme()
	if err != nil {
		t.Fatal(err)
	}
	c, err := client.New(rest, client.Options{Scheme: scheme})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// eventually waits until ok is true of an object.
func eventually[T client.Object](t *testing.T, c client.Client, obj T, ok func(T) bool) T {
	t.Helper()
	var last error
	err := wait.PollUntilContextTimeout(t.Context(), 100*time.Millisecond, patience, true, func(ctx context.Context) (bool, error) {
		last = c.Get(ctx, client.ObjectKeyFromObject(obj), obj)
		return last == nil && ok(obj), nil
	})
	if err != nil {
		text, _ := json.MarshalIndent(obj, "", " ")
		t.Fatalf("%v, %v: %s", err, last, text)
	}
	return obj
}

// TestMachines uses the API of virtual machines up to their pods, without a host that runs them.
func TestMachines(t *testing.T) {
	cfg := testConfig(t, t.TempDir())
	p := mustStart(t, cfg)
	c := clientOf(t, cfg.AdminKubeconfig)
	ctx := t.Context()
	for _, o := range []client.Object{
		&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace}},
		&nodev1.RuntimeClass{ObjectMeta: metav1.ObjectMeta{Name: machinev1.RuntimeClass}, Handler: machinev1.RuntimeClass},
		&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1", Labels: map[string]string{corev1.LabelTopologyZone: "z1"}}},
	} {
		if err := c.Create(ctx, o); err != nil && !apierrors.IsAlreadyExists(err) {
			t.Fatal(err)
		}
	}
	image := &vmopv1.ClusterVirtualMachineImage{ObjectMeta: metav1.ObjectMeta{Name: "vmi-0123456789abcdef0"}}
	if err := c.Create(ctx, image.DeepCopy()); err != nil {
		t.Fatal(err)
	}
	eventually(t, c, image, func(*vmopv1.ClusterVirtualMachineImage) bool { return true })
	image.Status = vmopv1.VirtualMachineImageStatus{
		Name: "debian-12", Type: "OVF", Firmware: "efi",
		Disks:      []vmopv1.VirtualMachineImageDiskInfo{{Name: "disk0", Limit: new(resource.MustParse("2Gi"))}},
		Conditions: []metav1.Condition{{Type: "Ready", Status: metav1.ConditionTrue, Reason: "True", LastTransitionTime: metav1.Now()}},
	}
	if err := c.Status().Update(ctx, image); err != nil {
		t.Fatal(err)
	}
	t.Run("DefaultClasses", func(t *testing.T) { checkClasses(t, c) })
	t.Run("Versions", func(t *testing.T) { checkVersions(t, c) })
	t.Run("V1alpha3", func(t *testing.T) { checkV1alpha3(t, c) })
	t.Run("V1alpha4", func(t *testing.T) { checkV1alpha4(t, c) })
	t.Run("Refusals", func(t *testing.T) { checkRefusals(t, c) })
	t.Run("PodOfAMachine", func(t *testing.T) { checkPod(t, cfg, c) })
	t.Run("Missing", func(t *testing.T) { checkMissing(t, c) })
	t.Run("Deletion", func(t *testing.T) { checkDeletion(t, c) })
	if text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid)); err == nil {
		for line := range strings.Lines(string(text)) {
			if strings.HasPrefix(line, "VmRSS") || strings.HasPrefix(line, "RssAnon") {
				t.Log(strings.TrimSpace(line))
			}
		}
	}
	p.stop(syscall.SIGTERM)
	if code := p.cmd.ProcessState.ExitCode(); code != 0 {
		t.Errorf("exit code %d:\n%s", code, p.output)
	}
	if strings.Contains(p.output.String(), "panic") {
		t.Errorf("output:\n%s", p.output)
	}
}

func checkClasses(t *testing.T, c client.Client) {
	class := eventually(t, c, &vmopv1.VirtualMachineClass{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: "guaranteed-8xlarge"}}, func(*vmopv1.VirtualMachineClass) bool { return true })
	if class.Spec.Hardware.Cpus != 32 || class.Spec.Policies.Resources.Requests.Memory.String() != "128Gi" {
		t.Errorf("%+v", class.Spec)
	}
	err := wait.PollUntilContextTimeout(t.Context(), 100*time.Millisecond, patience, true, func(ctx context.Context) (bool, error) {
		var classes vmopv1.VirtualMachineClassList
		var instances vmopv1.VirtualMachineClassInstanceList
		if err := c.List(ctx, &classes, client.InNamespace(namespace)); err != nil {
			return false, err
		}
		err := c.List(ctx, &instances, client.InNamespace(namespace), client.HasLabels{vmopv1.VMClassInstanceActiveLabelKey})
		return len(classes.Items) == 16 && len(instances.Items) == 16, err
	})
	if err != nil {
		t.Errorf("classes and instances: %v", err)
	}
	var system vmopv1.VirtualMachineClassList
	if err := c.List(t.Context(), &system, client.InNamespace("kube-system")); err != nil || len(system.Items) > 0 {
		t.Errorf("%d classes in kube-system, %v", len(system.Items), err)
	}
}

// checkVersions writes one version and reads another.
func checkVersions(t *testing.T, c client.Client) {
	ctx := t.Context()
	old := &vmopv1a2.VirtualMachine{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: "old"},
		Spec: vmopv1a2.VirtualMachineSpec{
			ImageName: "debian-12", ClassName: "best-effort-xsmall", StorageClass: "atoll", PowerState: vmopv1a2.VirtualMachinePowerStateOff,
			PowerOffMode: vmopv1a2.VirtualMachinePowerOpModeHard,
			Network:      &vmopv1a2.VirtualMachineNetworkSpec{Interfaces: []vmopv1a2.VirtualMachineNetworkInterfaceSpec{{Name: "eth0", DHCP4: true}}},
			Volumes: []vmopv1a2.VirtualMachineVolume{{Name: "data", VirtualMachineVolumeSource: vmopv1a2.VirtualMachineVolumeSource{
				PersistentVolumeClaim: &vmopv1a2.PersistentVolumeClaimVolumeSource{PersistentVolumeClaimVolumeSource: corev1.PersistentVolumeClaimVolumeSource{ClaimName: "data"}},
			}}},
		},
	}
	if err := c.Create(ctx, old); err != nil {
		t.Fatal(err)
	}
	now := eventually(t, c, &vmopv1.VirtualMachine{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: "old"}}, func(vm *vmopv1.VirtualMachine) bool {
		return vm.Status.PowerState == vmopv1.VirtualMachinePowerStateOff
	})
	switch {
	case now.Spec.Image == nil || now.Spec.Image.Kind != "ClusterVirtualMachineImage" || now.Spec.Image.Name != "vmi-0123456789abcdef0":
		t.Errorf("image %+v", now.Spec.Image)
	case now.Spec.BiosUUID == "" || now.Spec.InstanceUUID == "":
		t.Errorf("UUIDs %q, %q", now.Spec.BiosUUID, now.Spec.InstanceUUID)
	case now.Spec.Volumes[0].UnitNumber == nil || *now.Spec.Volumes[0].UnitNumber != 1 || now.Spec.Volumes[0].ControllerType != "SCSI":
		t.Errorf("volume %+v", now.Spec.Volumes[0])
	}
	// Back, changed, and forth: what the old version does not have must not get lost.
	err := retry.RetryOnConflict(retry.DefaultBackoff, func() error {
		if err := c.Get(ctx, client.ObjectKeyFromObject(old), old); err != nil {
			return err
		}
		old.Spec.PowerOffMode = vmopv1a2.VirtualMachinePowerOpModeSoft
		return c.Update(ctx, old)
	})
	if err != nil {
		t.Fatal(err)
	}
	again := eventually(t, c, &vmopv1.VirtualMachine{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: "old"}}, func(vm *vmopv1.VirtualMachine) bool {
		return vm.Spec.PowerOffMode == vmopv1.VirtualMachinePowerOpModeSoft
	})
	if again.Spec.BiosUUID != now.Spec.BiosUUID || again.Spec.Volumes[0].UnitNumber == nil || again.Spec.Hardware == nil || len(again.Spec.Hardware.SCSIControllers) != 1 {
		t.Errorf("after a change in v1alpha2: %+v", again.Spec)
	}
	old = &vmopv1a2.VirtualMachine{ObjectMeta: old.ObjectMeta}
	eventually(t, c, old, func(vm *vmopv1a2.VirtualMachine) bool { return vm.Status.BiosUUID == now.Spec.BiosUUID })
}

func machine(name string) *vmopv1.VirtualMachine {
	return &vmopv1.VirtualMachine{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, Labels: map[string]string{"app": name}},
		Spec: vmopv1.VirtualMachineSpec{
			Image:     &vmopv1.VirtualMachineImageRef{Kind: "ClusterVirtualMachineImage", Name: "vmi-0123456789abcdef0"},
			ClassName: "best-effort-xsmall", StorageClass: "atoll",
		},
	}
}

// checkRefusals has the webhooks refuse what cannot be.
func checkRefusals(t *testing.T, c client.Client) {
	other := &vmopv1.VirtualMachine{}
	if err := c.Get(t.Context(), client.ObjectKey{Namespace: namespace, Name: "old"}, other); err != nil {
		t.Fatal(err)
	}
	for _, r := range []struct {
		name, want string
		change     func(*vmopv1.VirtualMachine)
	}{
		{"suspended", "spec.powerState", func(vm *vmopv1.VirtualMachine) { vm.Spec.PowerState = "Suspended" }},
		{"no class", "spec.className: Required", func(vm *vmopv1.VirtualMachine) { vm.Spec.ClassName = "" }},
		{"no image", "spec.image: Required", func(vm *vmopv1.VirtualMachine) { vm.Spec.Image = nil }},
		{"unknown image", "spec.imageName: Invalid value: \"nothing\"", func(vm *vmopv1.VirtualMachine) { vm.Spec.Image, vm.Spec.ImageName = nil, "nothing" }},
		{"long name", "metadata.name: Too long", func(vm *vmopv1.VirtualMachine) { vm.Name = strings.Repeat("x", 64) }},
		{"interface", "spec.network.interfaces[0].name", func(vm *vmopv1.VirtualMachine) {
			vm.Spec.Network = &vmopv1.VirtualMachineNetworkSpec{Interfaces: []vmopv1.VirtualMachineNetworkInterfaceSpec{{Name: "e"}}}
		}},
		{"same UUID", "is that of VirtualMachine old", func(vm *vmopv1.VirtualMachine) { vm.Spec.BiosUUID = other.Spec.BiosUUID }},
		{"affinity", "spec.groupName: Required", func(vm *vmopv1.VirtualMachine) { vm.Spec.Affinity = &vmopv1.AffinitySpec{} }},
		{"restart", `may only be set to "now"`, func(vm *vmopv1.VirtualMachine) { vm.Spec.NextRestartTime = "tomorrow" }},
	} {
		t.Run(r.name, func(t *testing.T) {
			vm := machine("refused")
			r.change(vm)
			err := c.Create(t.Context(), vm)
			if err == nil || !strings.Contains(err.Error(), r.want) {
				t.Fatalf("error %v", err)
			}
		})
	}
	for _, r := range []struct {
		name, want string
		change     func(*vmopv1.VirtualMachine)
	}{
		{"power state gone", "cannot set power state to empty string", func(vm *vmopv1.VirtualMachine) { vm.Spec.PowerState = "" }},
		{"another image", "spec.image: Forbidden", func(vm *vmopv1.VirtualMachine) { vm.Spec.Image.Name = "x" }},
		{"another UUID", "spec.biosUUID: Forbidden", func(vm *vmopv1.VirtualMachine) { vm.Spec.BiosUUID = "11111111-1111-1111-1111-111111111111" }},
		{"suspend one that is off", "cannot suspend a VM that is powered off", func(vm *vmopv1.VirtualMachine) { vm.Spec.PowerState = "Suspended" }},
		{"restart one that is off", "only a virtual machine whose spec.powerState is PoweredOn", func(vm *vmopv1.VirtualMachine) { vm.Spec.NextRestartTime = "now" }},
	} {
		t.Run(r.name, func(t *testing.T) {
			err := retry.RetryOnConflict(retry.DefaultBackoff, func() error { // with the controller
				vm := &vmopv1.VirtualMachine{}
				if err := c.Get(t.Context(), client.ObjectKey{Namespace: namespace, Name: "old"}, vm); err != nil {
					t.Fatal(err)
				}
				r.change(vm)
				return c.Update(t.Context(), vm)
			})
			if err == nil || !strings.Contains(err.Error(), r.want) {
				t.Fatalf("error %v", err)
			}
		})
	}
}

// checkPod waits for the pod and the claim, and plays the host.
func checkPod(t *testing.T, cfg Config, c client.Client) {
	ctx := t.Context()
	begin := time.Now()
	if err := c.Create(ctx, machine("web")); err != nil {
		t.Fatal(err)
	}
	eventually(t, c, machine("web"), func(vm *vmopv1.VirtualMachine) bool { return len(vm.Status.Conditions) > 0 })
	pod := eventually(t, c, &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: "web"}}, func(*corev1.Pod) bool { return true })
	t.Logf("from the VirtualMachine to its pod: %s", time.Since(begin).Round(time.Millisecond))
	if pod.Labels["app"] != "web" || *pod.Spec.RuntimeClassName != machinev1.RuntimeClass || pod.Spec.Containers[0].Resources.Limits.Memory().String() != "2Gi" {
		t.Errorf("%+v", pod)
	}
	var m machinev1.Machine
	if err := json.Unmarshal([]byte(pod.Annotations[machinev1.Annotation]), &m); err != nil {
		t.Fatal(err)
	}
	if m.CPU.Count != 2 || m.Firmware.Type != machinev1.EFI || len(m.NICs) != 1 || !m.NICs[0].Pod {
		t.Errorf("%+v", m)
	}
	vm := eventually(t, c, &vmopv1.VirtualMachine{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: "web"}}, func(vm *vmopv1.VirtualMachine) bool {
		return meta.IsStatusConditionTrue(vm.Status.Conditions, vmopv1.VirtualMachineConditionCreated)
	})
	for _, typ := range []string{"VirtualMachineClassReady", "VirtualMachineImageReady", "VirtualMachineStorageReady", "VirtualMachineBootstrapReady", "VirtualMachineNetworkReady"} {
		if condition := meta.FindStatusCondition(vm.Status.Conditions, typ); condition == nil || condition.Status != metav1.ConditionTrue || condition.Reason != "True" {
			t.Errorf("%s: %+v", typ, condition)
		}
	}
	claim := &corev1.PersistentVolumeClaim{}
	if err := c.Get(ctx, client.ObjectKey{Namespace: namespace, Name: pod.Spec.Volumes[0].PersistentVolumeClaim.ClaimName}, claim); err != nil {
		t.Fatal(err)
	}
	if claim.Annotations["atoll.dev/image"] != "ClusterVirtualMachineImage/vmi-0123456789abcdef0" || claim.Spec.Resources.Requests.Storage().String() != "2Gi" {
		t.Errorf("%+v", claim)
	}
	if pod.Spec.NodeName == "" {
		if err := c.SubResource("binding").Create(ctx, pod, &corev1.Binding{Target: corev1.ObjectReference{Kind: "Node", Name: "n1"}}); err != nil && !apierrors.IsConflict(err) {
			t.Fatal(err)
		}
	}
	state, _ := json.Marshal(machinev1.State{
		Revision: 1, Phase: machinev1.Running, Started: time.Now().Format(time.RFC3339), CPUs: 2, Memory: 2 << 30,
		NICs: []machinev1.NICState{{Name: "eth0", MAC: m.NICs[0].MAC, Addresses: []string{"10.244.0.9/22"}}},
	})
	patch := `{"metadata":{"annotations":{"` + machinev1.StateAnnotation + `":` + strconv.Quote(string(state)) + `}}}`
	host := clientOf(t, filepath.Join(cfg.KubeconfigDir, "kubelet.kubeconfig"))
	if err := host.Status().Patch(ctx, pod, client.RawPatch("application/merge-patch+json", []byte(patch))); err != nil {
		t.Fatal(err)
	}
	eventually(t, c, vm, func(vm *vmopv1.VirtualMachine) bool {
		return vm.Status.PowerState == vmopv1.VirtualMachinePowerStateOn && vm.Status.Network != nil && vm.Status.Network.PrimaryIP4 == "10.244.0.9" &&
			vm.Status.NodeName == "n1" && vm.Status.Zone == "z1" && vm.Status.BiosUUID == vm.Spec.BiosUUID
	})
}

// checkMissing wants what is missing named, with the way out.
func checkMissing(t *testing.T, c client.Client) {
	vm := machine("lacking")
	vm.Spec.ClassName, vm.Spec.StorageClass, vm.Spec.Image.Name = "gigantic", "gold", "vmi-unknown"
	if err := c.Create(t.Context(), vm); err != nil {
		t.Fatal(err)
	}
	for typ, want := range map[string]string{
		"VirtualMachineClassReady":   "VirtualMachineClass gigantic does not exist",
		"VirtualMachineImageReady":   "ClusterVirtualMachineImage vmi-unknown does not exist",
		"VirtualMachineStorageReady": "StorageClass gold does not exist",
	} {
		eventually(t, c, vm, func(vm *vmopv1.VirtualMachine) bool {
			condition := meta.FindStatusCondition(vm.Status.Conditions, typ)
			return condition != nil && condition.Status == metav1.ConditionFalse && condition.Reason == "NotFound" && strings.Contains(condition.Message, want)
		})
	}
}

func checkDeletion(t *testing.T, c client.Client) {
	for _, name := range []string{"old", "third", "fourth", "lacking"} {
		vm := &vmopv1.VirtualMachine{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name}}
		if err := c.Delete(t.Context(), vm); err != nil {
			t.Fatal(err)
		}
		err := wait.PollUntilContextTimeout(t.Context(), 100*time.Millisecond, patience, true, func(ctx context.Context) (bool, error) {
			return apierrors.IsNotFound(c.Get(ctx, client.ObjectKeyFromObject(vm), vm)), nil
		})
		if err != nil {
			t.Errorf("%s: %v, %+v", name, err, vm)
		}
	}
}
