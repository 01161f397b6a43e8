package login

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"os"
	"time"

	"github.com/spf13/cobra"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	clientauth "k8s.io/client-go/pkg/apis/clientauthentication/v1"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"atoll.dev/atoll/internal/cli/command"
)

// fresh is how long a token must still be good for to be handed out.
const fresh = 30 * time.Second

func credentialCommand(cfg Config) *cobra.Command {
	c := newCommand(cfg)
	var file string
	cmd := &cobra.Command{
		Use:     "credential",
		Short:   "Hand out a token of a login, for kubectl",
		Long:    `Is named in the kubeconfig that "atoll login" writes; kubectl runs it. It never asks anything.`,
		Example: `  atoll login credential --cache ~/.kube/atoll/LOGIN.json`,
		Hidden:  true,
		Args:    command.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			l, err := c.current(cmd.Context(), file)
			if err != nil {
				return err
			}
			expires := metav1.NewTime(l.Expires)
			return json.NewEncoder(cfg.Out).Encode(clientauth.ExecCredential{
				TypeMeta: metav1.TypeMeta{APIVersion: execVersion, Kind: "ExecCredential"},
				Status:   &clientauth.ExecCredentialStatus{Token: l.Token, ExpirationTimestamp: &expires},
			})
		},
	}
	cmd.Flags().StringVar(&file, cacheFlag[2:], "", "file of the login")
	return cmd
}

// current is a login with a token that is good now; it is refreshed when it must be.
func (c *commands) current(ctx context.Context, file string) (cached, error) {
	l, err := load(file)
	if err != nil || time.Until(l.Expires) > fresh {
		return l, err
	}
	err = locked(file, func() error {
		// Another process may have done it meanwhile.
		if l, err = load(file); err != nil || time.Until(l.Expires) > fresh {
			return err
		}
		return refresh(ctx, file, &l)
	})
	return l, err
}

// refresh gets a new token and keeps it.
func refresh(ctx context.Context, file string, l *cached) error {
	again := fmt.Errorf("the login of %s at %s has ended; run: atoll login --server %s", l.User, l.Server, l.Server)
	if l.RefreshToken == "" {
		return again
	}
	p, err := newPortal(l.Server, l.Trust)
	if err != nil {
		return err
	}
	if l.Issuer != nil {
		got, err := foreign{issuer: *l.Issuer, portal: p}.refresh(ctx, l.RefreshToken)
		if err != nil {
			return fmt.Errorf("%w (%w)", again, err)
		}
		if err := l.fillForeign(got); err != nil {
			return err
		}
		return save(file, *l)
	}
	session, err := p.refresh(ctx, l.RefreshToken)
	if isStatus(err, http.StatusUnauthorized) {
		return again
	}
	if err != nil {
		return err
	}
	l.fill(session)
	return save(file, *l)
}

// chosen finds the login that a command is about: that of the server, or else of the current context.
func (c *commands) chosen(server, kubeconfig string) (string, error) {
	if server != "" {
		at, err := parseServer(server)
		if err != nil {
			return "", command.UsageError{Err: err}
		}
		files, err := c.logins(at)
		if err != nil {
			return "", err
		}
		if len(files) == 0 {
			return "", fmt.Errorf("you are not logged in at %s", at)
		}
		return files[0], nil
	}
	file, err := c.kubeconfigFile(kubeconfig)
	if err != nil {
		return "", err
	}
	config, err := readKubeconfig(file)
	if err != nil {
		return "", err
	}
	if cache := cacheOf(config, config.CurrentContext); cache != "" {
		return cache, nil
	}
	files, err := c.logins("")
	if err != nil {
		return "", err
	}
	if len(files) == 0 {
		return "", errors.New("you are not logged in; run: atoll login --server ADDRESS")
	}
	return files[0], nil
}

func logoutCommand(cfg Config) *cobra.Command {
	c := newCommand(cfg)
	var server, kubeconfig string
	var all bool
	cmd := &cobra.Command{
		Use:   "logout",
		Short: "End a login: its token is worth nothing any more",
		Long: `Ends the session at the supervisor and removes the token and the contexts of the login. Without --server it is the
login of the current context. What an identity provider handed out ends by itself; only the files are removed.`,
		Example: `  atoll logout
  atoll logout --server 192.0.2.10
  atoll logout --all`,
		Args: command.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var files []string
			var err error
			if all {
				files, err = c.logins("")
			} else {
				var one string
				one, err = c.chosen(server, kubeconfig)
				files = []string{one}
			}
			if err != nil {
				return err
			}
			for _, file := range files {
				err = errors.Join(err, c.logout(cmd.Context(), file, kubeconfig))
			}
			return err
		},
	}
	cmd.Flags().StringVar(&server, "server", "", "address of the supervisor (default: that of the current context)")
	cmd.Flags().StringVar(&kubeconfig, "kubeconfig", "", "kubeconfig to change (default: the first of KUBECONFIG, or ~/.kube/config)")
	cmd.Flags().BoolVar(&all, "all", false, "end all logins of this machine")
	return cmd
}

