package cli

import (
	"bytes"
	"encoding/json"
	"errors"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"

	"atoll.dev/atoll/internal/cli/command"
	"atoll.dev/atoll/internal/cli/up"
	"atoll.dev/atoll/internal/linux/process"
	"atoll.dev/atoll/internal/pool/wire"
	"atoll.dev/atoll/internal/supervise"
)

// testApp prints everything to one buffer.
func testApp(out *bytes.Buffer) *app {
	a := &app{version: "v0-test", App: command.App{In: strings.NewReader(""), Out: out, ErrOut: out}}
	a.Tree = a.tree
	return a
}

// runRoot runs a command line and returns what it printed.
func runRoot(args ...string) (string, error) {
	var out bytes.Buffer
	a := testApp(&out)
	root := a.root()
	root.SetArgs(args)
	err := root.Execute()
	return out.String(), err
}

// TestEveryCommandHasHelp: a short and a long enough text and an example.
func TestEveryCommandHasHelp(t *testing.T) {
	a := testApp(&bytes.Buffer{})
	var walk func(*cobra.Command)
	walk = func(c *cobra.Command) {
		builtIn := strings.Contains(c.CommandPath(), "completion") || c.Name() == "help"
		if !builtIn && (c.Short == "" || !strings.Contains(c.Example, "atoll ")) {
			t.Errorf("%q has no description or no example", c.CommandPath())
		}
		for _, sub := range c.Commands() {
			walk(sub)
		}
	}
	walk(a.root())
}

func TestWrongUsage(t *testing.T) {
	tests := []struct {
		args string
		want []string
	}{
		{"upp", []string{`unknown command "upp"`, "did you mean up", "commands of", "down"}},
		{"up --poolsize 3", []string{"unknown flag: --poolsize", "--pool-size"}},
		{"up now", []string{`takes no arguments, got "now"`}},
		{"up --pool-size many", []string{"invalid argument"}},
		{"up --pool-size 99 --data-dir /nonexistent/x", []string{"--pool-size 99: use 0 to 64"}},
		{"logs", []string{"wants <service>"}},
		{"status -o xml", []string{`--output "xml"`, "json"}},
		{"image lod", []string{`unknown command "lod"`, "load"}},
		{"image load", []string{"at least one archive"}},
		{"image build x", []string{"say where the image goes"}},
		{"status --data-dir relative", []string{"--data-dir", "absolute"}},
		{"server", []string{"--node-name and --node-ip are required"}},
		{"down --log-format xml", []string{`--log-format "xml": use text or json`}},
	}
	for _, tt := range tests {
		_, err := runRoot(strings.Fields(tt.args)...)
		if _, usage := errors.AsType[command.UsageError](err); !usage {
			t.Errorf("atoll %s: %v is not a usage error", tt.args, err)
			continue
		}
		for _, want := range tt.want {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("atoll %s: %q does not say %q", tt.args, err, want)
			}
		}
	}
}

func TestVersion(t *testing.T) {
	out, err := runRoot("version", "-o", "json")
	if err != nil {
		t.Fatal(err)
	}
	var v versions
	if err := json.Unmarshal([]byte(out), &v); err != nil || v.Atoll != "v0-test" || v.Go == "" {
		t.Errorf("version = %+v, %v", v, err)
	}
}

func TestStatusOfNothing(t *testing.T) {
	_, err := runRoot("status", "--data-dir", filepath.Join(t.TempDir(), "none"))
	if !errors.Is(err, up.ErrNotRunning) {
		t.Errorf("status = %v", err)
	}
}

func TestTakeDataDir(t *testing.T) {
	tests := []struct{ in, dir, rest string }{
		{"get pods", "", "get pods"},
		{"--data-dir /d get pods", "/d", "get pods"},
		{"get --data-dir=/d pods", "/d", "get pods"},
		{"exec p -- cmd --data-dir=/x", "", "exec p -- cmd --data-dir=/x"},
		{"get --data-dir", "", "get --data-dir"},
	}
	for _, tt := range tests {
		dir, rest := takeDataDir(strings.Fields(tt.in))
		if dir != tt.dir || strings.Join(rest, " ") != tt.rest {
			t.Errorf("takeDataDir(%s) = %q, %q", tt.in, dir, rest)
		}
	}
}

func TestPrintStatus(t *testing.T) {
	var out bytes.Buffer
	a := testApp(&out)
	service := func(name string, state supervise.State, problem string) up.Service {
		return up.Service{Memory: process.Memory{RSS: 300 << 20, PSS: 100 << 20, Anon: 40 << 20}, Status: supervise.Status{
			Name: name, State: state, PID: 7, Started: time.Now().Add(-3 * time.Hour), Error: problem, LogFile: "/logs/" + name,
		}}
	}
	a.printStatus(up.Report{
		Version: "v1", Services: []up.Service{service("server", supervise.Ready, ""), service("agent", supervise.Backoff, "exit status 1")},
		Node: up.Node{Name: "n1", Message: "no network"}, Pool: &wire.Status{Ready: 3, Wanted: 4, Accelerator: "tcg", Reason: "no /dev/kvm"},
	}, true)
	for _, want := range []string{"server", "3h0m", "200 MiB", "80 MiB", "not ready: no network", "3 of 4 micro-VMs ready", "tcg (no /dev/kvm)", "agent: exit status 1 (log: /logs/agent)"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("status does not say %q:\n%s", want, out.String())
		}
	}
	now := time.Now()
	bad := &wire.Status{Error: "no memory", FailuresInARow: 7, RetryAt: now.Add(time.Minute), LastFailure: "no memory", LastFailureAt: now}
	good := &wire.Status{LastFailure: "no memory", LastFailureAt: now.Add(-3 * time.Hour)}
	for _, c := range []struct {
		status *wire.Status
		want   []string
	}{
		{nil, nil},
		{&wire.Status{}, nil},
		{bad, []string{"no memory (7 failures in a row, the next attempt is in 1m0s)", "atoll preflight", "atoll logs pool"}},
		{good, []string{"last failure was 3h0m ago: no memory", "atoll logs pool"}},
	} {
		got := poolProblem(c.status, now)
		if c.want == nil && got != "" {
			t.Errorf("poolProblem(%+v) = %q", c.status, got)
		}
		for _, want := range c.want {
			if !strings.Contains(got, want) {
				t.Errorf("poolProblem(%+v) = %q does not say %q", c.status, got, want)
			}
		}
	}
	if got := poolLine(nil); got != "does not answer" {
		t.Errorf("poolLine(nil) = %q", got)
	}
}
