package cli

import (
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"
	kubeversion "k8s.io/component-base/version"

	"atoll.dev/atoll/internal/cli/command"
)

// versions is the output of `atoll version`.
type versions struct {
	Atoll      string `json:"atoll"`
	Kubernetes string `json:"kubernetes"`
	Etcd       string `json:"etcd"`
	Containerd string `json:"containerd"`
	CoreDNS    string `json:"coredns"`
	Go         string `json:"go"`
	Platform   string `json:"platform"`
}

func (a *app) versionCommand() *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use:   "version",
		Short: "Print the versions of Atoll and of what is built in",
		Example: `  atoll version
  atoll version -o json`,
		Args: command.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			v := a.versions()
			if output != "table" {
				return a.Structured(output, v)
			}
			a.Table([][]string{
				{"atoll", v.Atoll},
				{"kubernetes", v.Kubernetes},
				{"etcd", v.Etcd},
				{"containerd", v.Containerd},
				{"coredns", v.CoreDNS},
				{"go", v.Go + " " + v.Platform},
			})
			return nil
		},
	}
	command.OutputFlag(cmd, &output, "table", "json", "yaml")
	return cmd
}

func (a *app) versions() versions {
	v := versions{
		Atoll: a.version, Kubernetes: kubeversion.Get().GitVersion,
		Go: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH,
	}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return v
	}
	for _, m := range info.Deps {
		switch m.Path {
		case "go.etcd.io/etcd/server/v3":
			v.Etcd = m.Version
		case "github.com/containerd/containerd/v2":
			v.Containerd = m.Version
		case "github.com/coredns/coredns":
			v.CoreDNS = m.Version
		}
	}
	return v
}
