//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"
)

// How long is waited at the most, which costs nothing where things go well. Hosts that emulate guests are slow, and starve
// with several of them at once.
const (
	patience      = 8 * time.Minute  // for a condition
	longPatience  = 10 * time.Minute // for what takes several steps, as deletions do
	crowdPatience = 12 * time.Minute // for many guests or containers together
)

// timeout is the flag of kubectl for it.
func timeout(limit time.Duration) string { return "--timeout=" + limit.String() }

// namespace is a test's own corner of the cluster.
type namespace struct {
	t    *testing.T
	name string
}

// newNamespace makes a namespace that goes with the test. Labels are name=value.
func newNamespace(t *testing.T, labels ...string) *namespace {
	t.Helper()
	name := strings.ToLower(strings.NewReplacer("_", "-", "/", "-").Replace(strings.TrimPrefix(t.Name(), "Test")))
	if len(name) > 50 {
		name = name[:50]
	}
	n := &namespace{t: t, name: name}
	run(t, "", "create", "namespace", name)
	t.Cleanup(func() {
		if t.Failed() {
			n.describe()
		}
		out, err := kubectl(context.Background(), "", "delete", "namespace", name, "--wait=true", timeout(longPatience))
		if err != nil {
			t.Errorf("deleting the namespace: %v\n%s", err, out)
		}
	})
	if len(labels) > 0 {
		run(t, "", append([]string{"label", "namespace", name}, labels...)...)
	}
	n.account()
	return n
}

// account waits for what each pod runs as.
func (n *namespace) account() {
	n.t.Helper()
	eventually(n.t, "default service account", func() error {
		_, err := n.try("get", "serviceaccount", "default")
		return err
	})
}

// kubectl runs one command and returns both outputs together. What etcd has given up for a host without time, and may be
// said twice, is said again, as a person would.
func kubectl(ctx context.Context, stdin string, args ...string) (out string, err error) {
	for range 5 {
		if out, err = kubectlOnce(ctx, stdin, args...); err == nil || !strings.Contains(err.Error(), "etcdserver: request timed out") ||
			!slices.ContainsFunc(args, func(a string) bool {
				return slices.Contains([]string{"get", "apply", "patch", "label", "annotate", "wait"}, a)
			}) {
			break
		}
	}
	return out, err
}

func kubectlOnce(ctx context.Context, stdin string, args ...string) (string, error) {
	var out string
	var err error
	if isLook(args) && stdin == "" {
		out, err = look(args)
	} else {
		cmd := kubectlCommand(ctx, args...)
		cmd.Stdin = strings.NewReader(stdin)
		var text []byte
		text, err = cmd.CombinedOutput()
		out = string(text)
	}
	if err != nil {
		err = fmt.Errorf("kubectl %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(out))
	}
	return out, err
}

func kubectlCommand(ctx context.Context, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, suite.atoll, append([]string{"kubectl", "--kubeconfig", suite.dataDir + "/admin.kubeconfig"}, args...)...)
}

