package cripb

import (
	"testing"

	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestWireCompatible decodes what the real CRI type encodes.
func TestWireCompatible(t *testing.T) {
	upstream := &cri.PodSandboxConfig{
		Metadata:     &cri.PodSandboxMetadata{Name: "n", Uid: "u", Namespace: "ns", Attempt: 3},
		Hostname:     "host",
		LogDirectory: "/var/log/pods/x",
		DnsConfig:    &cri.DNSConfig{Servers: []string{"10.96.0.10"}, Searches: []string{"a.b"}, Options: []string{"ndots:5"}},
		PortMappings: []*cri.PortMapping{{HostPort: 80, ContainerPort: 81}},
		Labels:       map[string]string{"l": "v"},
		Annotations:  map[string]string{"a": "b"},
		Linux: &cri.LinuxPodSandboxConfig{
			CgroupParent: "/kubepods/podx",
			SecurityContext: &cri.LinuxSandboxSecurityContext{
				NamespaceOptions: &cri.NamespaceOption{
					Network: cri.NamespaceMode_POD, Pid: cri.NamespaceMode_CONTAINER, Ipc: cri.NamespaceMode_NODE,
					UsernsOptions: &cri.UserNamespace{Mode: cri.NamespaceMode_NODE},
				},
				Privileged:         true,
				SupplementalGroups: []int64{1, 2},
				Seccomp:            &cri.SecurityProfile{ProfileType: cri.SecurityProfile_RuntimeDefault},
			},
			Sysctls:   map[string]string{"net.core.somaxconn": "7"},
			Overhead:  &cri.LinuxContainerResources{MemoryLimitInBytes: 5},
			Resources: &cri.LinuxContainerResources{CpuPeriod: 1, CpuQuota: 2, CpuShares: 3, MemoryLimitInBytes: 4},
		},
	}
	b, err := proto.Marshal(upstream)
	if err != nil {
		t.Fatal(err)
	}
	var got PodSandboxConfig
	if err := proto.Unmarshal(b, &got); err != nil {
		t.Fatal(err)
	}
	l := got.GetLinux()
	ns := l.GetSecurityContext().GetNamespaceOptions()
	checks := []struct {
		name      string
		got, want any
	}{
		{"name", got.GetMetadata().GetName(), "n"},
		{"uid", got.GetMetadata().GetUid(), "u"},
		{"namespace", got.GetMetadata().GetNamespace(), "ns"},
		{"attempt", got.GetMetadata().GetAttempt(), uint32(3)},
		{"hostname", got.GetHostname(), "host"},
		{"logs", got.GetLogDirectory(), "/var/log/pods/x"},
		{"server", got.GetDnsConfig().GetServers()[0], "10.96.0.10"},
		{"search", got.GetDnsConfig().GetSearches()[0], "a.b"},
		{"option", got.GetDnsConfig().GetOptions()[0], "ndots:5"},
		{"annotation", got.GetAnnotations()["a"], "b"},
		{"cgroup", l.GetCgroupParent(), "/kubepods/podx"},
		{"pid", ns.GetPid(), NamespaceMode_CONTAINER},
		{"ipc", ns.GetIpc(), NamespaceMode_NODE},
		{"userns", ns.GetUsernsOptions().GetMode(), NamespaceMode_NODE},
		{"privileged", l.GetSecurityContext().GetPrivileged(), true},
		{"sysctl", l.GetSysctls()["net.core.somaxconn"], "7"},
		{"overhead", l.GetOverhead().GetMemoryLimitInBytes(), int64(5)},
		{"period", l.GetResources().GetCpuPeriod(), int64(1)},
		{"quota", l.GetResources().GetCpuQuota(), int64(2)},
		{"shares", l.GetResources().GetCpuShares(), int64(3)},
		{"memory", l.GetResources().GetMemoryLimitInBytes(), int64(4)},
	}
	for _, c := range checks {
		if c.got != c.want {
			t.Errorf("%s: got %v, want %v", c.name, c.got, c.want)
		}
	}
}
