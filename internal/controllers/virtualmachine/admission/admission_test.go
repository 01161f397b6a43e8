package admission

import (
	"context"
	"encoding/json"
	"strings"
	"testing"
	"time"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	admissionv1 "k8s.io/api/admission/v1"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/intstr"
	testclock "k8s.io/utils/clock/testing"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/webhook/admission"

	"atoll.dev/atoll/internal/controllers/manager"
	"atoll.dev/atoll/internal/controllers/virtualmachine/machine"
	"atoll.dev/atoll/internal/datadir/pki"
)

const ns = "team"

func newWebhook(t *testing.T, objects ...client.Object) *Webhook {
	t.Helper()
	scheme, err := manager.NewScheme()
	if err != nil {
		t.Fatal(err)
	}
	c := fake.NewClientBuilder().WithScheme(scheme).WithIndex(&vmopv1.VirtualMachine{}, uniqueIndex, unique).WithObjects(objects...).Build()
	return &Webhook{Cached: c, Live: c, Clock: testclock.NewFakePassiveClock(time.Date(2026, 11, 28, 12, 0, 0, 5, time.UTC))}
}

// as is the context of a request that changes before, or makes a new object if that is nil.
func as(t *testing.T, user string, before *vmopv1.VirtualMachine) context.Context {
	t.Helper()
	req := admission.Request{AdmissionRequest: admissionv1.AdmissionRequest{Operation: admissionv1.Create, UserInfo: authenticationv1.UserInfo{Username: user}}}
	if before != nil {
		raw, err := json.Marshal(before)
		if err != nil {
			t.Fatal(err)
		}
		req.Operation, req.OldObject = admissionv1.Update, runtime.RawExtension{Raw: raw}
	}
	return admission.NewContextWithRequest(t.Context(), req)
}

func image() *vmopv1.VirtualMachineImage {
	return &vmopv1.VirtualMachineImage{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "vmi-1"}, Status: vmopv1.VirtualMachineImageStatus{Name: "debian"}}
}

func clusterImageOf(name, display string) *vmopv1.ClusterVirtualMachineImage {
	return &vmopv1.ClusterVirtualMachineImage{ObjectMeta: metav1.ObjectMeta{Name: name}, Status: vmopv1.VirtualMachineImageStatus{Name: display}}
}

func vm() *vmopv1.VirtualMachine {
	return &vmopv1.VirtualMachine{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "web"}, Spec: vmopv1.VirtualMachineSpec{
		ImageName: "vmi-1", ClassName: "small",
	}}
}

func volume(name string) vmopv1.VirtualMachineVolume {
	return vmopv1.VirtualMachineVolume{Name: name, VirtualMachineVolumeSource: vmopv1.VirtualMachineVolumeSource{
		PersistentVolumeClaim: &vmopv1.PersistentVolumeClaimVolumeSource{PersistentVolumeClaimVolumeSource: corev1.PersistentVolumeClaimVolumeSource{ClaimName: name}},
	}}
}

