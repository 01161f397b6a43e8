package disks

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	api "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/internal/cli/command"
	"atoll.dev/atoll/internal/cli/storage"
	"atoll.dev/atoll/internal/cli/text"
)

func (a *app) datastoreCommand() *cobra.Command {
	return command.Group("datastore", "Manage the places where volumes are kept", `  atoll datastore ls
  atoll datastore create fast --path /mnt/nvme/volumes`,
		a.datastoreListCommand(), a.datastoreCreateCommand(), a.datastoreRemoveCommand())
}

// storageClient uses the kubeconfig of the environment, or the administrator's of the data directory.
func (a *app) storageClient() (*storage.Client, error) {
	t, err := a.Tree()
	if err != nil {
		return nil, err
	}
	return storage.NewClient(cmp.Or(os.Getenv("KUBECONFIG"), t.AdminKubeconfig()))
}

func (a *app) datastoreListCommand() *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use:     "ls",
		Aliases: []string{"list"},
		Short:   "List datastores, their room and their state",
		Example: `  atoll datastore ls
  atoll datastore ls -o wide`,
		Args: command.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := a.storageClient()
			if err != nil {
				return err
			}
			list, err := client.List(cmd.Context())
			if err != nil {
				return err
			}
			if output == "json" || output == "yaml" {
				return a.Structured(output, list)
			}
			a.printDatastores(list, output == "wide")
			return nil
		},
	}
	command.OutputFlag(cmd, &output, "table", "wide", "json", "yaml")
	return cmd
}

func (a *app) printDatastores(list []api.Datastore, wide bool) {
	head := []string{"NAME", "TYPE", "STATE", "CAPACITY", "FREE", "PROVISIONED", "VOLUMES"}
	if wide {
		head = append(head, "USED", "SNAPSHOTS", "HOST", "PLACE", "LABELS")
	}
	rows := [][]string{head}
	var problems []string
	for _, d := range list {
		state := datastoreState(d)
		for _, c := range d.Status.Conditions {
			if c.Status == metav1.ConditionFalse {
				problems = append(problems, d.Name+": "+c.Message)
			}
		}
		s := d.Status
		row := []string{
			d.Name, cmp.Or(s.Type, "-"), state, text.Size(s.Capacity.Value()), text.Size(s.Free.Value()), text.Size(s.Provisioned.Value()),
			strconv.Itoa(int(s.VolumeCount)),
		}
		if wide {
			host, place := "-", "-"
			if dir := d.Spec.Directory; dir != nil {
				host, place = cmp.Or(dir.Node, "all"), dir.Path
			} else if rbd := d.Spec.RBD; rbd != nil {
				host, place = "all", "pool "+rbd.Pool
			}
			row = append(row, text.Size(s.Used.Value()), strconv.Itoa(int(s.SnapshotCount)), host, place, cmp.Or(labelText(d.Labels), "-"))
		}
		rows = append(rows, row)
	}
	a.Table(rows)
	for _, p := range problems {
		a.Printf("%s\n", p)
	}
}

// datastoreState is one word about a datastore: the worst of its conditions.
func datastoreState(d api.Datastore) string {
	state := "Unknown"
	for _, c := range d.Status.Conditions {
		switch {
		case c.Type == api.DatastoreReady && c.Status != metav1.ConditionTrue:
			return c.Reason
		case c.Type == api.DatastoreReady && state == "Unknown":
			state = "Ready"
		case c.Type == api.DatastoreSpace && c.Status == metav1.ConditionFalse:
			state = c.Reason
		}
	}
	return state
}

func labelText(labels map[string]string) string {
	var out []string
	for k, v := range labels {
		out = append(out, k+"="+v)
	}
	slices.Sort(out)
	return strings.Join(out, ",")
}

