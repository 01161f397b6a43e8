// Package login is `atoll login`, `atoll logout` and `atoll whoami`: it gets tokens from the portal of a supervisor, or
// from an issuer the supervisor knows, and writes a kubeconfig with a context for the supervisor and for each namespace
// the person may enter.
//
// The kubeconfig holds no token: it names this program (`atoll login credential`), which hands out a short-lived one
// from a file of mode 0600 below ~/.kube/atoll and refreshes it there. Passwords come from the terminal or standard
// input, never from the command line. The certificate of a supervisor is checked by a file, by what a person confirmed
// before (as with ssh), or by the authorities of the machine.
//
// internal/cli gives it the streams and the environment. What can go wrong is said in one line with the way out.
package login

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/oauth2"
	"golang.org/x/term"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"atoll.dev/atoll/internal/cli/command"
	"atoll.dev/atoll/internal/identity"
	wire "atoll.dev/atoll/internal/identity/login"
)

// Config of the commands.
type Config struct {
	command.App
	Getenv func(string) string
	// Home is the person's home directory, "" when there is none.
	Home string
	// Authority reads the PEM of the authority of the supervisor on this host.
	Authority func() ([]byte, error)
}

// commands is what the commands share.
type commands struct {
	Config
	in        *bufio.Reader
	noBrowser bool
}

func newCommand(cfg Config) *commands { return &commands{Config: cfg, in: bufio.NewReader(cfg.In)} }

// options of a login.
type options struct {
	server, user, provider string
	flow                   string
	port                   int
	passwordStdin          bool
	kubeconfig             string
	trust                  trustOptions
}

// Commands are login, logout and whoami.
func Commands(cfg Config) []*cobra.Command {
	return []*cobra.Command{loginCommand(cfg), logoutCommand(cfg), whoamiCommand(cfg)}
}

func loginCommand(cfg Config) *cobra.Command {
	c := newCommand(cfg)
	var o options
	cmd := &cobra.Command{
		Use:   "login",
		Short: "Log in to a supervisor and write a kubeconfig for it",
		Long: `Logs in as a local user, with a password, or at an identity provider, with a browser or a code. The kubeconfig gets a
context for the supervisor and one for each namespace you may enter; it holds no password and no token.

The password is asked for, or read from standard input with --password-stdin. The first time, the fingerprint of the
supervisor's certificate is shown and must be confirmed, unless --ca-file or --fingerprint says what is right.`,
		Example: `  atoll login --server 192.0.2.10 --user anna
  atoll login --server supervisor.example --provider corp
  atoll login --server 192.0.2.10 --user ci --ca-file cluster-ca.crt --password-stdin <password-file`,
		Args: command.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return c.login(cmd.Context(), o) },
	}
	f := cmd.Flags()
	f.StringVar(&o.server, "server", "", "address of the supervisor: HOST, HOST:PORT or https://HOST (required)")
	f.StringVarP(&o.user, "user", "u", "", "name of a local user")
	f.StringVar(&o.provider, "provider", "", "name of an identity provider to log in at")
	f.StringVar(&o.flow, "flow", flowAuto, "how to log in at a provider: auto, device or browser")
	f.IntVar(&o.port, "callback-port", 0, "port of this machine that the provider's page returns to (default: any)")
	f.BoolVar(&c.noBrowser, "no-browser", false, "only show the address of the provider's page")
	f.BoolVar(&o.passwordStdin, "password-stdin", false, "read the password from standard input")
	f.StringVar(&o.kubeconfig, "kubeconfig", "", "kubeconfig to write (default: the first of KUBECONFIG, or ~/.kube/config)")
	trustFlags(cmd, &o.trust)
	for name, values := range map[string][]string{"flow": {flowAuto, flowDevice, flowBrowser}} {
		if err := cmd.RegisterFlagCompletionFunc(name, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp)); err != nil {
			panic(err) // the lines above define it
		}
	}
	cmd.AddCommand(credentialCommand(cfg), fingerprintCommand(cfg))
	return cmd
}

