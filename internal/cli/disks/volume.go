package disks

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"atoll.dev/atoll/internal/cli/command"
	"atoll.dev/atoll/internal/cli/storage"
	"atoll.dev/atoll/internal/cli/text"
	"atoll.dev/atoll/internal/cli/up"
	"atoll.dev/atoll/internal/datadir"
	"atoll.dev/atoll/internal/storage/datastore"
	"atoll.dev/atoll/internal/storage/stores"
)

func (a *app) volumeCommand() *cobra.Command {
	return command.Group("volume", "Look at the volumes on this host's datastores", `  atoll volume ls
  atoll volume check default/pvc-3c3c5c26-5406-4ec3-9cf5-2d4e89931a3c`,
		a.volumeListCommand(), a.checkCommand("check [volume]...", "Verify the images of volumes", `  atoll volume check
  atoll volume check default/pvc-3c3c5c26-5406-4ec3-9cf5-2d4e89931a3c`), a.volumeRotateCommand())
}

func (a *app) storageCommand() *cobra.Command {
	return command.Group("storage", "Verify what is stored on this host", `  atoll storage check`,
		a.checkCommand("check", "Verify every image and chain on every datastore of this host", `  atoll storage check
  atoll storage check -o json`))
}

// withStores runs f with the datastores of this host.
func (a *app) withStores(ctx context.Context, names []string, f func([]storage.Store) error) error {
	t, err := a.Tree()
	if err != nil {
		return err
	}
	if os.Geteuid() != 0 {
		return errors.New("the volumes of this host can be read by root only; use sudo")
	}
	client, err := a.storageClient()
	if err == nil {
		_, err = client.List(ctx)
	}
	if err != nil {
		fmt.Fprintf(a.ErrOut, "The cluster does not answer; looking only below %s (%v)\n", t.Datastores(), err)
		client = nil
	}
	list, err := storage.Open(ctx, client, t.Datastores(), runningNode(t), names...)
	if err != nil {
		return err
	}
	return f(list)
}

// runningNode is the node name of the supervisor that runs on the data directory, or "".
func runningNode(t datadir.Tree) string {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	report, err := up.NewClient(t).Status(ctx)
	if err != nil {
		return ""
	}
	return report.Node.Name
}

// volumeEntry is one volume as `atoll volume ls` shows it.
type volumeEntry struct {
	Volume       string    `json:"volume"`
	Claim        string    `json:"claim,omitempty"`
	Size         int64     `json:"size"`
	Used         int64     `json:"used"`
	Provisioning string    `json:"provisioning"`
	Encryption   string    `json:"encryption,omitempty"`
	Keys         []string  `json:"keys,omitempty"`
	Layers       int       `json:"layers"`
	State        string    `json:"state"`
	HeldBy       []string  `json:"heldBy,omitempty"`
	Created      time.Time `json:"created"`
}

func (a *app) volumeListCommand() *cobra.Command {
	var output string
	var names []string
	cmd := &cobra.Command{
		Use:     "ls",
		Aliases: []string{"list"},
		Short:   "List the volumes on this host's datastores",
		Long: `Lists volumes as they are on disk. USED is what only this volume takes; what it shares with snapshots and
copies is not counted.`,
		Example: `  atoll volume ls
  atoll volume ls --datastore fast -o wide`,
		Args: command.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.withStores(cmd.Context(), names, func(list []storage.Store) error {
				all, err := volumeEntries(cmd.Context(), list)
				if err == nil && (output == "json" || output == "yaml") {
					return a.Structured(output, all)
				}
				a.printVolumes(all, output == "wide")
				return err
			})
		},
	}
	command.OutputFlag(cmd, &output, "table", "wide", "json", "yaml")
	cmd.Flags().StringSliceVarP(&names, "datastore", "d", nil, "only this datastore; may be repeated")
	if err := cmd.RegisterFlagCompletionFunc("datastore", a.completeDatastores); err != nil {
		panic(err) // the flag is defined above
	}
	return cmd
}

// volumeEntries collects the volumes of all datastores; one that fails does not hide the others.
func volumeEntries(ctx context.Context, list []storage.Store) ([]volumeEntry, error) {
	out := []volumeEntry{}
	var failed error
	for _, s := range list {
		contents, err := s.List(ctx)
		if err != nil {
			failed = errors.Join(failed, fmt.Errorf("datastore %s: %w", s.Name, err))
			continue
		}
		for _, v := range contents.Volumes {
			e := volumeEntry{
				Volume: stores.Handle(s.Name, v.ID), Claim: stores.Claim(v), Size: v.Size, Used: v.Used, Provisioning: string(v.Provisioning),
				Encryption: v.Encryption, Layers: v.Layers, State: string(v.State), Created: v.Created,
			}
			for _, k := range v.KEKs {
				e.Keys = append(e.Keys, k.Provider+"/"+cmp.Or(k.ID, k.Fingerprint))
			}
			for _, h := range v.Attachments {
				e.HeldBy = append(e.HeldBy, h.Holder+" ("+string(h.Mode)+")")
			}
			out = append(out, e)
		}
	}
	return out, failed
}

