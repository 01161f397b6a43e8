package flatspec

import (
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// specification is one with every field that is carried.
func specification() *specs.Spec {
	n, u, u32, no, score := int64(-7), uint64(1)<<63, uint32(0o22), true, -998
	mode := os.FileMode(0o660)
	return &specs.Spec{
		Root: &specs.Root{Readonly: true},
		Process: &specs.Process{
			Terminal: true, ConsoleSize: &specs.Box{Height: 24, Width: 80}, NoNewPrivileges: true, OOMScoreAdj: &score,
			User: specs.User{UID: 1, GID: 4294967295, Umask: &u32, AdditionalGids: []uint32{3, 4}},
			Args: []string{"sh", "-c", ""}, Env: []string{"A=ä"}, Cwd: "/x",
			Capabilities: &specs.LinuxCapabilities{
				Bounding: []string{"CAP_CHOWN"}, Effective: []string{"CAP_KILL"}, Inheritable: []string{"CAP_BPF"},
				Permitted: []string{"CAP_FOWNER"}, Ambient: []string{"CAP_SETUID", "CAP_SETGID"},
			},
			Rlimits: []specs.POSIXRlimit{{Type: "RLIMIT_CORE", Hard: u, Soft: 1}},
		},
		Mounts: []specs.Mount{{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "ro"}}, {Destination: "/e"}},
		Linux: &specs.Linux{
			Sysctl: map[string]string{"a": "1", "b": ""}, MaskedPaths: []string{"/m"}, ReadonlyPaths: []string{"/r", "/s"},
			Namespaces: []specs.LinuxNamespace{{Type: specs.PIDNamespace, Path: "/proc/1/ns/pid"}, {Type: specs.MountNamespace}},
			Devices:    []specs.LinuxDevice{{Path: "/dev/x", Type: "c", Major: 1, Minor: -1, FileMode: &mode, UID: &u32, GID: &u32}},
			Resources: &specs.LinuxResources{
				Devices: []specs.LinuxDeviceCgroup{{Allow: true, Type: "c", Major: &n, Minor: &n, Access: "rwm"}, {}},
				Memory:  &specs.LinuxMemory{Limit: &n, Reservation: &n, Swap: &n, CheckBeforeUpdate: &no},
				CPU:     &specs.LinuxCPU{Shares: &u, Quota: &n, Burst: &u, Period: &u, Cpus: "0-1", Mems: "0", Idle: &n},
				Pids:    &specs.LinuxPids{Limit: &n}, Unified: map[string]string{"memory.oom.group": "1"},
			},
		},
	}
}

func TestRoundTrip(t *testing.T) {
	want := specification()
	got, err := ReadSpec(Spec(want))
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%v, got %+v", err, got)
	}
	if got, err := ReadSpec(Spec(&specs.Spec{})); err != nil || !reflect.DeepEqual(got, &specs.Spec{}) {
		t.Errorf("empty: %v, got %+v", err, got)
	}
	if got, err := ReadProcess(Process(want.Process)); err != nil || !reflect.DeepEqual(got, want.Process) {
		t.Errorf("process: %v, got %+v", err, got)
	}
	if got, err := ReadResources(Resources(want.Linux.Resources)); err != nil || !reflect.DeepEqual(got, want.Linux.Resources) {
		t.Errorf("resources: %v, got %+v", err, got)
	}
}

// TestOrdinary: nothing is lost of what the shim leaves in real specs.
func TestOrdinary(t *testing.T) {
	files, err := filepath.Glob("../../shim/spec/testdata/*.golden.json")
	if err != nil || len(files) < 3 {
		t.Fatalf("%v, %v", files, err)
	}
	for _, name := range files {
		data, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		want := &specs.Spec{}
		if err := json.Unmarshal(data, want); err != nil {
			t.Fatal(err)
		}
		got, err := ReadSpec(Spec(want))
		if err != nil {
			t.Fatal(err)
		}
		// What the guest does not ask for.
		want.Version, want.Hostname, want.Annotations, want.Hooks = "", "", nil, nil
		if want.Root != nil {
			want.Root.Path = ""
		}
		if l := want.Linux; l != nil {
			l.CgroupsPath, l.Seccomp, l.RootfsPropagation = "", nil, ""
		}
		if !reflect.DeepEqual(got, want) {
			a, _ := json.Marshal(got)
			b, _ := json.Marshal(want)
			t.Errorf("%s: got\n%s\nwant\n%s", name, a, b)
		}
	}
}

func TestInvalid(t *testing.T) {
	good := Spec(specification())
	for i := range good {
		if _, err := ReadSpec(good[:i]); err == nil {
			t.Errorf("read the first %d of %d bytes", i, len(good))
		}
	}
	if _, err := ReadSpec(append(good, 0)); err == nil {
		t.Error("read more than there is")
	}
}

func FuzzReadSpec(f *testing.F) {
	f.Add(Spec(specification()))
	f.Add(Spec(&specs.Spec{}))
	f.Fuzz(func(t *testing.T, data []byte) {
		s, err := ReadSpec(data)
		if err != nil {
			return
		}
		again, err := ReadSpec(Spec(s))
		if err != nil || !reflect.DeepEqual(again, s) {
			t.Errorf("%v: %+v became %+v", err, s, again)
		}
	})
}