func trustFlags(cmd *cobra.Command, o *trustOptions) {
	cmd.Flags().StringVar(&o.caFile, "ca-file", "", "PEM file of the authority of the supervisor's certificate")
	cmd.Flags().StringVar(&o.fingerprint, "fingerprint", "", "fingerprint of that authority, as \"atoll login fingerprint\" shows it on the host")
	cmd.Flags().BoolVar(&o.insecure, "insecure-skip-tls-verify", false, "do not check the supervisor's certificate")
}

func (c *commands) login(ctx context.Context, o options) error {
	switch {
	case o.server == "":
		return command.UsageError{Err: errors.New("--server is required: the address of the supervisor")}
	case o.user != "" && o.provider != "":
		return command.UsageError{Err: errors.New("--user is for local users and --provider for others; give one of them")}
	case o.flow != flowAuto && o.flow != flowDevice && o.flow != flowBrowser:
		return command.UsageError{Err: fmt.Errorf("--flow %q: use auto, device or browser", o.flow)}
	case o.trust.insecure && (o.trust.caFile != "" || o.trust.fingerprint != ""):
		return command.UsageError{Err: errors.New("--insecure-skip-tls-verify contradicts --ca-file and --fingerprint")}
	}
	server, err := parseServer(o.server)
	if err != nil {
		return command.UsageError{Err: err}
	}
	file, err := c.kubeconfigFile(o.kubeconfig)
	if err != nil {
		return err
	}
	how, err := c.trust(ctx, server, o.trust)
	if err != nil {
		return err
	}
	p, err := newPortal(server, how)
	if err != nil {
		return err
	}
	info, err := p.info(ctx)
	if err != nil {
		return err
	}
	if info.Banner != "" {
		c.Tell("%s\n", strings.TrimSpace(info.Banner))
	}
	l := cached{Server: server, Trust: how}
	if o.provider != "" {
		err = c.foreignLogin(ctx, p, info, o, &l)
	} else {
		err = c.localLogin(ctx, p, o, &l)
	}
	if err != nil {
		return err
	}
	return c.keep(ctx, p, info, l, file)
}

// localLogin logs in with a password, and has it changed when it must be.
func (c *commands) localLogin(ctx context.Context, p *portal, o options, l *cached) error {
	user := o.user
	var err error
	if user == "" {
		if c.Terminal() == nil {
			return command.UsageError{Err: errors.New("--user or --provider is required")}
		}
		if user, err = c.ask("User: "); err != nil {
			return err
		}
	}
	password, err := c.password("Password: ", o.passwordStdin)
	if err != nil {
		return err
	}
	session, err := p.session(ctx, user, password)
	if r, ok := errors.AsType[refusal](err); ok && r.Code == wire.CodeMustChange && c.Terminal() != nil {
		c.Tell("The password must be changed.\n")
		if password, err = c.newPassword(ctx, p, user, password); err != nil {
			return err
		}
		session, err = p.session(ctx, user, password)
	}
	if err != nil {
		return err
	}
	l.fill(session)
	return nil
}

// fill takes what a portal handed out.
func (l *cached) fill(s wire.Session) {
	l.User = strings.TrimPrefix(s.User, "sso:")
	l.Token, l.Expires, l.RefreshToken, l.SessionExpires = s.Token, s.Expires, s.RefreshToken, s.SessionExpires
}

// newPassword asks twice for another password and sets it.
func (c *commands) newPassword(ctx context.Context, p *portal, user, old string) (string, error) {
	wanted, err := c.password("New password: ", false)
	if err != nil {
		return "", err
	}
	again, err := c.password("New password again: ", false)
	if err != nil {
		return "", err
	}
	if wanted != again {
		return "", errors.New("the new passwords differ; nothing was changed")
	}
	return wanted, p.changePassword(ctx, user, old, wanted)
}

