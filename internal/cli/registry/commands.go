package registry

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/internal/cli/command"
	"atoll.dev/atoll/internal/cli/imagepush"
	"atoll.dev/atoll/internal/cli/text"
)

// Config is what the commands need of the command line.
type Config struct {
	command.App
	// Where is the kubeconfig to use and the host of its registry, "" when that is not known.
	Where func() (kubeconfig, host string, err error)
}

// registryHost is the flag that says where the registry is.
type registryHost struct{ host string }

// Command is `atoll registry`.
func (a Config) Command() *cobra.Command {
	var h registryHost
	cmd := command.Group("registry", "Images of the cluster's registry", `  atoll registry login                 how to log in with docker, podman, skopeo, oras and crane
  atoll registry ls shop
  atoll registry rm shop/web:1.0
  atoll registry robot create ci -n shop --push`,
		a.listCommand(&h), a.tagsCommand(&h), a.removeCommand(&h), a.usageCommand(&h),
		a.collectCommand(&h), a.loginCommand(&h), a.tokenCommand(), a.robotCommand(&h))
	cmd.PersistentFlags().StringVar(&h.host, "registry", "", "address of the registry (default: that of the API server)")
	return cmd
}

func (a Config) client(h *registryHost) (*Client, error) {
	kubeconfig, host, err := a.Where()
	if err != nil {
		return nil, err
	}
	if h.host != "" {
		host = h.host
	}
	return New(kubeconfig, host)
}

func first(args []string) string {
	if len(args) == 0 {
		return ""
	}
	return args[0]
}

func (a Config) listCommand(h *registryHost) *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use: "ls [namespace]", Aliases: []string{"list"}, Short: "List repositories",
		Example: `  atoll registry ls
  atoll registry ls shop -o json`,
		Args: command.OptionalArg("namespace"),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client(h)
			if err != nil {
				return err
			}
			list, err := c.Repositories(cmd.Context(), first(args))
			if err != nil {
				return err
			}
			if output == "json" || output == "yaml" {
				return a.Structured(output, list)
			}
			rows := [][]string{{"REPOSITORY", "TAGS", "NEWEST", "PUSHED"}}
			for _, r := range list {
				row := []string{r.Name, strconv.Itoa(len(r.Tags)), "-", "-"}
				if len(r.Tags) > 0 {
					row[2], row[3] = r.Tags[0].Name, text.Age(r.Tags[0].Pushed)
				}
				rows = append(rows, row)
			}
			a.Table(rows)
			return nil
		},
	}
	command.OutputFlag(cmd, &output, "table", "json", "yaml")
	return cmd
}

func (a Config) tagsCommand(h *registryHost) *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use: "tags <repository>", Short: "List the tags of a repository, the newest first",
		Example: `  atoll registry tags shop/web`,
		Args:    command.ExactArgs("repository"),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client(h)
			if err != nil {
				return err
			}
			namespace, _, _ := strings.Cut(args[0], "/")
			list, err := c.Repositories(cmd.Context(), namespace)
			if err != nil {
				return err
			}
			for _, r := range list {
				if r.Name != args[0] {
					continue
				}
				if output == "json" || output == "yaml" {
					return a.Structured(output, r.Tags)
				}
				rows := [][]string{{"TAG", "PUSHED", "DIGEST"}}
				for _, t := range r.Tags {
					rows = append(rows, []string{t.Name, text.Age(t.Pushed), t.Digest})
				}
				a.Table(rows)
				return nil
			}
			return fmt.Errorf("there is no repository %s; atoll registry ls %s lists those there are", args[0], namespace)
		},
	}
	command.OutputFlag(cmd, &output, "table", "json", "yaml")
	return cmd
}

func (a Config) removeCommand(h *registryHost) *cobra.Command {
	return &cobra.Command{
		Use: "rm <image>...", Aliases: []string{"delete"}, Short: "Remove tags, or manifests by digest",
		Long: `Removes a tag, or a manifest with all its tags by its digest. The room it takes is freed by the next collection,
when nothing else uses it: the registry runs one every hour, atoll registry gc at once.`,
		Example: `  atoll registry rm shop/web:1.0
  atoll registry rm shop/web@sha256:0123...`,
		Args: command.MoreArgs("image"),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client(h)
			if err != nil {
				return err
			}
			for _, image := range args {
				if err := c.Remove(cmd.Context(), image); err != nil {
					return fmt.Errorf("removing %s: %w", image, err)
				}
				a.Printf("removed %s\n", image)
			}
			return nil
		},
	}
}