func (a *app) printVolumes(all []volumeEntry, wide bool) {
	head := []string{"VOLUME", "CLAIM", "SIZE", "USED", "STATE", "AGE"}
	if wide {
		head = append(head, "PROVISIONING", "ENCRYPTION", "WRAPPED BY", "LAYERS", "HELD BY")
	}
	rows := [][]string{head}
	for _, v := range all {
		row := []string{v.Volume, cmp.Or(v.Claim, "-"), text.Size(v.Size), text.Size(v.Used), v.State, text.Age(v.Created)}
		if wide {
			row = append(row, v.Provisioning, cmp.Or(v.Encryption, "-"), cmp.Or(strings.Join(v.Keys, ","), "-"), strconv.Itoa(v.Layers), cmp.Or(strings.Join(v.HeldBy, ", "), "-"))
		}
		rows = append(rows, row)
	}
	a.Table(rows)
}

// checkResult is what was found on one datastore.
type checkResult struct {
	Datastore string              `json:"datastore"`
	Images    int                 `json:"images"`
	Error     string              `json:"error,omitempty"`
	Problems  []datastore.Problem `json:"problems"`
}

// checkCommand verifies everything, or single volumes where its use names them.
func (a *app) checkCommand(use, short, example string) *cobra.Command {
	var output string
	var names []string
	cmd := &cobra.Command{
		Use:   use,
		Short: short,
		Long: `Reads every record and image and reports what is wrong. It changes nothing. Images that are open are only
looked at from outside. The exit code is 1 when something is wrong.`,
		Example: example,
		Args: func(cmd *cobra.Command, args []string) error {
			if !strings.Contains(use, "[") {
				return command.NoArgs(cmd, args)
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, volumes []string) error {
			return a.withStores(cmd.Context(), names, func(list []storage.Store) error {
				var results []checkResult
				for _, s := range list {
					results = append(results, a.check(cmd.Context(), s, volumes))
				}
				if output == "json" || output == "yaml" {
					if err := a.Structured(output, results); err != nil {
						return err
					}
				} else {
					a.printChecks(results)
				}
				return verdict(results)
			})
		},
	}
	command.OutputFlag(cmd, &output, "table", "wide", "json", "yaml")
	cmd.Flags().StringSliceVarP(&names, "datastore", "d", nil, "only this datastore; may be repeated")
	if err := cmd.RegisterFlagCompletionFunc("datastore", a.completeDatastores); err != nil {
		panic(err) // the flag is defined above
	}
	return cmd
}

func (a *app) check(ctx context.Context, s storage.Store, volumes []string) checkResult {
	show := text.IsTerminal(a.ErrOut)
	report, err := s.Check(ctx, func(done, total int) {
		if show {
			fmt.Fprintf(a.ErrOut, "\r%s: %d of %d images", s.Name, done, total)
		}
	})
	if show {
		fmt.Fprint(a.ErrOut, "\r\033[K")
	}
	r := checkResult{Datastore: s.Name, Images: report.Images, Problems: []datastore.Problem{}}
	if err != nil {
		r.Error = err.Error()
	}
	for _, p := range report.Problems {
		if storage.Concerns(s.Name, p, volumes) {
			r.Problems = append(r.Problems, p)
		}
	}
	return r
}

func (a *app) printChecks(results []checkResult) {
	rows := [][]string{{"DATASTORE", "PROBLEM", "CONCERNS", "PATH", "WHAT"}}
	for _, r := range results {
		for _, p := range r.Problems {
			rows = append(rows, []string{r.Datastore, string(p.Kind), cmp.Or(strings.Join(append(p.Volumes, p.Snapshots...), ","), "-"), p.Path, p.Text})
		}
	}
	if len(rows) > 1 {
		a.Table(rows)
	}
	for _, r := range results {
		switch {
		case r.Error != "":
			a.Printf("%s: %s\n", r.Datastore, r.Error)
		case len(r.Problems) == 0:
			a.Printf("%s: %d images, all in order\n", r.Datastore, r.Images)
		default:
			a.Printf("%s: %d images, %d findings\n", r.Datastore, r.Images, len(r.Problems))
		}
	}
}

// verdict is an error when something is wrong. That an image is in use is not.
func verdict(results []checkResult) error {
	for _, r := range results {
		if r.Error != "" {
			return command.SilentError{Err: errors.New("a datastore could not be checked")}
		}
		for _, p := range r.Problems {
			if p.Kind != datastore.ProblemUnchecked && p.Kind != datastore.ProblemLeak {
				return command.SilentError{Err: errors.New("problems were found")}
			}
		}
	}
	return nil
}
