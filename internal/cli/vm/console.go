package vm

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	subresources "atoll.dev/atoll/api/subresources/v1alpha1"
	"atoll.dev/atoll/internal/cli/command"
)

// escape ends a console: Ctrl-].
const escape = 0x1d

func (c *commands) consoleCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "console <name>",
		Short: "Use the serial console of a virtual machine",
		Long: `Connects the terminal with the first serial port. What it printed last comes first. Ctrl-] ends it, and leaves the guest
as it is: log out before. Without a terminal it copies standard input to the console and prints what that says.`,
		Example:           `  atoll vm console box`,
		Args:              command.ExactArgs("name"),
		ValidArgsFunction: c.completeMachines(false),
		RunE: c.with(func(s *session, cmd *cobra.Command, args []string) error {
			if _, err := s.running(cmd.Context(), args[0]); err != nil {
				return err
			}
			stream, err := s.stream(cmd.Context(), args[0], subresources.Console)
			if err != nil {
				return err
			}
			defer stream.Close() //nolint:errcheck // it is read to its end, or not wanted any more
			return c.serial(cmd.Context(), args[0], stream)
		}),
	}
}

// serial connects the terminal with a stream until one of them ends.
func (c *commands) serial(ctx context.Context, name string, stream io.ReadWriteCloser) error {
	if tty := c.Terminal(); tty != nil {
		c.Tell("Connected to %s. Escape character is ^] (Ctrl-]).\n", name)
		before, err := term.MakeRaw(int(tty.Fd()))
		if err != nil {
			return fmt.Errorf("setting up the terminal: %w", err)
		}
		defer func() {
			_ = term.Restore(int(tty.Fd()), before)
			c.Tell("\nDisconnected from %s.\n", name)
		}()
	}
	ended := make(chan error, 2)
	go func() {
		_, err := io.Copy(c.Out, stream)
		ended <- err
	}()
	go func() {
		over, err := copyInput(stream, c.In, c.Terminal() != nil)
		if over || err != nil {
			ended <- err
		}
	}()
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
		return nil
	}
}

// copyInput copies what is typed. It tells whether the escape character was; the end of the input is none, since the
// answer is still to come.
func copyInput(to io.Writer, from io.Reader, escapes bool) (bool, error) {
	buf := make([]byte, 4096)
	for {
		n, err := from.Read(buf)
		data := buf[:n]
		at := -1
		if escapes {
			at = bytes.IndexByte(data, escape)
		}
		if at >= 0 {
			data = data[:at]
		}
		if len(data) > 0 {
			if _, err := to.Write(data); err != nil {
				return false, err
			}
		}
		if at >= 0 {
			return true, nil
		}
		if errors.Is(err, io.EOF) {
			return false, nil
		}
		if err != nil {
			return false, err
		}
	}
}

func (c *commands) vncCommand() *cobra.Command {
	var port int
	var viewer string
	var proxy bool
	cmd := &cobra.Command{
		Use:   "vnc <name>",
		Short: "Use the screen of a virtual machine",
		Long: `Makes the screen a VNC server on a port of 127.0.0.1, for as long as the command runs, and starts a viewer when there is
one. Everybody on this host can connect to the port in that time. A browser can use a VirtualMachineWebConsoleRequest.`,
		Example: `  atoll vm vnc box
  atoll vm vnc box --proxy-only --port 5999`,
		Args:              command.ExactArgs("name"),
		ValidArgsFunction: c.completeMachines(false),
		RunE: c.with(func(s *session, cmd *cobra.Command, args []string) error {
			if _, err := s.running(cmd.Context(), args[0]); err != nil {
				return err
			}
			if proxy {
				viewer = ""
			} else if viewer == "" {
				viewer = c.findViewer()
			}
			return c.screen(cmd.Context(), s, args[0], port, viewer)
		}),
	}
	cmd.Flags().IntVar(&port, "port", 0, "port of 127.0.0.1 (default: any)")
	cmd.Flags().StringVar(&viewer, "viewer", "", "program that is started with the address (default: one of "+strings.Join(viewers(), ", ")+")")
	cmd.Flags().BoolVar(&proxy, "proxy-only", false, "start no viewer")
	return cmd
}