func (a *app) datastoreCreateCommand() *cobra.Command {
	var path, node string
	var shared bool
	var warn, refuse, overcommit int32
	var labels []string
	var rbd api.RBDDatastore
	cmd := &cobra.Command{
		Use:   "create <name>",
		Short: "Make a datastore of a directory or of a Ceph pool",
		Long: `Makes a datastore of a directory or of a Ceph pool. The directory is made if it is missing (its parent must exist), and
must be empty or have been a datastore before. It should be on a file system that nothing else fills.`,
		Example: `  atoll datastore create fast --path /mnt/nvme/volumes --label tier=gold
  atoll datastore create nas --path /mnt/nas/volumes --shared
  atoll datastore create ceph --pool atoll --user atoll`,
		Args: command.ExactArgs("name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if (path == "") == (rbd.Pool == "") || path != "" && !filepath.IsAbs(path) {
				return command.UsageError{Err: errors.New("give either --path, the absolute path of a directory, or --pool")}
			}
			if warn > refuse {
				return command.UsageError{Err: fmt.Errorf("--warn %d%% is beyond --refuse %d%%", warn, refuse)}
			}
			client, err := a.storageClient()
			if err != nil {
				return err
			}
			d := &api.Datastore{ObjectMeta: metav1.ObjectMeta{Name: args[0], Labels: map[string]string{}}}
			for _, l := range labels {
				k, v, ok := strings.Cut(l, "=")
				if !ok {
					return command.UsageError{Err: fmt.Errorf("--label %q: write name=value", l)}
				}
				d.Labels[k] = v
			}
			d.Spec = api.DatastoreSpec{WarnPercent: warn, RefusePercent: refuse, OvercommitPercent: overcommit}
			if rbd.Pool != "" {
				d.Spec.RBD = &rbd
			} else {
				if node == "" && !shared {
					if node, err = a.nodeName(); err != nil {
						return err
					}
				}
				d.Spec.Directory = &api.DirectoryDatastore{Path: filepath.Clean(path), Node: node, Shared: shared}
			}
			if err := client.Create(cmd.Context(), d); err != nil {
				return err
			}
			a.Printf("datastore %s is ready\n", args[0])
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&path, "path", "", "absolute path of the directory")
	f.StringVar(&rbd.Pool, "pool", "", "Ceph pool, instead of a directory")
	f.StringVar(&rbd.Namespace, "namespace", "", "RBD namespace in the pool")
	f.StringVar(&rbd.User, "user", "", "Ceph user without \"client.\"")
	f.StringVar(&rbd.ConfigFile, "ceph-conf", "", "ceph.conf on the hosts (default: Ceph's own)")
	f.StringVar(&node, "node", "", "host the directory is on (default: this host; with --shared, all)")
	f.BoolVar(&shared, "shared", false, "the same file system is mounted at the path on several hosts")
	f.Int32Var(&warn, "warn", 80, "fill level in percent from which on a condition warns")
	f.Int32Var(&refuse, "refuse", 95, "fill level in percent from which on nothing is created or grown")
	f.Int32Var(&overcommit, "overcommit", 0, "the most that the sizes of all volumes may add up to, in percent of the capacity (0: any)")
	f.StringSliceVar(&labels, "label", nil, "label name=value for the parameter datastoreSelector; may be repeated")
	return cmd
}

// nodeName is the name of this host's Node: that of the running supervisor, or else the host name.
func (a *app) nodeName() (string, error) {
	t, err := a.Tree()
	if err != nil {
		return "", err
	}
	if name := runningNode(t); name != "" {
		return name, nil
	}
	name, err := os.Hostname()
	if err != nil {
		return "", fmt.Errorf("finding out the name of this host: %w; give it with --node", err)
	}
	return strings.ToLower(name), nil
}

func (a *app) datastoreRemoveCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "rm <name>...",
		Aliases: []string{"remove"},
		Short:   "Give up an empty datastore; its directory stays",
		Example: `  atoll datastore rm fast`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return command.UsageError{Err: fmt.Errorf("%q wants at least one name", cmd.CommandPath())}
			}
			return nil
		},
		ValidArgsFunction: a.completeDatastores,
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := a.storageClient()
			if err != nil {
				return err
			}
			var failed error
			for _, name := range args {
				if err := client.Remove(cmd.Context(), name); err != nil {
					failed = errors.Join(failed, err)
					continue
				}
				a.Printf("datastore %s removed\n", name)
			}
			return failed
		},
	}
}

// completeDatastores proposes the names of datastores.
func (a *app) completeDatastores(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	client, err := a.storageClient()
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	list, err := client.List(cmd.Context())
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var names []string
	for _, d := range list {
		if !slices.Contains(args, d.Name) {
			names = append(names, d.Name)
		}
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}
