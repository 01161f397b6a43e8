package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"atoll.dev/atoll/internal/cli/command"
	"atoll.dev/atoll/internal/cli/imagepush"
	"atoll.dev/atoll/internal/image"
	"atoll.dev/atoll/internal/kube/containerd/images"
)

func (a *app) imageCommand() *cobra.Command {
	cmd := command.Group("image", "Container images of this host, and images of virtual machines", `  atoll image load app.tar
  atoll image ls
  atoll image import debian-12.qcow2
  atoll image ls --vm`,
		a.imageLoadCommand(), a.imageListCommand(), a.imageRemoveCommand(), a.imagePullCommand(), a.imageBuildCommand(),
		imagepush.Command(a.App), a.imageImportCommand(), a.imageExportCommand())
	cmd.Long = `load, pull, build, ls and rm are about container images of this host; push sends one to the registry of a cluster.
import and export, and ls and rm with --vm, are about disk images that virtual machines are made of.`
	return cmd
}

// withImages runs f with a client of this host's containerd.
func (a *app) withImages(f func(*images.Client) error) error {
	t, err := a.tree()
	if err != nil {
		return err
	}
	if os.Geteuid() != 0 {
		return errors.New("atoll image works as root only; use sudo")
	}
	if _, err := os.Stat(t.ContainerdSocket()); err != nil {
		return fmt.Errorf("containerd does not run on %s; start it with `atoll up` (%w)", t.Root(), err)
	}
	client, err := images.New(images.Config{Address: t.ContainerdSocket()})
	if err != nil {
		return err
	}
	return errors.Join(f(client), client.Close())
}

func (a *app) imageLoadCommand() *cobra.Command {
	var name string
	cmd := &cobra.Command{
		Use:   "load <archive>...",
		Short: "Load OCI or `docker save` archives",
		Long: `Loads the images of archives (OCI layout or "docker save", plain or compressed)
into this host. "-" reads standard input.`,
		Example: `  atoll image load build/images/busybox.tar
  docker save app | atoll image load -`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return command.UsageError{Err: fmt.Errorf("%q wants at least one archive, or - for standard input", cmd.CommandPath())}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.withImages(func(client *images.Client) error {
				for _, archive := range args {
					if err := a.loadArchive(cmd.Context(), client, archive, name); err != nil {
						return err
					}
				}
				return nil
			})
		},
	}
	cmd.Flags().StringVar(&name, "name", "", "name for an image whose archive does not name it")
	return cmd
}

// loadArchive loads one archive and prints its images.
func (a *app) loadArchive(ctx context.Context, client *images.Client, archive, name string) error {
	var in io.Reader = os.Stdin
	source := "standard input"
	if archive != "-" {
		f, err := os.Open(archive)
		if err != nil {
			return fmt.Errorf("opening the archive: %w", err)
		}
		defer f.Close()
		in, source = f, archive
	}
	names, err := client.Load(ctx, in, images.LoadOptions{Source: source, Name: name})
	if err != nil {
		return err
	}
	for _, n := range tagged(names) {
		a.Printf("loaded %s\n", n)
	}
	return nil
}

func (a *app) imageListCommand() *cobra.Command {
	var output, namespace string
	var vm bool
	cmd := &cobra.Command{
		Use:     "ls",
		Aliases: []string{"list"},
		Short:   "List the container images of this host, or the images of virtual machines",
		Example: `  atoll image ls
  atoll image ls -o json
  atoll image ls --vm -o wide`,
		Args: command.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if vm {
				return a.vmImages().List(cmd.Context(), namespace, output)
			}
			return a.withImages(func(client *images.Client) error {
				list, err := client.List(cmd.Context())
				if err != nil {
					return err
				}
				if output != "table" && output != "wide" {
					return a.Structured(output, list)
				}
				rows := [][]string{{"IMAGE", "ID", "SIZE"}}
				for _, i := range list {
					id := strings.TrimPrefix(i.ID, "sha256:")
					for _, n := range tagged(i.Names) {
						rows = append(rows, []string{n, id[:min(12, len(id))], images.FormatSize(i.Size)})
					}
				}
				a.Table(rows)
				return nil
			})
		},
	}
	command.OutputFlag(cmd, &output, "table", "wide", "json", "yaml")
	cmd.Flags().BoolVar(&vm, "vm", false, "list images of virtual machines")
	vmNamespace(cmd, &namespace)
	return cmd
}