func viewers() []string { return []string{"remote-viewer", "vncviewer", "gvncviewer", "vinagre"} }

// findViewer is a viewer that can show something here, or "".
func (c *commands) findViewer() string {
	if cmp.Or(c.Getenv("DISPLAY"), c.Getenv("WAYLAND_DISPLAY")) == "" {
		return ""
	}
	for _, v := range viewers() {
		if path, err := exec.LookPath(v); err == nil {
			return path
		}
	}
	return ""
}

// screen serves the screen of a virtual machine until the viewer or ctx ends.
func (c *commands) screen(ctx context.Context, s *session, name string, port int, viewer string) error {
	listener, err := (&net.ListenConfig{}).Listen(ctx, "tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
	if err != nil {
		return fmt.Errorf("--port %d: %w", port, err)
	}
	ctx, cancel := context.WithCancel(ctx)
	var connections sync.WaitGroup
	defer connections.Wait()
	defer cancel()
	context.AfterFunc(ctx, func() { _ = listener.Close() })
	address := listener.Addr().(*net.TCPAddr)
	c.Printf("the screen of %s is at %s (VNC)\n", name, address)
	connections.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			connections.Go(func() { c.show(ctx, s, name, conn) })
		}
	})
	if viewer == "" {
		c.Tell("connect a VNC viewer to it; Ctrl-C ends this\n")
		<-ctx.Done()
		return nil
	}
	target := fmt.Sprintf("127.0.0.1::%d", address.Port)
	if base := filepath.Base(viewer); base == "remote-viewer" || base == "vinagre" {
		target = fmt.Sprintf("vnc://127.0.0.1:%d", address.Port)
	}
	run := exec.CommandContext(ctx, viewer, target)
	run.Stderr = c.ErrOut
	if err := run.Run(); err != nil && ctx.Err() == nil {
		return fmt.Errorf("running %s: %w", viewer, err)
	}
	return nil
}

// show connects one viewer.
func (c *commands) show(ctx context.Context, s *session, name string, conn net.Conn) {
	defer conn.Close() //nolint:errcheck // nothing is buffered
	stream, err := s.stream(ctx, name, subresources.VNC)
	if err != nil {
		c.Tell("%s: %v\n", name, err)
		return
	}
	defer stream.Close() //nolint:errcheck // nothing is buffered
	ended := make(chan error, 2)
	go func() {
		_, err := io.Copy(conn, stream)
		ended <- err
	}()
	go func() {
		_, err := io.Copy(stream, conn)
		ended <- err
	}()
	select {
	case <-ended:
	case <-ctx.Done():
	}
}

func (c *commands) sshCommand() *cobra.Command {
	var user, identity string
	var port int
	var w waiting
	cmd := &cobra.Command{
		Use:   "ssh <name> [-- command...]",
		Short: "Log in to a virtual machine",
		Long: `Runs the ssh client of this host through a forwarded port, so that the machine's address need not be reachable from
here. Its host key is kept in ~/.atoll/known_hosts under the machine's uid.`,
		Example: `  atoll vm ssh box
  atoll vm ssh box -- uptime
  atoll vm ssh box --user debian`,
		Args: func(cmd *cobra.Command, args []string) error {
			if at := cmd.ArgsLenAtDash(); len(args) == 0 || at == 0 || at < 0 && len(args) > 1 || at > 1 {
				return command.UsageError{Err: fmt.Errorf("%q wants <name>, and a command only after --; see %q", cmd.CommandPath(), cmd.CommandPath()+" --help")}
			}
			return nil
		},
		ValidArgsFunction: c.completeMachines(false),
		RunE: c.with(func(s *session, cmd *cobra.Command, args []string) error {
			return c.ssh(cmd.Context(), s, args[0], login{user: user, identity: identity, port: port, command: args[1:]}, w)
		}),
	}
	cmd.Flags().StringVar(&user, "user", "", "who logs in (default: the one that `atoll vm create` made, else root)")
	cmd.Flags().StringVarP(&identity, "identity", "i", "", "file with the private key")
	cmd.Flags().IntVar(&port, "port", 22, "port of its sshd")
	w.add(cmd, "its sshd answers")
	return cmd
}