func (a Config) usageCommand(h *registryHost) *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use: "usage [namespace]", Short: "Show what projects take, and their quotas",
		Example: `  atoll registry usage
  atoll registry usage shop`,
		Args: command.OptionalArg("namespace"),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client(h)
			if err != nil {
				return err
			}
			list, err := c.Usage(cmd.Context(), first(args))
			if err != nil {
				return err
			}
			if output == "json" || output == "yaml" {
				return a.Structured(output, list)
			}
			rows := [][]string{{"PROJECT", "USED", "QUOTA", "REPOSITORIES", "TAGS"}}
			for _, u := range list {
				quota := "-"
				if u.Quota != nil {
					quota = text.Size(*u.Quota)
				}
				rows = append(rows, []string{u.Project, text.Size(u.Used), quota, strconv.Itoa(u.Repositories), strconv.Itoa(u.Tags)})
			}
			a.Table(rows)
			return nil
		},
	}
	command.OutputFlag(cmd, &output, "table", "json", "yaml")
	return cmd
}

func (a Config) collectCommand(h *registryHost) *cobra.Command {
	var dryRun bool
	cmd := &cobra.Command{
		Use: "gc", Short: "Remove what nobody uses from the registry, while it serves",
		Long: `Removes manifests without a tag that nobody has pulled for a week (spec.garbageCollection.untaggedAge of the
RegistryConfiguration), layers that no manifest refers to for two hours, and uploads that nobody has gone on with for
an hour. Images can be pushed and pulled meanwhile. The registry does it every hour by itself. Administrators only.`,
		Example: `  atoll registry gc --dry-run`,
		Args:    command.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.client(h)
			if err != nil {
				return err
			}
			r, err := c.Collect(cmd.Context(), dryRun)
			if err != nil {
				return err
			}
			verb := "removed"
			if r.DryRun {
				verb = "would remove"
			}
			a.Printf("%s %d manifests, %d links, %d blobs, %d uploads and %d projects: %s, in %.1f s\n",
				verb, r.Manifests, r.Layers, r.Blobs, r.Uploads, r.Projects, text.Size(r.Bytes), r.Seconds)
			return nil
		},
	}
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "only count")
	return cmd
}

func (a Config) loginCommand(h *registryHost) *cobra.Command {
	return &cobra.Command{
		Use: "login", Short: "Say how to log in with docker, podman, skopeo, oras and crane",
		Example: `  atoll registry login`,
		Args:    command.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			c, err := a.client(h)
			if err != nil {
				return err
			}
			a.Printf(loginHelp, c.Host)
			return nil
		},
	}
}

func (a Config) tokenCommand() *cobra.Command {
	return &cobra.Command{
		Use: "token", Short: "Print the token of your session, which is a password for the registry",
		Long: `Prints the token of the session of "atoll login". The registry takes it as a password for as long as the session
lasts, also of people who have no password here since another issuer vouches for them. Hand it over by a pipe.`,
		Example: `  atoll registry token | docker login ATOLL-ADDRESS -u anna --password-stdin`,
		Args:    command.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			kubeconfig, _, err := a.Where()
			if err != nil {
				return err
			}
			token, err := imagepush.Token(cmd.Context(), kubeconfig)
			if err != nil {
				return err
			}
			a.Printf("%s\n", token)
			return nil
		},
	}
}

// loginHelp has the host of the registry in it.
const loginHelp = `The registry is %[1]s; an image of namespace shop is %[1]s/shop/NAME:TAG (pods of the cluster may also write
registry.atoll.local/shop/NAME:TAG). Log in as a person (NAME and password), or as a robot account
(atoll registry robot create). Its certificate is of the cluster's authority, which is in the kubeconfig:

  kubectl config view --raw --minify -o jsonpath='{.clusters[0].cluster.certificate-authority-data}' | base64 -d >ca.crt

  docker, podman, buildah, skopeo (as root; all of them look there):
    mkdir -p /etc/docker/certs.d/%[1]s && cp ca.crt /etc/docker/certs.d/%[1]s/
    docker login %[1]s -u NAME        or: podman, buildah, skopeo
    atoll registry token | docker login %[1]s -u NAME --password-stdin     by your session

  oras, crane (on Linux; in each shell that uses them):
    mkdir -p ~/.atoll-certs && cp ca.crt ~/.atoll-certs/ && export SSL_CERT_DIR=~/.atoll-certs
    oras login %[1]s -u NAME
    crane auth login %[1]s -u NAME -p PASSWORD

The name of a robot account has a $ in it: put it between single quotes, 'robot$shop+ci'.
`

