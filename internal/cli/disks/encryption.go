package disks

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"k8s.io/apimachinery/pkg/util/wait"

	"atoll.dev/atoll/internal/cli/command"
	"atoll.dev/atoll/internal/cli/encryption"
	"atoll.dev/atoll/internal/cli/storage"
	"atoll.dev/atoll/internal/cli/text"
	"atoll.dev/atoll/internal/storage/rotation"
	"atoll.dev/atoll/internal/storage/stores"
)

func (a *app) encryptionCommand() *cobra.Command {
	return command.Group("encryption", "Look at and change the keys that encrypt volumes", `  atoll encryption ls
  atoll encryption rotate team/gold`,
		a.encryptionListCommand(), a.encryptionRotateCommand())
}

func (a *app) encryptionClient() (*encryption.Client, error) {
	t, err := a.Tree()
	if err != nil {
		return nil, err
	}
	return encryption.NewClient(cmp.Or(os.Getenv("KUBECONFIG"), t.AdminKubeconfig()))
}

func (a *app) encryptionListCommand() *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use:     "ls",
		Aliases: []string{"list"},
		Short:   "List EncryptionClasses, their keys and how many volumes have them",
		Example: `  atoll encryption ls
  atoll encryption ls -o yaml`,
		Args: command.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := a.encryptionClient()
			if err != nil {
				return err
			}
			list, err := client.List(cmd.Context())
			if err != nil {
				return err
			}
			if output != "table" {
				return a.Structured(output, list)
			}
			rows, problems := [][]string{{"CLASS", "PROVIDER", "KEY", "READY", "VOLUMES", "CURRENT", "AGE"}}, []string{}
			for _, c := range list {
				state := "Unknown"
				for _, condition := range c.Status.Conditions {
					if condition.Type == "Ready" {
						state = string(condition.Status)
					}
					if condition.Status == "False" || condition.Reason == "NotAllSeen" {
						problems = append(problems, c.Namespace+"/"+c.Name+": "+condition.Message)
					}
				}
				rows = append(rows, []string{
					c.Namespace + "/" + c.Name, cmp.Or(c.Spec.KeyProvider, "-"), cmp.Or(cmp.Or(c.Spec.KeyID, c.Status.KeyID), "-"), state,
					strconv.Itoa(int(c.Status.Volumes)), strconv.Itoa(int(c.Status.Current)), text.Age(c.CreationTimestamp.Time),
				})
			}
			a.Table(rows)
			for _, p := range problems {
				a.Printf("%s\n", p)
			}
			return nil
		},
	}
	command.OutputFlag(cmd, &output, "table", "json", "yaml")
	return cmd
}

func (a *app) encryptionRotateCommand() *cobra.Command {
	var id string
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "rotate <namespace/class | provider>",
		Short: "Use another key-encryption key, and wrap the keys of all volumes with it",
		Long: `Makes a new key in the Secret of the class's provider, or takes the one that --key-id names, makes it the class's, and
waits until the keys of all volumes and snapshots are wrapped with it. Volumes may be in use; the data are not
written again. The old key stays in the Secret, and is needed until all are done. A rotation that is cut off goes on
by itself. A provider is named where a StorageClass names it without an EncryptionClass.`,
		Example: `  atoll encryption rotate team/gold
  atoll encryption rotate team/gold --key-id 2027-01
  atoll encryption rotate default`,
		Args:              command.ExactArgs("namespace/class | provider"),
		ValidArgsFunction: a.completeClasses,
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := a.encryptionClient()
			if err != nil {
				return err
			}
			key, err := client.Rotate(cmd.Context(), args[0], id)
			if err != nil {
				return err
			}
			how := "taken"
			if key.Made {
				how = "made"
			}
			a.Printf("key %q of provider %q was %s\n", key.ID, key.Provider, how)
			ctx, cancel := context.WithTimeout(cmd.Context(), timeout)
			defer cancel()
			done, erase := a.progress(args[0], "volumes")
			of, said := args[0], ""
			stuck := func(why string) {
				if why != said {
					erase()
					fmt.Fprintln(a.ErrOut, "waiting: "+why)
				}
				said = why
			}
			if strings.Contains(args[0], "/") {
				err = client.Wait(ctx, args[0], key, done, stuck)
			} else {
				err = a.waitForProvider(ctx, key, done, stuck)
				of += " on this host"
			}
			erase()
			if err == nil {
				a.Printf("the keys of all volumes and snapshots of %s are wrapped with it; keep a copy of it outside of the cluster\n", of)
			}
			return err
		},
	}
	cmd.Flags().StringVar(&id, "key-id", "", "name of the key, new or not (default: a new one named after the time)")
	cmd.Flags().DurationVar(&timeout, "timeout", 10*time.Minute, "how long to wait for the volumes")
	return cmd
}