// login is how to log in.
type login struct {
	user, identity string
	port           int
	command        []string
}

func (c *commands) ssh(ctx context.Context, s *session, name string, l login, w waiting) error {
	vm, err := s.running(ctx, name)
	if err != nil {
		return err
	}
	client, err := exec.LookPath("ssh")
	if err != nil {
		return fmt.Errorf("no ssh client is installed on this host: %w", err)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	port := 0
	if w.no {
		port, err = s.forward(ctx, name, l.port, io.Discard)
	} else {
		err = c.await(ctx, name, w, func(look context.Context) (bool, string, error) {
			// The look's context ends when the wait does, the forwarded port's with the command.
			port, err = s.sshd(ctx, look, name, l.port)
			if _, final := errors.AsType[refusedError](err); final {
				return false, "", err
			}
			return err == nil, fmt.Sprintf("its sshd does not answer yet at port %d", l.port), nil
		})
	}
	if err != nil {
		return err
	}
	known := filepath.Join(filepath.Dir(c.ownKey()), "known_hosts")
	if err := os.MkdirAll(filepath.Dir(known), 0o700); err != nil {
		return err
	}
	args := []string{
		"-p", strconv.Itoa(port), "-l", cmp.Or(l.user, vm.Annotations[userAnnotation], "root"),
		"-o", "HostKeyAlias=atoll-vm-" + string(vm.UID), "-o", "UserKnownHostsFile=" + known, "-o", "StrictHostKeyChecking=accept-new",
		"-o", "LogLevel=ERROR",
	}
	if l.identity != "" {
		args = append(args, "-i", l.identity)
	} else if _, err := os.Stat(c.ownKey()); err == nil {
		args = append(args, "-i", c.ownKey())
	}
	run := exec.CommandContext(ctx, client, slices.Concat(args, []string{"127.0.0.1"}, l.command)...)
	run.Stdin, run.Stdout, run.Stderr = c.In, c.Out, c.ErrOut
	err = run.Run()
	if _, exited := errors.AsType[*exec.ExitError](err); exited {
		return command.SilentError{Err: fmt.Errorf("ssh: %w", err)}
	}
	return err
}

// sshd forwards the port of an ssh server that answers. A forwarded port breaks when nothing listens behind it, so
// each look makes a new one.
func (s *session) sshd(ctx, look context.Context, name string, remote int) (int, error) {
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(look, cancel)
	port, err := s.forward(ctx, name, remote, io.Discard)
	if err == nil {
		err = greets(look, port)
	}
	if !stop() && err == nil {
		err = look.Err()
	}
	if err != nil {
		cancel()
		return 0, err
	}
	context.AfterFunc(ctx, cancel) // the port lives as long as the command
	return port, nil
}

// greets tells whether an ssh server answers at a port of this host.
func greets(ctx context.Context, port int) error {
	ctx, cancel := context.WithTimeout(ctx, 10*lookEvery)
	defer cancel()
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
	if err != nil {
		return err
	}
	defer conn.Close() //nolint:errcheck // nothing was written
	context.AfterFunc(ctx, func() { _ = conn.Close() })
	greeting := make([]byte, 4)
	if _, err := io.ReadFull(conn, greeting); err != nil {
		return err
	}
	if string(greeting) != "SSH-" {
		return fmt.Errorf("port %d is not of an ssh server", port)
	}
	return nil
}