func (a Config) robotCommand(h *registryHost) *cobra.Command {
	return command.Group("robot", "Robot accounts: credentials of programs for one project", `  atoll registry robot create ci -n shop --push
  atoll registry robot rotate ci -n shop`,
		a.robotCreateCommand(h), a.robotListCommand(h), a.robotRotateCommand(h), a.robotDeleteCommand(h))
}

func robotNamespace(cmd *cobra.Command, namespace *string) {
	cmd.Flags().StringVarP(namespace, "namespace", "n", metav1.NamespaceDefault, "namespace, whose project the account is for")
}

func (a Config) robotCreateCommand(h *registryHost) *cobra.Command {
	var namespace, description string
	var push bool
	var expires time.Duration
	cmd := &cobra.Command{
		Use: "create <name>", Short: "Make a robot account and print its password",
		Long: `Makes a robot account. Its password is in a Secret of its namespace, too, which pods can name in
imagePullSecrets.`,
		Example: `  atoll registry robot create ci -n shop --push --expires 720h`,
		Args:    command.ExactArgs("name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client(h)
			if err != nil {
				return err
			}
			robot := &atoll.RobotAccount{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: args[0]}}
			robot.Spec.Description, robot.Spec.Permissions = description, []atoll.RobotPermission{atoll.RobotPull}
			if push {
				robot.Spec.Permissions = append(robot.Spec.Permissions, atoll.RobotPush)
			}
			if expires > 0 {
				robot.Spec.ExpiresAt = &metav1.Time{Time: time.Now().Add(expires)}
			}
			user, password, err := c.CreateRobot(cmd.Context(), robot)
			if err != nil {
				return err
			}
			a.printRobot(c.Host, user, password)
			return nil
		},
	}
	robotNamespace(cmd, &namespace)
	cmd.Flags().BoolVar(&push, "push", false, "it may push, and not only pull")
	cmd.Flags().DurationVar(&expires, "expires", 0, "how long it works (default: for ever)")
	cmd.Flags().StringVar(&description, "description", "", "what it is for")
	return cmd
}

func (a Config) printRobot(host, user, password string) {
	a.Printf("registry  %s\nuser      %s\npassword  %s\n", host, user, password)
}

func (a Config) robotListCommand(h *registryHost) *cobra.Command {
	var namespace, output string
	var all bool
	cmd := &cobra.Command{
		Use: "ls", Aliases: []string{"list"}, Short: "List robot accounts",
		Example: `  atoll registry robot ls -n shop`,
		Args:    command.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.client(h)
			if err != nil {
				return err
			}
			if all {
				namespace = ""
			}
			list, err := c.Robots(cmd.Context(), namespace)
			if err != nil {
				return err
			}
			if output == "json" || output == "yaml" {
				return a.Structured(output, list)
			}
			rows := [][]string{{"NAMESPACE", "NAME", "USER", "PERMISSIONS", "SECRET", "EXPIRES"}}
			for _, r := range list {
				permissions, expires := []string{}, "never"
				for _, p := range r.Spec.Permissions {
					permissions = append(permissions, string(p))
				}
				if r.Spec.ExpiresAt != nil {
					expires = r.Spec.ExpiresAt.UTC().Format(time.RFC3339)
				}
				rows = append(rows, []string{r.Namespace, r.Name, r.Status.User, strings.Join(permissions, ","), r.Status.SecretName, expires})
			}
			a.Table(rows)
			return nil
		},
	}
	robotNamespace(cmd, &namespace)
	cmd.Flags().BoolVarP(&all, "all-namespaces", "A", false, "those of all namespaces")
	command.OutputFlag(cmd, &output, "table", "json", "yaml")
	return cmd
}

func (a Config) robotRotateCommand(h *registryHost) *cobra.Command {
	var namespace string
	cmd := &cobra.Command{
		Use: "rotate <name>", Short: "Make a new password; the old one ends at once",
		Example: `  atoll registry robot rotate ci -n shop`,
		Args:    command.ExactArgs("name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client(h)
			if err != nil {
				return err
			}
			user, password, err := c.RotateRobot(cmd.Context(), namespace, args[0])
			if err != nil {
				return err
			}
			a.printRobot(c.Host, user, password)
			return nil
		},
	}
	robotNamespace(cmd, &namespace)
	return cmd
}

func (a Config) robotDeleteCommand(h *registryHost) *cobra.Command {
	var namespace string
	cmd := &cobra.Command{
		Use: "delete <name>", Aliases: []string{"rm"}, Short: "End a robot account at once",
		Example: `  atoll registry robot delete ci -n shop`,
		Args:    command.ExactArgs("name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client(h)
			if err != nil {
				return err
			}
			return c.DeleteRobot(cmd.Context(), namespace, args[0])
		},
	}
	robotNamespace(cmd, &namespace)
	return cmd
}