// TestFirstStateInAGroup: a machine without a power state waits for its turn where a group will give it one.
func TestFirstStateInAGroup(t *testing.T) {
	const on, off = vmopv1.VirtualMachinePowerStateOn, vmopv1.VirtualMachinePowerStateOff
	group := func(name string, state vmopv1.VirtualMachinePowerState, members ...string) *vmopv1.VirtualMachineGroup {
		g := &vmopv1.VirtualMachineGroup{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name}, Spec: vmopv1.VirtualMachineGroupSpec{PowerState: state}}
		order := vmopv1.VirtualMachineGroupBootOrderGroup{}
		for _, m := range members {
			order.Members = append(order.Members, vmopv1.GroupMember{Name: m})
		}
		g.Spec.BootOrder = append(g.Spec.BootOrder, order)
		return g
	}
	going := group("going", on, "web")
	going.DeletionTimestamp, going.Finalizers = new(metav1.Now()), []string{"x"}
	above := group("above", on)
	above.Spec.BootOrder[0].Members = []vmopv1.GroupMember{{Kind: "VirtualMachineGroup", Name: "below"}}
	below := group("below", "", "web")
	below.Spec.GroupName = "above"
	circle := group("circle", "", "web")
	circle.Spec.GroupName, circle.Spec.BootOrder[0].Members = "circle", append(circle.Spec.BootOrder[0].Members, vmopv1.GroupMember{Kind: "VirtualMachineGroup", Name: "circle"})
	w := newWebhook(t, image(), group("ordered", on, "web"), group("off", off, "web"), group("undecided", "", "web"), group("others", on, "db"),
		group("suspended", vmopv1.VirtualMachinePowerStateSuspended, "web"), going, above, below, circle)
	for _, c := range []struct {
		group       string
		given, want vmopv1.VirtualMachinePowerState
	}{
		{"", "", on},
		{"ordered", "", off},
		{"off", "", off},
		{"ordered", on, on},
		{"undecided", "", on},
		{"others", "", on},
		{"missing", "", on},
		{"suspended", "", on},
		{"going", "", on},
		{"below", "", off},
		{"circle", "", on},
	} {
		got := vm()
		got.Spec.GroupName, got.Spec.PowerState = c.group, c.given
		if err := w.Default(as(t, "u", nil), got); err != nil || got.Spec.PowerState != c.want {
			t.Errorf("in group %q, given %q: %q, %v", c.group, c.given, got.Spec.PowerState, err)
		}
	}
}

func TestDefaultsOfANewMachine(t *testing.T) {
	w := newWebhook(t, image())
	got := vm()
	got.Spec.Volumes = []vmopv1.VirtualMachineVolume{volume("data")}
	got.Spec.Volumes[0].ApplicationType = vmopv1.VolumeApplicationTypeOracleRAC
	got.Spec.Bootstrap = &vmopv1.VirtualMachineBootstrapSpec{CloudInit: &vmopv1.VirtualMachineBootstrapCloudInitSpec{}}
	if err := w.Default(as(t, "u", nil), got); err != nil {
		t.Fatal(err)
	}
	s := got.Spec
	switch {
	case s.PowerState != vmopv1.VirtualMachinePowerStateOn, s.BiosUUID == "", s.InstanceUUID == "", s.BiosUUID == s.InstanceUUID:
		t.Errorf("%+v", s)
	case s.Image == nil || s.Image.Kind != "VirtualMachineImage" || s.Image.Name != "vmi-1":
		t.Errorf("image %+v", s.Image)
	case len(s.Network.Interfaces) != 1 || s.Network.Interfaces[0].Name != "eth0":
		t.Errorf("network %+v", s.Network)
	case *s.Volumes[0].UnitNumber != 1 || s.Volumes[0].SharingMode != vmopv1.VolumeSharingModeMultiWriter || s.Volumes[0].DiskMode != vmopv1.VolumeDiskModeIndependentPersistent:
		t.Errorf("volume %+v", s.Volumes[0])
	case s.Bootstrap.CloudInit.InstanceID != s.BiosUUID:
		t.Errorf("instance id %s", s.Bootstrap.CloudInit.InstanceID)
	}
	if _, err := w.ValidateCreate(as(t, "u", nil), got); err != nil {
		t.Errorf("and it is refused: %v", err)
	}
}

