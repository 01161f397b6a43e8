package vm

import (
	"slices"

	"github.com/spf13/cobra"
	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"atoll.dev/atoll/internal/cli/cluster"
)

// proposer proposes words; nothing to propose is no error.
type proposer func(s *session, cmd *cobra.Command) []string

// complete proposes values of a flag.
func (c *commands) complete(cmd *cobra.Command, flag string, propose proposer) {
	err := cmd.RegisterFlagCompletionFunc(flag, func(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
		return c.propose(cmd, propose), cobra.ShellCompDirectiveNoFileComp
	})
	if err != nil {
		panic(err) // the flag is defined above
	}
}

func (c *commands) propose(cmd *cobra.Command, propose proposer) []string {
	s, err := c.connect()
	if err != nil {
		return nil
	}
	return propose(s, cmd)
}

// completeMachines proposes virtual machines for the first argument, or for all of them, and whatever next says for
// the second.
func (c *commands) completeMachines(many bool, next ...proposer) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		var out []string
		switch {
		case many || len(args) == 0:
			out = c.propose(cmd, named(func() client.ObjectList { return &vmopv1.VirtualMachineList{} }))
			out = slices.DeleteFunc(out, func(name string) bool { return slices.Contains(args, name) })
		case len(args) <= len(next):
			out = c.propose(cmd, next[len(args)-1])
		}
		return out, cobra.ShellCompDirectiveNoFileComp
	}
}

// named proposes the names of the objects that a list is of; those of the namespace, if they are in any.
func named(list func() client.ObjectList) proposer {
	return func(s *session, cmd *cobra.Command) []string {
		return cluster.Names(cmd.Context(), s, list(), s.here())
	}
}

func classes() client.ObjectList { return &vmopv1.VirtualMachineClassList{} }

func imageNames(s *session, cmd *cobra.Command) []string {
	list, _ := s.images(cmd.Context()) // nothing to propose is no error
	var out []string
	for _, i := range list {
		out = append(out, i.display)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// here limits a list to the namespace.
func (s *session) here() client.ListOption { return client.InNamespace(s.namespace) }