// logout ends one login. The files go even if the supervisor does not answer, which is an error then.
func (c *commands) logout(ctx context.Context, file, kubeconfig string) error {
	l, err := load(file)
	if err != nil {
		return err
	}
	var failed error
	if l.Issuer == nil {
		p, err := newPortal(l.Server, l.Trust)
		if err == nil {
			err = p.logout(ctx, l.RefreshToken)
		}
		if err != nil && !isStatus(err, http.StatusUnauthorized) { // it has ended already
			failed = fmt.Errorf("the session at %s goes on until %s: %w", l.Server, l.SessionExpires.Format(time.RFC3339), err)
		}
	}
	at, err := c.kubeconfigFile(kubeconfig)
	if err != nil {
		return errors.Join(failed, err)
	}
	if _, err := os.Stat(at); err == nil {
		if err := changeKubeconfig(at, func(config *clientcmdapi.Config) { remove(config, l) }); err != nil {
			return errors.Join(failed, err)
		}
	}
	for _, gone := range []string{file, file + ".lock"} {
		if err := os.Remove(gone); err != nil && !errors.Is(err, os.ErrNotExist) {
			failed = errors.Join(failed, err)
		}
	}
	if failed == nil {
		c.Printf("%s is logged out of %s\n", l.User, l.Server)
	}
	return failed
}

// who is what whoami prints.
type who struct {
	Server  string    `json:"server"`
	User    string    `json:"user"`
	Groups  []string  `json:"groups"`
	Expires time.Time `json:"sessionExpires,omitzero"`
}

func whoamiCommand(cfg Config) *cobra.Command {
	c := newCommand(cfg)
	var server, kubeconfig, output string
	cmd := &cobra.Command{
		Use:   "whoami",
		Short: "Show who you are logged in as",
		Example: `  atoll whoami
  atoll whoami --server 192.0.2.10 -o json`,
		Args: command.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			file, err := c.chosen(server, kubeconfig)
			if err != nil {
				return err
			}
			l, err := c.current(cmd.Context(), file)
			if err != nil {
				return err
			}
			p, err := newPortal(l.Server, l.Trust)
			if err != nil {
				return err
			}
			said, err := p.whoami(cmd.Context(), l.Token)
			if err != nil {
				return err
			}
			out := who{Server: l.Server, User: said.User, Groups: said.Groups, Expires: said.Expires}
			if output != "text" {
				return c.Structured(output, out)
			}
			c.Printf("%s at %s\n", out.User, out.Server)
			for _, g := range out.Groups {
				c.Printf("in group %s\n", g)
			}
			if !out.Expires.IsZero() {
				c.Printf("until %s\n", out.Expires.Local().Format(time.DateTime))
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&server, "server", "", "address of the supervisor (default: that of the current context)")
	cmd.Flags().StringVar(&kubeconfig, "kubeconfig", "", "kubeconfig to look at (default: the first of KUBECONFIG, or ~/.kube/config)")
	command.OutputFlag(cmd, &output, "text", "json", "yaml")
	return cmd
}

func fingerprintCommand(cfg Config) *cobra.Command {
	return &cobra.Command{
		Use:   "fingerprint",
		Short: "Show the fingerprint that people see at their first login, on the host",
		Example: `  atoll login fingerprint
  atoll login --server 192.0.2.10 --user anna --fingerprint SHA256:...`,
		Args: command.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			b, err := cfg.Authority()
			if err != nil {
				return fmt.Errorf("reading the authority of this supervisor: %w", err)
			}
			block, _ := pem.Decode(b)
			if block == nil {
				return errors.New("the authority of this supervisor is no PEM file")
			}
			cert, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				return fmt.Errorf("reading the authority of this supervisor: %w", err)
			}
			_, _ = fmt.Fprintln(cfg.Out, fingerprint(cert))
			return nil
		},
	}
}

// PasswdCommand is `atoll user passwd`.
func PasswdCommand(cfg Config) *cobra.Command {
	c := newCommand(cfg)
	var server, user string
	var stdin bool
	var how trustOptions
	cmd := &cobra.Command{
		Use:   "passwd",
		Short: "Change your own password; it ends all your sessions",
		Long: `Asks for the old and the new password and changes it at the supervisor. Without --server and --user it is that of the
login that the current context is of. With --password-stdin the old one is the first line of standard input and the
new one the second.`,
		Example: `  atoll user passwd
  atoll user passwd --server 192.0.2.10 --user anna`,
		Args: command.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.passwd(cmd.Context(), server, user, stdin, how)
		},
	}
	cmd.Flags().StringVar(&server, "server", "", "address of the supervisor (default: that of the current context)")
	cmd.Flags().StringVarP(&user, "user", "u", "", "name of the user (default: that of the login)")
	cmd.Flags().BoolVar(&stdin, "password-stdin", false, "read the old and the new password from standard input, a line each")
	trustFlags(cmd, &how)
	return cmd
}

func (c *commands) passwd(ctx context.Context, server, user string, stdin bool, how trustOptions) error {
	var l cached
	if server == "" || user == "" {
		file, err := c.chosen(server, "")
		if err != nil {
			return fmt.Errorf("%w; or give --server and --user", err)
		}
		if l, err = load(file); err != nil {
			return err
		}
		if l.Issuer != nil && user == "" {
			return fmt.Errorf("%s is a user of %s; change the password there", l.User, l.Issuer.Name)
		}
	}
	if server != "" {
		at, err := parseServer(server)
		if err != nil {
			return command.UsageError{Err: err}
		}
		if at != l.Server {
			if l.Trust, err = c.trust(ctx, at, how); err != nil {
				return err
			}
			l.Server = at
		}
	}
	if user == "" {
		user = l.User
	}
	p, err := newPortal(l.Server, l.Trust)
	if err != nil {
		return err
	}
	old, err := c.password("Old password: ", stdin)
	if err != nil {
		return err
	}
	if !stdin {
		_, err = c.newPassword(ctx, p, user, old)
	} else {
		var wanted string
		if wanted, err = c.line(); err == nil {
			err = p.changePassword(ctx, user, old, wanted)
		}
	}
	if err != nil {
		return err
	}
	c.Printf("the password is changed and all sessions have ended; log in again\n")
	return nil
}
