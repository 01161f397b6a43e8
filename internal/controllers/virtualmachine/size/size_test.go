package size

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	"k8s.io/apimachinery/pkg/api/resource"
)

func class(cpus int64, memory, request, limit, config string) *vmopv1.VirtualMachineClassSpec {
	c := &vmopv1.VirtualMachineClassSpec{Hardware: vmopv1.VirtualMachineClassHardware{Cpus: cpus, Memory: resource.MustParse(memory)}, ConfigSpec: []byte(config)}
	if request != "" {
		c.Policies.Resources.Requests.Cpu = resource.MustParse(request)
	}
	if limit != "" {
		c.Policies.Resources.Limits.Cpu = resource.MustParse(limit)
	}
	return c
}

func TestRequests(t *testing.T) {
	for _, c := range []struct{ name, request, limit, wantRequest, wantLimit string }{
		{"best effort", "", "", "20m", "2"},
		{"processors", "1500m", "", "1500m", "2"},
		{"guaranteed", "2", "2", "2", "2"},
		{"MHz", "2000", "3000", "1", "1500m"},
		{"MHz as VMware's samples write it", "1000Mi", "", "500m", "2"},
		{"more than there is", "9000", "", "2", "2"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s, err := Read(class(2, "4Gi", c.request, c.limit, ""))
			if err != nil {
				t.Fatal(err)
			}
			if got := s.Requests.Cpu().String(); got != c.wantRequest {
				t.Errorf("request %s", got)
			}
			if got := s.Limits.Cpu().String(); got != c.wantLimit {
				t.Errorf("limit %s", got)
			}
			if s.Requests.Memory().String() != "4Gi" || s.Limits.Memory().String() != "4Gi" {
				t.Errorf("memory %s of %s", s.Requests.Memory(), s.Limits.Memory())
			}
		})
	}
}

func TestConfigSpec(t *testing.T) {
	s, err := Read(class(0, "0", "", "", `{"_typeName":"VirtualMachineConfigSpec","numCPUs":4,"memoryMB":2048,"numCoresPerSocket":2,"firmware":"EFI",
		"nestedHVEnabled":true,"cpuHotAddEnabled":false,"latencySensitivity":{"level":"high"},
		"extraConfig":[{"key":"sched.mem.lpage.enable1GPage","value":"TRUE"},{"key":"other","value":1},{"key":"atoll.dev/cpu-model","value":"host"}],
		"deviceChange":[{"device":{"_typeName":"VirtualTPM"}},{"device":{"_typeName":"VirtualUSB"}}]}`))
	if err != nil {
		t.Fatal(err)
	}
	if s.CPUs != 4 || s.MaxCPUs != 4 || s.Memory != 2<<30 || s.MaxMemory != 2<<30 || s.CoresPerSocket != 2 || s.Firmware != "efi" ||
		!s.Nested || !s.Pinned || !s.TPM || s.HugePageBytes != 1<<30 || s.CPUModel != "host" {
		t.Errorf("%+v", s)
	}
	if got := strings.Join(s.Unused, " "); got != "spec.configSpec.extraConfig[other] spec.configSpec.deviceChange[VirtualUSB]" {
		t.Errorf("without effect: %s", got)
	}
}

func TestFieldsWithoutEffect(t *testing.T) {
	c := class(1, "1Gi", "", "", "")
	c.ControllerName, c.ReservedProfileID, c.ReservedSlots, c.Policies.Resources.Limits.Memory = "other", "gold", 2, resource.MustParse("2Gi")
	s, err := Read(c)
	if want := "spec.controllerName spec.reservedProfileID spec.reservedSlots spec.policies.resources.limits.memory"; err != nil || strings.Join(s.Unused, " ") != want {
		t.Errorf("%q, %v", s.Unused, err)
	}
}

func TestTooLittle(t *testing.T) {
	for memory, want := range map[int64]bool{192 << 20: true, 256 << 20: false} {
		if got := TooLittle(Size{Memory: memory}, true); (got != "") != want {
			t.Errorf("%d: %q", memory, got)
		}
		if got := TooLittle(Size{Memory: memory}, false); got != "" {
			t.Errorf("with a BIOS: %q", got)
		}
	}
}

func TestInvalid(t *testing.T) {
	for _, c := range []*vmopv1.VirtualMachineClassSpec{
		class(0, "1Gi", "", "", ""), class(1, "1Mi", "", "", ""), class(1, "1Gi", "", "", "{"), class(5000, "1Gi", "", "", ""),
		class(1, "1Gi", "", "", `{"extraConfig":[{"key":"atoll.dev/cpu-model","value":"host,foo=on"}]}`),
		class(1, "1Gi", "", "", `{"extraConfig":[{"key":"atoll.dev/cpu-model"}]}`),
	} {
		if _, err := Read(c); !errors.Is(err, ErrInvalid) {
			t.Errorf("%+v: %v", c.Hardware, err)
		}
	}
}

// TestNestedModel: a model that has no nested virtualisation is refused when it is asked for.
func TestNestedModel(t *testing.T) {
	for _, c := range []struct {
		model  string
		nested bool
		ok     bool
	}{
		{"Haswell-v4", true, false},
		{"Westmere-v2", true, false},
		{"qemu64", true, false},
		{"hostile", true, false},
		{"Haswell-v4", false, true},
		{"host", true, true},
		{"max", true, true},
		{"EPYC-v2", true, false},
	} {
		_, err := Read(class(1, "1Gi", "", "", fmt.Sprintf(`{"nestedHVEnabled":%v,"extraConfig":[{"key":"atoll.dev/cpu-model","value":%q}]}`, c.nested, c.model)))
		if (err == nil) != c.ok {
			t.Errorf("%+v: %v", c, err)
		}
		if err != nil && (!errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), "nestedHVEnabled") || !strings.Contains(err.Error(), "extraConfig[atoll.dev/cpu-model]") || !strings.Contains(err.Error(), "name host or no model")) {
			t.Errorf("%+v: %v", c, err)
		}
	}
}

func FuzzRead(f *testing.F) {
	f.Add([]byte(`{"numCPUs":-1,"memoryMB":9223372036854775807}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		s, err := Read(class(0, "0", "", "", string(data)))
		if err == nil && (s.CPUs < 1 || s.Memory < minMemory || s.MaxCPUs < s.CPUs || s.MaxMemory < s.Memory) {
			t.Fatalf("%+v", s)
		}
	})
}