// run is kubectl for commands that must succeed.
func run(t *testing.T, stdin string, args ...string) string {
	t.Helper()
	out, err := kubectl(t.Context(), stdin, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func (n *namespace) kubectl(args ...string) string {
	n.t.Helper()
	return run(n.t, "", append([]string{"-n", n.name}, args...)...)
}

// try is kubectl for commands that may fail.
func (n *namespace) try(args ...string) (string, error) {
	return kubectl(n.t.Context(), "", append([]string{"-n", n.name}, args...)...)
}

func (n *namespace) apply(yaml string) {
	n.t.Helper()
	run(n.t, yaml, "-n", n.name, "apply", "-f", "-")
}

// tryApply is apply for what may not be taken.
func (n *namespace) tryApply(yaml string) (string, error) {
	return kubectl(n.t.Context(), yaml, "-n", n.name, "apply", "-f", "-")
}

// refused applies what must be refused and returns the message.
func (n *namespace) refused(yaml string) string {
	n.t.Helper()
	out, err := n.tryApply(yaml)
	if err == nil {
		n.t.Fatalf("accepted, but should have been refused:\n%s", yaml)
	}
	return out
}

// exec runs a command in a pod and returns its output.
func (n *namespace) exec(pod string, command ...string) string {
	n.t.Helper()
	out, err := n.delivered(pod, command...)
	if err != nil {
		n.t.Fatal(err)
	}
	return out
}

// delivered is exec for commands that may fail, or end what they run in. What did not get to the pod, or to the guest agent of
// a machine, is sent again.
func (n *namespace) delivered(pod string, command ...string) (out string, err error) {
	n.t.Helper()
	eventually(n.t, "a command to get to "+pod, func() error {
		out, err = n.try(append([]string{"exec", pod, "--"}, command...)...)
		if undelivered(out) {
			return err
		}
		return nil
	})
	return out, err
}

// undelivered tells by what an exec has said that its command did not get to where it was to run.
func undelivered(out string) bool {
	return slices.ContainsFunc([]string{
		"has answered before and does not now", "no guest agent answers in the machine", "error dialing backend", "etcdserver: request timed out",
	}, func(text string) bool { return strings.Contains(out, text) })
}

// field reads one JSONPath of an object.
func (n *namespace) field(object, path string) string {
	n.t.Helper()
	return n.kubectl("get", object, "-o", "jsonpath={"+path+"}")
}

// tryField is field for a look that is taken again: the object may not be there yet, or the API server away.
func (n *namespace) tryField(object, path string) (string, error) {
	return n.try("get", object, "-o", "jsonpath={"+path+"}")
}

// fieldIs is nil once a field is what is wanted.
func (n *namespace) fieldIs(object, path, want string) error {
	got, err := n.tryField(object, path)
	return errors.Join(err, is(got, want))
}

// lists is nil once kubectl get prints what is wanted.
func (n *namespace) lists(want string, args ...string) error {
	got, err := n.try(append([]string{"get"}, args...)...)
	return errors.Join(err, is(got, want))
}

// tryExec is exec for commands that may fail, and without what kubectl itself has to say.
func (n *namespace) tryExec(pod string, command ...string) (string, error) {
	var stderr strings.Builder
	cmd := kubectlCommand(n.t.Context(), append([]string{"-n", n.name, "exec", pod, "--"}, command...)...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("exec in %s: %w: %s", pod, err, stderr.String())
	}
	return string(out), err
}

// execIs is nil once a command in a pod prints what is wanted.
func (n *namespace) execIs(pod, want string, command ...string) error {
	got, err := n.tryExec(pod, command...)
	return errors.Join(err, is(got, want))
}

// time reads a field that is a time.
func (n *namespace) time(object, path string) time.Time {
	n.t.Helper()
	when, err := time.Parse(time.RFC3339, n.field(object, path))
	if err != nil {
		n.t.Fatal(err)
	}
	return when
}

// ready waits until the pod is Ready.
func (n *namespace) ready(pod string) {
	n.t.Helper()
	n.kubectl("wait", "--for=condition=Ready", "pod/"+pod, timeout(patience))
}

// ended waits until the pod has succeeded or failed and returns its phase.
func (n *namespace) ended(pod string) string {
	n.t.Helper()
	var phase string
	eventually(n.t, "end of pod "+pod, func() error {
		var err error
		phase, err = n.tryField("pod/"+pod, ".status.phase")
		if err == nil && phase != "Succeeded" && phase != "Failed" {
			err = fmt.Errorf("phase is %s", phase)
		}
		return err
	})
	return phase
}

// waiting waits until the first container waits for a reason and returns the message.
func (n *namespace) waiting(pod string, reasons ...string) string {
	n.t.Helper()
	var message string
	eventually(n.t, strings.Join(reasons, " or ")+" of pod "+pod, func() error {
		got, err := n.tryField("pod/"+pod, ".status.containerStatuses[0].state.waiting['reason','message']")
		reason, text, _ := strings.Cut(got, " ")
		message = text
		if !slices.Contains(reasons, reason) {
			return fmt.Errorf("the reason is %q, the message %q", reason, message)
		}
		return err
	})
	return message
}

// describe prints what a person would look at after a failure.
func (n *namespace) describe() {
	for _, args := range [][]string{
		{"get", "pods", "-o", "wide"},
		{"describe", "pods"},
		{"get", "events", "--sort-by=.lastTimestamp"},
		{"logs", "-l", "vmoperator.vmware.com/vm-name", "--tail=30", "--prefix"},
	} {
		out, _ := kubectl(context.Background(), "", append([]string{"-n", n.name}, args...)...)
		n.t.Logf("kubectl %s\n%s", strings.Join(args, " "), out)
	}
}

// How often a condition is looked at: less often the longer it takes, since each kubectl takes a tenth of a second of a
// processor from what is waited for.
const (
	lookFirst = 300 * time.Millisecond
	lookMost  = 2 * time.Second
)

// eventually waits for a condition, never for time.
func eventually(t *testing.T, what string, check func() error) {
	t.Helper()
	begin := time.Now()
	for {
		err := check()
		if err == nil {
			return
		}
		waited := time.Since(begin)
		if waited > patience {
			t.Fatalf("waiting for %s: %v", what, err)
		}
		select {
		case <-t.Context().Done():
			t.Fatalf("waiting for %s: %v", what, err)
		case <-time.After(min(max(waited/8, lookFirst), lookMost)):
		}
	}
}

func contains(t *testing.T, got, want string) {
	t.Helper()
	if !strings.Contains(got, want) {
		t.Fatalf("want %q in:\n%s", want, got)
	}
}

func equal(t *testing.T, what, got, want string) {
	t.Helper()
	if strings.TrimSpace(got) != strings.TrimSpace(want) {
		t.Fatalf("%s: got %q, want %q", what, got, want)
	}
}

// feed runs a kubectl command with a stream as its input.
func feed(t *testing.T, in io.Reader, args ...string) string {
	t.Helper()
	cmd := kubectlCommand(t.Context(), args...)
	cmd.Stdin = in
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		t.Fatalf("kubectl %s: %v: %s", strings.Join(args, " "), err, stderr.String())
	}
	return stdout.String()
}
