//go:build e2e

package e2e

import (
	"bytes"
	"errors"
	"slices"
	"strings"
	"sync"

	"github.com/spf13/cobra"
	"k8s.io/cli-runtime/pkg/genericclioptions"
	"k8s.io/cli-runtime/pkg/genericiooptions"
	kubectlget "k8s.io/kubectl/pkg/cmd/get"
	cmdutil "k8s.io/kubectl/pkg/cmd/util"
)

// failed is what kubectl ends the process with.
type failed struct{ message string }

// catchFailures has kubectl's commands panic with failed in this process, and not end it.
var catchFailures = sync.OnceFunc(func() {
	cmdutil.BehaviorOnFatal(func(message string, _ int) { panic(failed{message}) })
})

// isLook tells whether arguments are those of a kubectl get that ends by itself.
func isLook(args []string) bool {
	if len(args) > 2 && args[0] == "-n" {
		args = args[2:]
	}
	return len(args) > 0 && args[0] == "get" && !slices.ContainsFunc(args, func(a string) bool {
		return a == "-w" || strings.HasPrefix(a, "--watch") || strings.HasPrefix(a, "--kubeconfig") || strings.HasPrefix(a, "--as") || strings.HasPrefix(a, "--raw")
	})
}

// look is kubectl get in this process, which takes a tenth of a second of a processor less than the program. Most of what
// tests do is looking whether something has happened, beside the emulated machines that they wait for.
func look(args []string) (out string, err error) {
	catchFailures()
	var printed bytes.Buffer
	streams := genericiooptions.IOStreams{In: strings.NewReader(""), Out: &printed, ErrOut: &printed}
	flags := genericclioptions.NewConfigFlags(true)
	*flags.KubeConfig = suite.dataDir + "/admin.kubeconfig"
	*flags.Timeout = patience.String()
	root := &cobra.Command{Use: "kubectl", SilenceUsage: true}
	root.SetOut(&printed)
	root.SetErr(&printed)
	flags.AddFlags(root.PersistentFlags())
	root.AddCommand(kubectlget.NewCmdGet("kubectl", cmdutil.NewFactory(cmdutil.NewMatchVersionFlags(flags)), streams))
	root.SetArgs(args)
	defer func() {
		switch r := recover().(type) {
		case nil:
		case failed:
			printed.WriteString(r.message)
			err = errors.New("exit status 1")
		default:
			panic(r)
		}
		out = printed.String()
	}()
	return "", root.Execute()
}
