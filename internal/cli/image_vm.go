package cli

import (
	"errors"
	"os"

	"github.com/spf13/cobra"

	api "atoll.dev/atoll/api/imageregistry/v1alpha1"
	"atoll.dev/atoll/internal/cli/command"
	"atoll.dev/atoll/internal/cli/vmimage"
	"atoll.dev/atoll/internal/storage/library"
)

// vmImages are the commands about images of virtual machines.
func (a *app) vmImages() vmimage.Config {
	return vmimage.Config{
		App: a.App,
		Kubeconfig: func() (string, error) {
			t, err := a.tree()
			if err != nil {
				return "", err
			}
			return envOr("KUBECONFIG", t.AdminKubeconfig()), nil
		},
		Library: func() *library.Library {
			t, err := a.tree()
			if err != nil || os.Geteuid() != 0 || os.Getenv("KUBECONFIG") != "" {
				return nil
			}
			if _, err := os.Stat(t.Content()); err != nil {
				return nil
			}
			l, err := library.New(library.Config{Dir: t.Content()})
			if err != nil {
				return nil
			}
			return l
		},
	}
}

// vmNamespace adds the flags that say where an image of a virtual machine is.
func vmNamespace(cmd *cobra.Command, namespace *string) {
	cmd.Flags().StringVarP(namespace, "namespace", "n", "", "namespace of the image")
}

func (a *app) imageImportCommand() *cobra.Command {
	var o vmimage.ImportOptions
	var cluster bool
	cmd := &cobra.Command{
		Use:   "import <file | URL | oci://reference>",
		Short: "Import an image of a virtual machine",
		Long: `Imports a disk image into a content library, where virtual machines find it: by its
display name, or by the name (vmi-...) that is printed.

It takes qcow2, raw, ISO, VMDK (monolithicSparse, streamOptimized), VHD, VHDX and OVA, and any of them compressed
with gzip, xz or zstd; from a file of this computer, from a web server, or from a registry (a KubeVirt containerDisk
or an OCI artifact). What is in it is found out, whatever its name. The image goes to all namespaces unless -n
names one. When it was interrupted, the same command goes on where it was.`,
		Example: `  atoll image import debian-12.qcow2 --os-type debian12_64Guest
  atoll image import https://images.example.com/app.ova --checksum sha256:0123... -n team-a
  atoll image import oci://registry.example.com/disks/debian:12 --name debian`,
		Args: command.ExactArgs("file, URL or oci://reference"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if cluster && o.Namespace != "" {
				return command.UsageError{Err: errors.New("use either --cluster or --namespace")}
			}
			o.Source = args[0]
			return a.vmImages().Import(cmd.Context(), o)
		},
	}
	command.OutputFlag(cmd, &o.Output, "table", "wide", "json", "yaml")
	f := cmd.Flags()
	vmNamespace(cmd, &o.Namespace)
	f.BoolVar(&cluster, "cluster", false, "make it an image for all namespaces (the default without --namespace)")
	f.StringVar(&o.Name, "name", "", "display name (default: from the source)")
	f.StringVar(&o.Object, "item", "", "name of the library item (default: from the display name)")
	f.StringVar(&o.Library, "library", api.DefaultLibrary, "content library")
	f.StringVar(&o.Description, "description", "", "what it is")
	f.StringVar(&o.Checksum, "checksum", "", "checksum that the file must have: sha256:HEX or sha512:HEX")
	f.StringVar(&o.CA, "ca-file", "", "file with the certificate of the server, or of who issued it, in PEM")
	f.BoolVar(&o.PlainHTTP, "plain-http", false, "talk to the registry without TLS")
	f.StringVar(&o.OSType, "os-type", "", "operating system in VMware's names, for example debian12_64Guest")
	f.StringVar(&o.OSID, "os-id", "", "operating system in CIM's numbers, for example 96")
	f.StringVar(&o.OSVer, "os-version", "", "version of the operating system")
	f.StringVar(&o.Firmware, "firmware", "", "bios or efi, if the image does not say it")
	f.BoolVar(&o.NoWait, "no-wait", false, "do not wait until it is imported")
	return cmd
}

func (a *app) imageExportCommand() *cobra.Command {
	o := vmimage.ExportOptions{Disk: -1}
	cmd := &cobra.Command{
		Use:   "export <name>",
		Short: "Write an image of a virtual machine into a file",
		Long: `Writes an image into a file: as qcow2, raw, VMDK (streamOptimized) or OVA, which vSphere and VirtualBox import;
without a format the file as it came. The name is the display name, the name of the image (vmi-...) or of its item.`,
		Example: `  atoll image export debian-12 -f debian-12.ova
  atoll image export vmi-0123456789abcdef0 --format vmdk -f disk.vmdk`,
		Args: command.ExactArgs("name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.Name = args[0]
			return a.vmImages().Export(cmd.Context(), o)
		},
	}
	vmNamespace(cmd, &o.Namespace)
	cmd.Flags().StringVarP(&o.File, "file", "f", "", "the file (default: the image's name in this directory)")
	cmd.Flags().StringVar(&o.Format, "format", "", "qcow2, raw, vmdk or ova (default: from the file's name)")
	cmd.Flags().IntVar(&o.Disk, "disk", -1, "number of the disk, from 0 (default: the only one, or all in an OVA)")
	return cmd
}
