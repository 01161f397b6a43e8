package ns

import (
	"context"
	"slices"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"atoll.dev/atoll/internal/cli/cluster"
)

// proposer proposes words; nothing to propose is no error.
type proposer func(ctx context.Context, s client.WithWatch) []string

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
	ctx := cmd.Context()
	if ctx == nil {
		ctx = context.Background()
	}
	return propose(ctx, s)
}

// completeNames proposes namespaces for the first argument, or for all of them.
func (c *commands) completeNames(many bool) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		if len(args) > 0 && !many {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		out := slices.DeleteFunc(c.propose(cmd, namespaces), func(name string) bool { return slices.Contains(args, name) })
		return out, cobra.ShellCompDirectiveNoFileComp
	}
}

// completeLimits proposes values of the flags that limits are given by.
func (c *commands) completeLimits(cmd *cobra.Command) {
	words := func(list ...string) proposer {
		return func(context.Context, client.WithWatch) []string { return list }
	}
	for flag, propose := range map[string]proposer{
		"storage-class": named(func() client.ObjectList { return &storagev1.StorageClassList{} }),
		"host":          named(func() client.ObjectList { return &corev1.NodeList{} }), "zone": zones, "allow-from": namespaces, "allow-to": namespaces,
		"isolation": words("open", "isolated", "deny-all"), "runtime": words("microvm", "runc"),
		"restart-priority": words("lowest", "low", "medium", "high", "highest"), "count": words(countNames()...),
	} {
		c.complete(cmd, flag, propose)
	}
	for _, f := range table() {
		if _, ok := cmd.GetFlagCompletionFunc(f.name); !ok {
			c.complete(cmd, f.name, nothingToPropose)
		}
	}
}

func nothingToPropose(context.Context, client.WithWatch) []string { return nil }

func namespaces(ctx context.Context, s client.WithWatch) []string {
	list, err := all(ctx, s)
	if err != nil {
		return nil
	}
	var out []string
	for _, b := range list {
		out = append(out, b.Name)
	}
	return out
}

// named proposes the names of the objects that a list is of.
func named(list func() client.ObjectList) proposer {
	return func(ctx context.Context, s client.WithWatch) []string { return cluster.Names(ctx, s, list()) }
}

func zones(ctx context.Context, s client.WithWatch) []string {
	list := &corev1.NodeList{}
	if s.List(ctx, list) != nil {
		return nil
	}
	var out []string
	for _, n := range list.Items {
		if zone := n.Labels[corev1.LabelTopologyZone]; zone != "" {
			out = append(out, zone)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}
