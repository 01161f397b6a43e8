package start

import (
	"encoding/json"
	"fmt"

	"github.com/containerd/containerd/api/types"
	"github.com/opencontainers/runtime-spec/specs-go/features"
	"google.golang.org/protobuf/types/known/anypb"
)

// featuresURL is the type URL by which containerd decodes the features.
const featuresURL = "types.containerd.io/opencontainers/runtime-spec/1/features/Features"

// printInfo says what the runtime can do. containerd and, through it, the kubelet go by it: recursive
// read-only mounts yes, user namespaces no.
func (r *request) printInfo() error {
	enabled := true
	value, err := json.Marshal(&features.Features{
		OCIVersionMin: "1.0.0", OCIVersionMax: "1.3.0",
		MountOptions: []string{
			"bind", "rbind", "ro", "rw", "rro", "rrw", "nosuid", "nodev", "noexec", "noatime", "relatime",
			"strictatime", "private", "rprivate", "slave", "rslave", "shared", "rshared",
		},
		Linux: &features.Linux{
			Namespaces: []string{"cgroup", "ipc", "mount", "network", "pid", "uts"},
			Cgroup:     &features.Cgroup{V2: &enabled},
			Seccomp:    &features.Seccomp{Enabled: &enabled},
		},
	})
	if err != nil {
		return fmt.Errorf("encoding features: %w", err)
	}
	return r.print(&types.RuntimeInfo{
		Name:     RuntimeName,
		Version:  &types.RuntimeVersion{Version: "1"},
		Features: &anypb.Any{TypeUrl: featuresURL, Value: value},
	})
}