// foreignLogin logs in at an issuer and asks the supervisor whom it takes the token's owner for.
func (c *commands) foreignLogin(ctx context.Context, p *portal, info wire.Info, o options, l *cached) error {
	var known []string
	for _, issuer := range info.Providers {
		known = append(known, issuer.Name)
		if issuer.Name == o.provider {
			l.Issuer = &issuer
		}
	}
	if l.Issuer == nil {
		return fmt.Errorf("--provider %q: the supervisor has none of the name that works; it has: %s", o.provider, orNone(known))
	}
	got, err := foreign{issuer: *l.Issuer, portal: p}.login(ctx, c, o.flow, o.port)
	if err != nil {
		return err
	}
	if err := l.fillForeign(got); err != nil {
		return err
	}
	who, err := p.whoami(ctx, l.Token)
	if isStatus(err, 401) {
		return fmt.Errorf("%s let you in, but the supervisor does not take its token: the name in it may not be allowed, or the provider was only just set up; see: kubectl describe identityprovider %s",
			l.Issuer.Name, l.Issuer.Name)
	}
	if err != nil {
		return err
	}
	l.User = strings.TrimPrefix(who.User, "sso:")
	return nil
}

// fillForeign takes what an issuer handed out.
func (l *cached) fillForeign(t *oauth2.Token) error {
	raw, err := idToken(t)
	if err != nil {
		return err
	}
	said, err := claimsOf(raw)
	if err != nil {
		return err
	}
	l.Token, l.Expires = raw, time.Unix(said.Expires, 0).UTC()
	if t.RefreshToken != "" {
		l.RefreshToken = t.RefreshToken
	}
	return nil
}

func orNone(names []string) string {
	if len(names) == 0 {
		return "none"
	}
	return strings.Join(names, ", ")
}

// keep writes the login and the kubeconfig, and says what there is.
func (c *commands) keep(ctx context.Context, p *portal, info wire.Info, l cached, file string) error {
	all, err := p.namespaces(ctx, l.Token)
	if err != nil {
		return err
	}
	executable, err := os.Executable()
	if err != nil {
		return fmt.Errorf("finding this program: %w", err)
	}
	cache := c.cacheFile(l.Server, l.User)
	if err := save(cache, l); err != nil {
		return err
	}
	var contexts []string
	var current string
	err = changeKubeconfig(file, func(config *clientcmdapi.Config) {
		contexts = merge(config, entry{login: l, file: cache, apiServer: info.APIServer, ca: info.CA, namespaces: all, executable: executable})
		current = config.CurrentContext
	})
	if err != nil {
		return err
	}
	c.printLogin(l, all, contexts, current, file)
	return nil
}

func (c *commands) printLogin(l cached, all []identity.Access, contexts []string, current, file string) {
	c.Printf("Logged in as %s.\n\n", l.User)
	rows := [][]string{{"CONTEXT", "NAMESPACE", "ROLE"}, {contexts[0], "-", "-"}}
	for i, n := range all {
		rows = append(rows, []string{contexts[i+1], n.Namespace, n.Role})
	}
	c.Table(rows)
	c.Printf("\nThe current context in %s is %s. Change it with: kubectl config use-context NAME\n", file, current)
}

// ask reads a line.
func (c *commands) ask(prompt string) (string, error) {
	c.Tell("%s", prompt)
	return c.line()
}

func (c *commands) line() (string, error) {
	line, err := c.in.ReadString('\n')
	if err != nil && (line == "" || !errors.Is(err, io.EOF)) {
		return "", fmt.Errorf("reading from standard input: %w", err)
	}
	return strings.TrimRight(line, "\r\n"), nil
}

// password reads a password without showing it, or a line of standard input.
func (c *commands) password(prompt string, stdin bool) (string, error) {
	if stdin {
		return c.line()
	}
	f := c.Terminal()
	if f == nil {
		return "", command.UsageError{Err: errors.New("there is no terminal to ask for a password; use --password-stdin")}
	}
	c.Tell("%s", prompt)
	b, err := term.ReadPassword(int(f.Fd()))
	c.Tell("\n")
	if err != nil {
		return "", fmt.Errorf("reading the password: %w", err)
	}
	return string(b), nil
}
