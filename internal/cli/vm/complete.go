package vm

import (
	"slices"

	"github.com/spf13/cobra"
	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
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
		s = nil
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
			out = c.propose(cmd, machines)
			out = slices.DeleteFunc(out, func(name string) bool { return slices.Contains(args, name) })
		case len(args) <= len(next):
			out = c.propose(cmd, next[len(args)-1])
		}
		return out, cobra.ShellCompDirectiveNoFileComp
	}
}

// proposals lists names of objects; a list that fails proposes nothing.
func proposals(s *session, cmd *cobra.Command, list client.ObjectList, names func() []string, options ...client.ListOption) []string {
	if s == nil || s.List(cmd.Context(), list, options...) != nil {
		return nil
	}
	return names()
}

func machines(s *session, cmd *cobra.Command) []string {
	list := &vmopv1.VirtualMachineList{}
	return proposals(s, cmd, list, func() (out []string) {
		for _, o := range list.Items {
			out = append(out, o.Name)
		}
		return out
	}, s.here())
}

func snapshots(s *session, cmd *cobra.Command) []string {
	list := &vmopv1.VirtualMachineSnapshotList{}
	return proposals(s, cmd, list, func() (out []string) {
		for _, o := range list.Items {
			out = append(out, o.Name)
		}
		return out
	}, s.here())
}

func classes(s *session, cmd *cobra.Command) []string {
	list := &vmopv1.VirtualMachineClassList{}
	return proposals(s, cmd, list, func() (out []string) {
		for _, o := range list.Items {
			out = append(out, o.Name)
		}
		return out
	}, s.here())
}

func storageClasses(s *session, cmd *cobra.Command) []string {
	list := &storagev1.StorageClassList{}
	return proposals(s, cmd, list, func() (out []string) {
		for _, o := range list.Items {
			out = append(out, o.Name)
		}
		return out
	})
}

func claims(s *session, cmd *cobra.Command) []string {
	list := &corev1.PersistentVolumeClaimList{}
	return proposals(s, cmd, list, func() (out []string) {
		for _, o := range list.Items {
			out = append(out, o.Name)
		}
		return out
	}, s.here())
}

func imageNames(s *session, cmd *cobra.Command) []string {
	if s == nil {
		return nil
	}
	list, _ := s.images(cmd.Context()) // nothing to propose is no error
	var out []string
	for _, i := range list {
		out = append(out, i.display)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// here limits a list to the namespace.
func (s *session) here() client.ListOption {
	if s == nil {
		return client.InNamespace("")
	}
	return client.InNamespace(s.namespace)
}