func TestImageNames(t *testing.T) {
	w := newWebhook(t, image(), clusterImageOf("vmi-2", "debian"), clusterImageOf("vmi-3", "Rocky 9"), clusterImageOf("vmi-1", "x"))
	for _, c := range []struct {
		name string
		ref  *vmopv1.VirtualMachineImageRef
		want string
	}{
		{"vmi-1", nil, "VirtualMachineImage vmi-1"},
		{"vmi-2", nil, "ClusterVirtualMachineImage vmi-2"},
		{"Rocky 9", nil, "ClusterVirtualMachineImage vmi-3"},
		{"debian", nil, "several images have this display name (VirtualMachineImage vmi-1, ClusterVirtualMachineImage vmi-2)"},
		{"plan9", nil, "no VirtualMachineImage or ClusterVirtualMachineImage"},
		{"Rocky 9", &vmopv1.VirtualMachineImageRef{Kind: "ClusterVirtualMachineImage", Name: "vmi-2"}, "set only one of the two"},
		{"Rocky 9", &vmopv1.VirtualMachineImageRef{Kind: "ClusterVirtualMachineImage", Name: "vmi-3"}, "ClusterVirtualMachineImage vmi-3"},
	} {
		got := vm()
		got.Spec.ImageName, got.Spec.Image = c.name, c.ref
		err := w.Default(as(t, "u", nil), got)
		text := ""
		if err != nil {
			text = err.Error()
		} else {
			text = got.Spec.Image.Kind + " " + got.Spec.Image.Name
		}
		if !strings.Contains(text, c.want) {
			t.Errorf("%s: %s", c.name, text)
		}
	}
}

// made is a machine that the webhook has seen.
func made(t *testing.T, w *Webhook) *vmopv1.VirtualMachine {
	t.Helper()
	got := vm()
	got.Spec.Volumes = []vmopv1.VirtualMachineVolume{volume("data")}
	if err := w.Default(as(t, "u", nil), got); err != nil {
		t.Fatal(err)
	}
	got.Status.PowerState = vmopv1.VirtualMachinePowerStateOn
	return got
}

func TestUpdates(t *testing.T) {
	w := newWebhook(t, image())
	before := made(t, w)
	after := before.DeepCopy()
	after.Spec.NextRestartTime, after.Spec.BiosUUID, after.Spec.Image = "NOW", "", nil
	after.Spec.Volumes = []vmopv1.VirtualMachineVolume{volume("first"), volume("data")}
	if err := w.Default(as(t, "u", before), after); err != nil {
		t.Fatal(err)
	}
	if after.Spec.NextRestartTime != "2026-11-28T12:00:00.000000005Z" || after.Spec.BiosUUID != before.Spec.BiosUUID || after.Spec.Image == nil {
		t.Errorf("%+v", after.Spec)
	}
	again := after.DeepCopy()
	again.Spec.NextRestartTime = "now"
	if err := w.Default(as(t, "u", after), again); err != nil || again.Spec.NextRestartTime != "2026-11-28T12:00:01Z" {
		t.Errorf("a second restart within the second, which is how they are told apart: %s, %v", again.Spec.NextRestartTime, err)
	}
	if v := after.Spec.Volumes; *v[1].UnitNumber != 1 || *v[0].UnitNumber != 2 {
		t.Errorf("a disk has moved: %d, %d", *v[0].UnitNumber, *v[1].UnitNumber)
	}
	if _, err := w.ValidateUpdate(as(t, "u", before), before, after); err != nil {
		t.Error(err)
	}
}

func TestRefusedChanges(t *testing.T) {
	w := newWebhook(t, image())
	for _, c := range []struct {
		name, want string
		change     func(*vmopv1.VirtualMachineSpec)
	}{
		{"storage class", "spec.storageClass: Forbidden", func(s *vmopv1.VirtualMachineSpec) { s.StorageClass = "other" }},
		{"interface", "spec.network.interfaces: Forbidden: updates to this field are not allowed when VM power is on", func(s *vmopv1.VirtualMachineSpec) { s.Network.Interfaces[0].MTU = new(int64(9000)) }},
		{"disk moves", "spec.volumes[0].unitNumber: Forbidden", func(s *vmopv1.VirtualMachineSpec) { s.Volumes[0].UnitNumber = new(int32(9)) }},
		{"guest", "spec.guestID: Forbidden", func(s *vmopv1.VirtualMachineSpec) { s.GuestID = "x" }},
		{"hardware version", "cannot downgrade", func(s *vmopv1.VirtualMachineSpec) { s.MinHardwareVersion = -1 }},
		{"smaller disk", "a disk cannot shrink", func(s *vmopv1.VirtualMachineSpec) { s.Advanced.BootDiskCapacity = new(resource.MustParse("1Gi")) }},
		{"policy", "spec.reserved: Forbidden", func(s *vmopv1.VirtualMachineSpec) {
			s.Reserved = &vmopv1.VirtualMachineReservedSpec{ResourcePolicyName: "p"}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			before := made(t, w)
			before.Spec.Advanced = &vmopv1.VirtualMachineAdvancedSpec{BootDiskCapacity: new(resource.MustParse("2Gi"))}
			after := before.DeepCopy()
			c.change(&after.Spec)
			_, err := w.ValidateUpdate(as(t, "u", before), before, after)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v", err)
			}
			if _, err := w.ValidateUpdate(as(t, pki.VMControllerUser, before), before, after); err != nil {
				t.Errorf("our own controllers cannot either: %v", err)
			}
		})
	}
}

