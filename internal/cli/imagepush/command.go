package imagepush

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"os/exec"
	"strings"

	"github.com/spf13/cobra"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"atoll.dev/atoll/internal/cli/command"
)

// loginPrefix begins the names that `atoll login` gives users of a kubeconfig: atoll:HOST:PORT:NAME, of the portal.
const loginPrefix = "atoll:"

// Command is `atoll image push`.
func Command(a command.App) *cobra.Command {
	var o Options
	var kubeconfig, user, passwordFile string
	cmd := &cobra.Command{
		Use:   "push <archive> <registry>/<project>/<repository>:<tag>",
		Short: "Push an image from an archive to the cluster's registry",
		Long: `Sends an image from an archive (OCI layout or "docker save") to a project of the registry. The project is a
namespace in which you have the role Edit or Owner. The session of "atoll login" is used, or with --user the password of
a robot account.

registry.atoll.local is found where the cluster of the kubeconfig is, whether this computer knows the name or not.`,
		Example: `  atoll image push app.tar registry.atoll.local/shop/app:1.0
  docker save app:1.0 -o app.tar && atoll image push app.tar registry.atoll.local/shop/app:1.0
  atoll image push app.tar registry.atoll.local/shop/app:1.0 --user 'robot$shop+ci' --password-file secret`,
		Args: command.ExactArgs("archive", "image"),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.Archive, o.Target = args[0], args[1]
			if _, err := ParseTarget(o.Target); err != nil {
				return command.UsageError{Err: err}
			}
			s, err := session(cmd.Context(), a.In, kubeconfig, user, passwordFile)
			if err != nil {
				return err
			}
			digest, err := Push(cmd.Context(), s, o)
			if err != nil {
				return err
			}
			a.Printf("pushed %s (%s)\n", o.Target, digest)
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&kubeconfig, "kubeconfig", "", "kubeconfig of the login (default: KUBECONFIG, ~/.kube/config)")
	f.StringVar(&o.Image, "image", "", "name of the image in the archive, if there are several (default: the first)")
	f.StringVar(&user, "user", "", "robot account or user to push as, instead of who is logged in")
	f.StringVar(&passwordFile, "password-file", "", "file with the password of --user; - reads standard input")
	return cmd
}

// session is who is logged in with a kubeconfig, at the registry.
func session(ctx context.Context, in io.Reader, kubeconfig, user, passwordFile string) (Session, error) {
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	rules.ExplicitPath = kubeconfig
	config, err := rules.Load()
	if err != nil {
		return Session{}, fmt.Errorf("reading the kubeconfig: %w", err)
	}
	current := config.Contexts[config.CurrentContext]
	if current == nil || config.Clusters[current.Cluster] == nil {
		return Session{}, errors.New("the kubeconfig names no cluster; log in with `atoll login`, or name the file with --kubeconfig")
	}
	cluster := config.Clusters[current.Cluster]
	s := Session{CA: cluster.CertificateAuthorityData}
	if s.Portal, err = portalOf(cluster, current.AuthInfo); err != nil {
		return Session{}, err
	}
	if len(s.CA) == 0 && cluster.CertificateAuthority != "" {
		if s.CA, err = os.ReadFile(cluster.CertificateAuthority); err != nil {
			return Session{}, fmt.Errorf("reading the certificate authority of the kubeconfig: %w", err)
		}
	}
	if user != "" {
		s.User = user
		s.Password, err = readPassword(in, passwordFile)
		return s, err
	}
	// The name is for messages: a session says itself whose it is. Basic authentication has no ':' in names.
	s.User = current.AuthInfo[strings.LastIndexByte(current.AuthInfo, ':')+1:]
	s.Password, err = token(ctx, config.AuthInfos[current.AuthInfo])
	return s, err
}

// Token is what the person who is logged in with a kubeconfig, "" for those that kubectl uses, is known by to the API
// server and to the registry.
func Token(ctx context.Context, kubeconfig string) (string, error) {
	s, err := session(ctx, nil, kubeconfig, "", "")
	return s.Password, err
}

// token is what somebody is known to the API server by: it is in the kubeconfig, or a program gets it.
func token(ctx context.Context, who *clientcmdapi.AuthInfo) (string, error) {
	if who == nil || who.Token == "" && who.Exec == nil {
		return "", errors.New("the kubeconfig has no session; log in with `atoll login`, or use a robot account by its name and password")
	}
	if who.Exec == nil {
		return who.Token, nil
	}
	cmd := exec.CommandContext(ctx, who.Exec.Command, who.Exec.Args...)
	cmd.Env = append(os.Environ(), fmt.Sprintf(`KUBERNETES_EXEC_INFO={"apiVersion":%q,"kind":"ExecCredential","spec":{"interactive":false}}`, who.Exec.APIVersion))
	for _, e := range who.Exec.Env {
		cmd.Env = append(cmd.Env, e.Name+"="+e.Value)
	}
	var said bytes.Buffer
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("getting the session: %w: %s", err, strings.TrimSpace(said.String()))
	}
	var credential struct {
		Status struct {
			Token string `json:"token"`
		} `json:"status"`
	}
	if err := json.Unmarshal(out, &credential); err != nil || credential.Status.Token == "" {
		return "", fmt.Errorf("getting the session: %s gave no token; log in again with `atoll login`", who.Exec.Command)
	}
	return credential.Status.Token, nil
}

// portalOf is the address of the portal of a cluster; that of a kubeconfig that is not of `atoll login` is the API
// server's with the port 443.
func portalOf(cluster *clientcmdapi.Cluster, user string) (string, error) {
	if login, ok := strings.CutPrefix(user, loginPrefix); ok {
		if i := strings.LastIndex(login, ":"); i > 0 {
			if _, _, err := net.SplitHostPort(login[:i]); err == nil {
				return login[:i], nil
			}
		}
	}
	u, err := url.Parse(cluster.Server)
	if err != nil || u.Hostname() == "" {
		return "", fmt.Errorf("the kubeconfig has no usable address of the API server: %q", cluster.Server)
	}
	return net.JoinHostPort(u.Hostname(), "443"), nil
}

// readPassword reads the first line of a file, or of standard input.
func readPassword(in io.Reader, file string) (string, error) {
	if file == "" {
		return "", command.UsageError{Err: errors.New("--user wants --password-file; a password is not given on the command line, where others can see it")}
	}
	const longest = 64 << 10
	if file != "-" {
		f, err := os.Open(file)
		if err != nil {
			return "", fmt.Errorf("opening the file with the password: %w", err)
		}
		defer f.Close()
		in = f
	}
	b, err := io.ReadAll(io.LimitReader(in, longest))
	if err != nil {
		return "", fmt.Errorf("reading the password: %w", err)
	}
	line, _, _ := strings.Cut(string(b), "\n")
	return strings.TrimSuffix(line, "\r"), nil
}