// progress shows how far something is, on a terminal, until it is cleared.
func (a *app) progress(name, what string) (told func(done, total int), erase func()) {
	if !text.IsTerminal(a.ErrOut) {
		return func(int, int) {}, func() {}
	}
	return func(done, total int) { fmt.Fprintf(a.ErrOut, "\r%s: %d of %d %s", name, done, total, what) },
		func() { fmt.Fprint(a.ErrOut, "\r\033[K") }
}

// waitForProvider waits for the volumes of this host whose StorageClass names the provider.
func (a *app) waitForProvider(ctx context.Context, key encryption.Key, told func(done, total int), stuck func(why string)) error {
	return a.withStores(ctx, nil, func(list []storage.Store) error {
		var open []stores.Store
		for _, s := range list {
			open = append(open, stores.Store{Name: s.Name, Backend: s.Backend})
		}
		done, total := 0, 0
		var unseen error
		err := wait.PollUntilContextCancel(ctx, time.Second, true, func(ctx context.Context) (bool, error) {
			var items []rotation.Item
			items, unseen = rotation.Items(ctx, open)
			done, total = 0, 0
			for _, i := range items {
				if i.Class != key.Provider {
					continue
				}
				total++
				if len(i.KEKs) == 1 && i.KEKs[0].ID == key.ID && i.KEKs[0].Provider == key.Provider {
					done++
				}
			}
			told(done, total)
			if unseen != nil && ctx.Err() == nil {
				stuck("not all volumes can be looked at; keep all older keys: " + unseen.Error())
			}
			return done == total && unseen == nil, nil
		})
		if err != nil && ctx.Err() != nil && unseen != nil {
			return fmt.Errorf("not all volumes can be looked at, keep all older keys; of the others %d of %d are done: %w", done, total, unseen)
		}
		if err != nil && ctx.Err() != nil {
			return fmt.Errorf("%d of %d volumes and snapshots of this host are done; the agent goes on if the old key is still there (`atoll logs agent`)", done, total)
		}
		return err
	})
}

// completeClasses proposes the names of classes.
func (a *app) completeClasses(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	var names []string
	if client, err := a.encryptionClient(); err == nil && len(args) == 0 {
		list, _ := client.List(cmd.Context()) // nothing to propose is no error
		for _, c := range list {
			names = append(names, c.Namespace+"/"+c.Name)
		}
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

func (a *app) volumeRotateCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "rotate-key <volume>...",
		Short: "Give encrypted volumes of this host new keys of their own",
		Long: `Makes a new key for each volume and removes the old one from the LUKS headers of its images. The volume must not be
in use. The data are not encrypted again, so that a copy of an old header with the old key still opens them. Images
that snapshots or copies share keep their key. To change the key that wraps those keys, see "atoll encryption rotate".`,
		Example: `  atoll volume rotate-key default/pvc-3c3c5c26-5406-4ec3-9cf5-2d4e89931a3c`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return command.UsageError{Err: fmt.Errorf("%q wants at least one volume; `atoll volume ls -o wide` lists them", cmd.CommandPath())}
			}
			for _, arg := range args {
				if _, _, err := stores.Split(arg); err != nil {
					return command.UsageError{Err: fmt.Errorf("volume %q: write datastore/name as `atoll volume ls` does", arg)}
				}
			}
			return nil
		},
		ValidArgsFunction: a.completeVolumes,
		RunE: func(cmd *cobra.Command, args []string) error {
			var names []string
			for _, arg := range args {
				name, _, _ := stores.Split(arg)
				names = append(names, name)
			}
			return a.withStores(cmd.Context(), names, func(list []storage.Store) error { return a.rotateVolumes(cmd.Context(), list, args) })
		},
	}
	return cmd
}

func (a *app) rotateVolumes(ctx context.Context, list []storage.Store, handles []string) error {
	told, erase := a.progress("new keys", "volumes")
	defer erase()
	for n, handle := range handles {
		told(n, len(handles))
		name, id, _ := stores.Split(handle)
		i := slices.IndexFunc(list, func(s storage.Store) bool { return s.Name == name })
		kept, err := list[i].Rekey(ctx, id)
		if err != nil {
			return fmt.Errorf("volume %s: %w", handle, err)
		}
		erase()
		a.Printf("volume %s has a new key\n", handle)
		if kept > 0 {
			a.Printf("  %d of its images keep the old one, since snapshots or copies share them\n", kept)
		}
	}
	return nil
}

// completeVolumes proposes the volumes of this host, to root.
func (a *app) completeVolumes(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	var names []string
	_ = a.withStores(cmd.Context(), nil, func(list []storage.Store) error {
		all, err := volumeEntries(cmd.Context(), list)
		for _, v := range all {
			if !slices.Contains(args, v.Volume) {
				names = append(names, v.Volume)
			}
		}
		return err
	})
	return names, cobra.ShellCompDirectiveNoFileComp
}
