package pod

import (
	"encoding/json"
	"strings"
	"testing"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"sigs.k8s.io/yaml"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/controllers/virtualmachine/machine"
	"atoll.dev/atoll/internal/controllers/virtualmachine/placement"
	"atoll.dev/atoll/internal/controllers/virtualmachine/size"
	"atoll.dev/atoll/internal/testkit/golden"
)

func sized(t *testing.T) size.Size {
	t.Helper()
	s, err := size.Read(&vmopv1.VirtualMachineClassSpec{Hardware: vmopv1.VirtualMachineClassHardware{Cpus: 2, Memory: resource.MustParse("4Gi")}})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func full() *vmopv1.VirtualMachine {
	return &vmopv1.VirtualMachine{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: "team", Name: "db", UID: "11111111-2222-3333-4444-555555555555",
			Labels:      map[string]string{"app": "db", corev1.LabelTopologyZone: "z1", machinev1.UIDLabel: "forged"},
			Annotations: map[string]string{machine.SoftSecondsAnnotation: "40", moduleAnnotation: "control-plane-group"},
		},
		Spec: vmopv1.VirtualMachineSpec{
			BiosUUID: "AAAAAAAA-bbbb-cccc-dddd-eeeeeeeeeeee", InstanceUUID: "aaaaaaaa-bbbb-cccc-dddd-ffffffffffff", GuestID: "debian12_64Guest",
			PowerOffMode: vmopv1.VirtualMachinePowerOpModeTrySoft,
			Crypto:       &vmopv1.VirtualMachineCryptoSpec{VTPMMode: vmopv1.VirtualMachineCryptoVTPMModeNew},
			Network:      &vmopv1.VirtualMachineNetworkSpec{HostName: "db-1", DomainName: "example.org"},
			Reserved:     &vmopv1.VirtualMachineReservedSpec{ResourcePolicyName: "policy"},
			BootOptions: &vmopv1.VirtualMachineBootOptions{
				Firmware: vmopv1.VirtualMachineBootOptionsFirmwareTypeEFI, EFISecureBoot: vmopv1.VirtualMachineBootOptionsEFISecureBootEnabled,
				BootOrder: []vmopv1.VirtualMachineBootOptionsBootableDevice{
					{Type: vmopv1.VirtualMachineBootOptionsBootableCDRomDevice, Name: "install"},
					{Type: vmopv1.VirtualMachineBootOptionsBootableDiskDevice},
					{Type: vmopv1.VirtualMachineBootOptionsBootableNetworkDevice, Name: "eth0"},
				},
			},
			Affinity: &vmopv1.AffinitySpec{VMAntiAffinity: &vmopv1.VMAntiAffinitySpec{
				RequiredDuringSchedulingPreferredDuringExecution: []vmopv1.VMAffinityTerm{{
					LabelSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "db"}}, TopologyKey: corev1.LabelTopologyZone,
				}},
			}},
			ReadinessProbe: &vmopv1.VirtualMachineReadinessProbeSpec{TCPSocket: &vmopv1.TCPSocketAction{Port: intstr.FromInt32(5432)}, PeriodSeconds: 5}, //nolint:staticcheck // it works here
		},
	}
}

func inputs(t *testing.T, vm *vmopv1.VirtualMachine) Inputs {
	s := sized(t)
	data := &vmopv1.VirtualMachineVolume{Name: "data", ControllerType: vmopv1.VirtualControllerTypeNVME, ControllerBusNumber: new(int32(0)), UnitNumber: new(int32(3)), DiskMode: vmopv1.VolumeDiskModeIndependentNonPersistent}
	install := &vmopv1.VirtualMachineCdromSpec{Name: "install", ControllerType: vmopv1.VirtualControllerTypeSATA, ControllerBusNumber: new(int32(0)), UnitNumber: new(int32(0))}
	m := machine.Build(machine.Inputs{
		VM: vm, Size: s, Firmware: "bios",
		Disks: []machinev1.Disk{
			machine.Boot("default/v1", machine.DiskUUID("boot"), placement.Boot(nil)),
			machine.Volume(data, "default/v2", machine.DiskUUID("data")),
			machine.CDROM(vm, install, ""),
		},
		NICs:      []machinev1.NIC{{Name: "eth0", Model: "virtio-net-pci", MAC: machine.MAC(vm, "eth0"), Pod: true}},
		SeedLabel: "cidata",
	})
	on := func(nodes ...string) *corev1.NodeSelector {
		return &corev1.NodeSelector{NodeSelectorTerms: []corev1.NodeSelectorTerm{{MatchExpressions: []corev1.NodeSelectorRequirement{
			{Key: "topology.csi.atoll.dev/node", Operator: corev1.NodeSelectorOpIn, Values: nodes},
		}}}}
	}
	return Inputs{VM: vm, Machine: m, Size: s, BootClaim: "disk-x", SeedSecret: "db-seed-1", Reach: []*corev1.NodeSelector{on("n1", "n2"), nil, on("n2")}}
}

func TestGoldenPod(t *testing.T) {
	in := inputs(t, full())
	p, err := Build(in)
	if err != nil {
		t.Fatal(err)
	}
	text, err := json.MarshalIndent(in.Machine, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	golden.Compare(t, "machine.json", string(text)+"\n")
	delete(p.Annotations, machinev1.Annotation)
	text, err = yaml.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	golden.Compare(t, "pod.yaml", string(text))
}

func TestProbes(t *testing.T) {
	for _, c := range []struct {
		probe vmopv1.VirtualMachineReadinessProbeSpec
		want  string
	}{
		{vmopv1.VirtualMachineReadinessProbeSpec{GuestHeartbeat: &vmopv1.GuestHeartbeatAction{}}, machinev1.CommandHeartbeat},
		{vmopv1.VirtualMachineReadinessProbeSpec{GuestInfo: []vmopv1.GuestInfoAction{{Key: "a", Value: "^b$"}, {Key: "c"}}}, machinev1.CommandGuestInfo + " a ^b$ c "},
	} {
		if got := strings.Join(Probe(&c.probe).Exec.Command, " "); got != c.want {
			t.Errorf("%q", got)
		}
	}
	socket := vmopv1.VirtualMachineReadinessProbeSpec{}
	socket.TCPSocket = &vmopv1.TCPSocketAction{Host: "192.0.2.1"} //nolint:staticcheck // see TCPSocket
	if got := Probe(&socket).TCPSocket.Host; got != "" {
		t.Errorf("the kubelet would connect to %s", got)
	}
	if Probe(&vmopv1.VirtualMachineReadinessProbeSpec{}) != nil || Probe(nil) != nil {
		t.Error("a probe of nothing")
	}
}

func TestTooLarge(t *testing.T) {
	in := inputs(t, full())
	in.Machine.BootOrder = []string{strings.Repeat("x", maxMachine)}
	if _, err := Build(in); err == nil || !strings.Contains(err.Error(), "at most") {
		t.Fatal(err)
	}
}

func TestGrace(t *testing.T) {
	if h, s, ts := Grace(machinev1.Stop{Mode: machinev1.Hard}), Grace(machinev1.Stop{Mode: machinev1.Soft}), Grace(machinev1.Stop{Mode: machinev1.TrySoft, TimeoutSeconds: 40}); h != hardGrace || s != softGrace || ts != 70 {
		t.Fatal(h, s, ts)
	}
}