// tagged returns the names with a tag, or all if there is none.
func tagged(names []string) []string {
	var out []string
	for _, n := range names {
		if !strings.Contains(n, "@") {
			out = append(out, n)
		}
	}
	switch {
	case len(out) > 0:
		return out
	case len(names) > 0:
		return names
	}
	return []string{"<none>"}
}

func (a *app) imageRemoveCommand() *cobra.Command {
	var vm bool
	var namespace string
	cmd := &cobra.Command{
		Use:   "rm <name>",
		Short: "Remove a container image from this host, or an image of virtual machines",
		Long: `Removes a container image from this host, or with --vm an image of virtual machines; those that were made of it
stay as they are.`,
		Example: `  atoll image rm docker.io/library/app:1.0
  atoll image rm --vm debian-12`,
		Args: command.ExactArgs("name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if vm {
				return a.vmImages().Remove(cmd.Context(), namespace, args)
			}
			return a.withImages(func(client *images.Client) error {
				return client.Remove(cmd.Context(), args[0])
			})
		},
	}
	cmd.Flags().BoolVar(&vm, "vm", false, "remove an image of virtual machines")
	vmNamespace(cmd, &namespace)
	return cmd
}

func (a *app) imagePullCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "pull <name>",
		Short:   "Pull an image from its registry",
		Example: `  atoll image pull registry.example.com/app:1.0`,
		Args:    command.ExactArgs("name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.withImages(func(client *images.Client) error {
				i, err := client.Pull(cmd.Context(), args[0], images.Auth{})
				if err != nil {
					return err
				}
				a.Printf("pulled %s\n", i.ID)
				return nil
			})
		},
	}
}

func (a *app) imageBuildCommand() *cobra.Command {
	var out, cache string
	var load bool
	cmd := &cobra.Command{
		Use:   "build <recipe directory>",
		Short: "Build an image from Debian packages, programs and files",
		Long: `Builds an OCI archive from a recipe (image.yaml in the directory), without Docker
and without a registry. guestos/images in Atoll's source has examples.`,
		Example: `  atoll image build guestos/images/busybox -o busybox.tar
  atoll image build ./my-app --load`,
		Args: command.ExactArgs("recipe directory"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if out == "" && !load {
				return command.UsageError{Err: errors.New("say where the image goes: -o <file>, --load, or both")}
			}
			recipe, err := image.Load(args[0])
			if err != nil {
				return err
			}
			if cache == "" {
				home, err := os.UserHomeDir()
				if err != nil {
					return fmt.Errorf("finding the cache: %w; name one with --cache", err)
				}
				cache = filepath.Join(home, ".cache", "atoll")
			}
			logger := slog.New(slog.NewTextHandler(a.ErrOut, nil))
			result, err := image.Build(cmd.Context(), recipe, image.Options{CacheDir: cache, Log: logger})
			if err != nil {
				return err
			}
			if out != "" {
				if err := copyFile(result.Archive, out); err != nil {
					return err
				}
				a.Printf("built %s: %s (%s)\n", out, strings.Join(result.Names, " "), images.FormatSize(result.Size))
			}
			if !load {
				return nil
			}
			return a.withImages(func(client *images.Client) error {
				return a.loadArchive(cmd.Context(), client, result.Archive, "")
			})
		},
	}
	cmd.Flags().StringVarP(&out, "file", "o", "", "write the OCI archive to this file")
	cmd.Flags().StringVar(&cache, "cache", os.Getenv("ATOLL_CACHE"), "cache directory (default ~/.cache/atoll; environment: ATOLL_CACHE)")
	cmd.Flags().BoolVar(&load, "load", false, "load the image into this host")
	return cmd
}

// copyFile copies the archive beside its destination and renames it.
func copyFile(from, to string) (err error) {
	in, err := os.Open(from)
	if err != nil {
		return fmt.Errorf("opening the archive: %w", err)
	}
	defer in.Close()
	tmp, err := os.CreateTemp(filepath.Dir(to), "."+filepath.Base(to)+".*")
	if err != nil {
		return fmt.Errorf("writing the archive: %w", err)
	}
	defer os.Remove(tmp.Name()) // fails when all went well
	_, err = io.Copy(tmp, in)
	err = errors.Join(err, tmp.Chmod(0o644), tmp.Close())
	if err == nil {
		err = os.Rename(tmp.Name(), to)
	}
	if err != nil {
		return fmt.Errorf("writing the archive: %w", err)
	}
	return nil
}
