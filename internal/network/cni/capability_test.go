package cni

import (
	"fmt"
	"strings"
	"testing"

	"atoll.dev/atoll/internal/network/cniconf"
)

func TestHostPorts(t *testing.T) {
	for _, tc := range []struct {
		in   cniconf.PortMapping
		want string // the ports, or part of the error
	}{
		{cniconf.PortMapping{HostPort: 80, ContainerPort: 8080}, "[{tcp invalid IP 80 8080}]"},
		{cniconf.PortMapping{HostPort: 80, ContainerPort: 8080, Protocol: "UDP", HostIP: "192.0.2.1"}, "[{udp 192.0.2.1 80 8080}]"},
		{cniconf.PortMapping{HostPort: 80, ContainerPort: 8080, Protocol: "sctp", HostIP: "0.0.0.0"}, "[{sctp invalid IP 80 8080}]"},
		{cniconf.PortMapping{HostPort: 80, ContainerPort: 8080, HostIP: "::"}, "[{tcp invalid IP 80 8080}]"},
		{cniconf.PortMapping{HostPort: 80, ContainerPort: 8080, HostIP: "::ffff:192.0.2.1"}, "[{tcp 192.0.2.1 80 8080}]"},
		{cniconf.PortMapping{ContainerPort: 8080}, "[]"},
		{cniconf.PortMapping{HostPort: 80}, "between 1 and 65535"},
		{cniconf.PortMapping{HostPort: -1, ContainerPort: 1}, "between 1 and 65535"},
		{cniconf.PortMapping{HostPort: 65536, ContainerPort: 1}, "between 1 and 65535"},
		{cniconf.PortMapping{HostPort: 80, ContainerPort: 1, Protocol: "icmp"}, `protocol "icmp"`},
		{cniconf.PortMapping{HostPort: 80, ContainerPort: 1, HostIP: "fd00::1"}, "IPv6 is not supported"},
		{cniconf.PortMapping{HostPort: 80, ContainerPort: 1, HostIP: "localhost"}, "host address"},
	} {
		got, err := hostPorts([]cniconf.PortMapping{tc.in})
		s := fmt.Sprint(got)
		if err != nil {
			s = err.Error()
		}
		if !strings.Contains(s, tc.want) {
			t.Errorf("%+v: %s, want %s", tc.in, s, tc.want)
		}
	}
}

func TestPodName(t *testing.T) {
	for args, want := range map[string]string{
		"": "", "IgnoreUnknown=1;K8S_POD_NAMESPACE=ns;K8S_POD_NAME=p": "ns/p", "K8S_POD_NAME=p": "", ";;=": "",
	} {
		if got := podName(args); got != want {
			t.Errorf("%q: %q, want %q", args, got, want)
		}
	}
}