func TestGuestCrashAnnotation(t *testing.T) {
	w := newWebhook(t, image())
	before := made(t, w)
	for value, want := range map[string]string{"Keep": "", "Restart": "", "keep": `metadata.annotations[atoll.dev/guest-crash]: Unsupported value: "keep": supported values: "Restart", "Keep"`} {
		after := before.DeepCopy()
		after.Annotations = map[string]string{machine.CrashAnnotation: value}
		_, err := w.ValidateUpdate(as(t, "u", before), before, after)
		if err == nil && want != "" || err != nil && (want == "" || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: error %v", value, err)
		}
	}
}

func TestRefusedAtAnyTime(t *testing.T) {
	other := vm()
	other.Name, other.Spec.BiosUUID = "other", "11111111-2222-3333-4444-555555555555"
	other.Spec.Network = &vmopv1.VirtualMachineNetworkSpec{Interfaces: []vmopv1.VirtualMachineNetworkInterfaceSpec{{Name: "eth0", MACAddr: "02:00:00:00:00:AA"}}}
	foreign := other.DeepCopy()
	foreign.Namespace, foreign.Spec.BiosUUID, foreign.Spec.Network = "elsewhere", "99999999-2222-3333-4444-555555555555", nil
	quota := &corev1.ResourceQuota{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "q"}, Spec: corev1.ResourceQuotaSpec{Hard: corev1.ResourceList{"gold" + storageQuotaSuffix: resource.MustParse("1Ti")}}}
	w := newWebhook(t, image(), other, foreign, quota)
	nic := func(change func(*vmopv1.VirtualMachineNetworkInterfaceSpec)) func(*vmopv1.VirtualMachineSpec) {
		return func(s *vmopv1.VirtualMachineSpec) { change(&s.Network.Interfaces[0]) }
	}
	for _, c := range []struct {
		name, want string
		change     func(*vmopv1.VirtualMachineSpec)
	}{
		{"UUID twice", "is that of VirtualMachine other", func(s *vmopv1.VirtualMachineSpec) { s.BiosUUID = strings.ToUpper(other.Spec.BiosUUID) }},
		{"UUID of another namespace", "a VirtualMachine of another namespace", func(s *vmopv1.VirtualMachineSpec) { s.BiosUUID = foreign.Spec.BiosUUID }},
		{"MAC twice", "spec.network.interfaces[0].macAddr: Invalid value: \"02:00:00:00:00:aa\": is that of VirtualMachine other", nic(func(n *vmopv1.VirtualMachineNetworkInterfaceSpec) { n.MACAddr = "02:00:00:00:00:aa" })},
		{"MAC of many", "macAddr", nic(func(n *vmopv1.VirtualMachineNetworkInterfaceSpec) { n.MACAddr = "01:00:00:00:00:aa" })},
		{"address", "addresses[0]", nic(func(n *vmopv1.VirtualMachineNetworkInterfaceSpec) { n.Addresses = []string{"10.0.0.1"} })},
		{"address and DHCP", "dhcp4 cannot be used", nic(func(n *vmopv1.VirtualMachineNetworkInterfaceSpec) {
			n.DHCP4, n.Addresses = true, []string{"10.0.0.1/8"}
		})},
		{"storage class", "Storage policy is not associated with the namespace team: use one of gold", func(s *vmopv1.VirtualMachineSpec) { s.StorageClass = "silver" }},
		{"volume twice", "spec.volumes[1].persistentVolumeClaim.claimName: Duplicate", func(s *vmopv1.VirtualMachineSpec) {
			s.Volumes = []vmopv1.VirtualMachineVolume{volume("a"), volume("a")}
			s.Volumes[1].Name = "b"
		}},
		{"volume without claim", "spec.volumes[0].persistentVolumeClaim.claimName: Required", func(s *vmopv1.VirtualMachineSpec) { s.Volumes = []vmopv1.VirtualMachineVolume{{Name: "a"}} }},
		{"CD-ROM without guest", "spec.guestID: Required", func(s *vmopv1.VirtualMachineSpec) {
			s.Hardware = &vmopv1.VirtualMachineHardwareSpec{Cdrom: []vmopv1.VirtualMachineCdromSpec{{Name: "cd", Image: vmopv1.VirtualMachineImageRef{Kind: namespaceImage, Name: "iso"}}}}
		}},
		{"controllers twice", "spec.hardware.sataControllers[1].busNumber: Duplicate", func(s *vmopv1.VirtualMachineSpec) {
			s.Hardware = &vmopv1.VirtualMachineHardwareSpec{SATAControllers: []vmopv1.SATAControllerSpec{{BusNumber: 1}, {BusNumber: 1}}}
		}},
		{"two probes", "exactly one of", func(s *vmopv1.VirtualMachineSpec) {
			s.ReadinessProbe = &vmopv1.VirtualMachineReadinessProbeSpec{GuestInfo: []vmopv1.GuestInfoAction{{Key: "a"}}, GuestHeartbeat: &vmopv1.GuestHeartbeatAction{}}
		}},
		{"probe of another address", "spec.readinessProbe.tcpSocket.host: Invalid value: \"127.0.0.1\": the probe goes to the machine's own address: leave it empty", func(s *vmopv1.VirtualMachineSpec) {
			s.ReadinessProbe = &vmopv1.VirtualMachineReadinessProbeSpec{}
			s.ReadinessProbe.TCPSocket = &vmopv1.TCPSocketAction{Host: "127.0.0.1", Port: intstr.FromInt32(22)} //nolint:staticcheck // see pod.TCPSocket
		}},
		{"bootstrap", "CloudInit may not be used with any other", func(s *vmopv1.VirtualMachineSpec) {
			s.Bootstrap = &vmopv1.VirtualMachineBootstrapSpec{CloudInit: &vmopv1.VirtualMachineBootstrapCloudInitSpec{}, LinuxPrep: &vmopv1.VirtualMachineBootstrapLinuxPrepSpec{}}
		}},
		{"boot order", "spec.bootOptions.bootOrder[0].name", func(s *vmopv1.VirtualMachineSpec) {
			s.BootOptions = &vmopv1.VirtualMachineBootOptions{BootOrder: []vmopv1.VirtualMachineBootOptionsBootableDevice{{Type: vmopv1.VirtualMachineBootOptionsBootableNetworkDevice, Name: "eth9"}}}
		}},
		{"snapshot", "a new virtual machine has no snapshots", func(s *vmopv1.VirtualMachineSpec) { s.CurrentSnapshotName = "s" }},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := vm()
			got.Spec.Network = &vmopv1.VirtualMachineNetworkSpec{Interfaces: []vmopv1.VirtualMachineNetworkInterfaceSpec{{Name: "eth0"}}}
			c.change(&got.Spec)
			err := w.Default(as(t, "u", nil), got)
			if err == nil {
				_, err = w.ValidateCreate(as(t, "u", nil), got)
			}
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("error %v", err)
			}
		})
	}
}
