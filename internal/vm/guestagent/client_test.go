package guestagent

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"reflect"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// agent is the guest's end: it answers as told.
type agent struct {
	conn    net.Conn
	answers map[string]string // by command; what is missing is not answered
	said    chan string       // every command but synchronisations
	deaf    bool              // answers no synchronisation
	lost    int               // of the first synchronisations
	late    time.Duration     // how long it takes over each
	slow    time.Duration     // how long it takes over everything else
	noise   string            // before every answer
}

func (a *agent) run() {
	in := bufio.NewReader(a.conn)
	for {
		line, err := in.ReadBytes('\n')
		if err != nil {
			return
		}
		var c struct {
			Execute   string `json:"execute"`
			Arguments struct {
				ID int64 `json:"id"`
			} `json:"arguments"`
		}
		if json.Unmarshal(bytes.TrimLeft(line, "\xff"), &c) != nil {
			continue
		}
		if c.Execute == "guest-sync-delimited" {
			if a.lost--; !a.deaf && a.lost < 0 {
				time.Sleep(a.late)
				fmt.Fprintf(a.conn, "%s\xff{\"return\": %d}\n", a.noise, c.Arguments.ID)
			}
			continue
		}
		a.said <- c.Execute
		time.Sleep(a.slow)
		if answer, ok := a.answers[c.Execute]; ok {
			fmt.Fprintln(a.conn, answer)
		}
	}
}

func serve(t *testing.T, a *agent) *Client {
	t.Helper()
	ours, theirs := net.Pipe()
	a.conn, a.said = theirs, make(chan string, 100)
	go a.run()
	c := New(ours)
	t.Cleanup(func() { _ = c.Close(); _ = theirs.Close() })
	return c
}

func short(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	t.Cleanup(cancel)
	return ctx
}

func TestAnswers(t *testing.T) {
	c := serve(t, &agent{noise: "{\"return\": 4}\n\xff{\"return\": 17}\nGarbage", answers: map[string]string{
		"guest-ping":            `{"return": {}}`,
		"guest-get-host-name":   `{"return": {"host-name": "web\u0000\u001b[31m-1"}}`,
		"guest-get-osinfo":      `{"return": {"id": "debian", "kernel-release": "6.1.0", "pretty-name": "` + strings.Repeat("x", 1000) + `"}}`,
		"guest-fsfreeze-status": `{"return": "frozen"}`,
		"guest-fsfreeze-freeze": `{"return": -3}`,
		"guest-fsfreeze-thaw":   `{"error": {"class": "GenericError", "desc": "no\nway"}}`,
	}})
	ctx := t.Context()
	if err := c.Ping(ctx); err != nil {
		t.Fatal(err)
	}
	if name, err := c.Hostname(ctx); err != nil || name != "web  [31m-1" {
		t.Errorf("%q, %v", name, err)
	}
	if o, err := c.OS(ctx); err != nil || o.ID != "debian" || o.Kernel != "6.1.0" || len(o.PrettyName) != maxText {
		t.Errorf("%+v, %v", o, err)
	}
	if frozen, err := c.Frozen(ctx); err != nil || !frozen {
		t.Errorf("%v, %v", frozen, err)
	}
	if n, err := c.Freeze(ctx); err != nil || n != 0 {
		t.Errorf("%d, %v", n, err)
	}
	var refused *Error
	if _, err := c.Thaw(ctx); !errors.As(err, &refused) || refused.Desc != "no way" {
		t.Errorf("%v", err)
	}
}

func TestInterfaces(t *testing.T) {
	c := serve(t, &agent{answers: map[string]string{
		"guest-network-get-interfaces": `{"return": [{"name": "lo", "ip-addresses": [{"ip-address": "127.0.0.1", "prefix": 8}]}, ` +
			`{"name": "eth0", "hardware-address": "52:54:00:12:34:56", "ip-addresses": [` +
			`{"ip-address": "10.0.0.2", "prefix": 24}, {"ip-address": "nonsense", "prefix": 24}, {"ip-address": "10.0.0.3", "prefix": 99}, ` +
			`{"ip-address": "fe80::1%eth0", "prefix": 64}]}, {"name": "odd", "hardware-address": "nothing"}]}`,
	}})
	got, err := c.Interfaces(t.Context())
	want := []Interface{
		{Name: "lo", Addresses: []string{"127.0.0.1/8"}},
		{Name: "eth0", MAC: "52:54:00:12:34:56", Addresses: []string{"10.0.0.2/24", "fe80::1/64"}},
		{Name: "odd"},
	}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, %v", got, err)
	}
}

// TestNoAgent: nothing but a synchronisation is sent while nothing answers, and nothing waits longer than asked.
func TestNoAgent(t *testing.T) {
	a := &agent{deaf: true}
	c := serve(t, a)
	for range 3 {
		if err := c.Shutdown(short(t), PowerDown); !errors.Is(err, ErrNoAgent) {
			t.Errorf("%v", err)
		}
	}
	if len(a.said) > 0 {
		t.Errorf("the agent was told %s", <-a.said)
	}
	ours, theirs := net.Pipe() // nobody reads
	defer theirs.Close()
	if err := New(ours).Ping(short(t)); !errors.Is(err, ErrNoAgent) {
		t.Errorf("%v", err)
	}
	if c.Answered() {
		t.Error("it says that it was answered")
	}
}

// TestLateAnswer: an answer that came too late is not taken for the next one's.
func TestLateAnswer(t *testing.T) {
	late := `{"return": {"host-name": "late"}}` + "\n"
	a := &agent{answers: map[string]string{"guest-get-host-name": `{"return": {"host-name": "a"}}`}, noise: late}
	c := serve(t, a)
	if err := c.Ping(short(t)); !errors.Is(err, ErrNoAgent) {
		t.Errorf("%v", err)
	}
	if name, err := c.Hostname(t.Context()); err != nil || name != "a" {
		t.Errorf("%q, %v", name, err)
	}
	if !c.Answered() {
		t.Error("it does not say that it was answered")
	}
}

// TestLostSynchronisation: what a guest that was reset has not read is sent again while somebody waits.
func TestLostSynchronisation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if err := serve(t, &agent{lost: 2, answers: map[string]string{"guest-ping": `{"return": {}}`}}).Ping(ctx); err != nil {
			t.Error(err)
		}
	})
}

// lazyConn takes its time over a deadline that has passed, as a busy host does.
type lazyConn struct{ net.Conn }

func (c lazyConn) SetDeadline(t time.Time) error {
	if !t.IsZero() && t.Before(time.Now()) {
		time.Sleep(30 * time.Second)
	}
	return c.Conn.SetDeadline(t)
}

// TestEndOfAnother: who has given up does not end the exchange of who comes next.
func TestEndOfAnother(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := serve(t, &agent{lost: 1, slow: 40 * time.Second, answers: map[string]string{"guest-ping": `{"return": {}}`}})
		c.conn = lazyConn{c.conn}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := c.Ping(ctx); !errors.Is(err, ErrNoAgent) {
			t.Errorf("%v", err)
		}
		if err := c.Ping(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

// TestSlowAgent: one that takes longer over each answer than anybody waits is heard all the same, sooner or later.
func TestSlowAgent(t *testing.T) {
	for _, late := range []time.Duration{8 * time.Second, 33 * time.Second} {
		t.Run(late.String(), func(t *testing.T) { slowAgent(t, late) })
	}
}

func slowAgent(t *testing.T, late time.Duration) {
	synctest.Test(t, func(t *testing.T) {
		c := serve(t, &agent{late: late, answers: map[string]string{"guest-ping": `{"return": {}}`}})
		for range 10 {
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			err := c.Ping(ctx)
			cancel()
			if err == nil {
				return
			}
			if !errors.Is(err, ErrNoAgent) {
				t.Fatal(err)
			}
			time.Sleep(5 * time.Second)
		}
		t.Error("it was never heard")
	})
}

func TestHostileAnswers(t *testing.T) {
	for name, answer := range map[string]string{
		"text":  "hello",
		"deep":  `{"return": ` + strings.Repeat("[", 1000) + strings.Repeat("]", 1000) + `}`,
		"long":  `{"return": "` + strings.Repeat("x", maxAnswer) + `"}`,
		"kind":  `{"return": [1]}`,
		"empty": `{}`,
	} {
		c := serve(t, &agent{answers: map[string]string{"guest-get-host-name": answer, "guest-ping": `{"return": {}}`}})
		if _, err := c.Hostname(t.Context()); !errors.Is(err, ErrAnswer) {
			t.Errorf("%s: %v", name, err)
		}
		if err := c.Ping(t.Context()); err != nil {
			t.Errorf("after %s: %v", name, err)
		}
	}
}

func TestExec(t *testing.T) {
	c := serve(t, &agent{answers: map[string]string{
		"guest-exec":        `{"return": {"pid": 7}}`,
		"guest-exec-status": fmt.Sprintf(`{"return": {"exited": true, "exitcode": 3, "out-data": %q}}`, base64.StdEncoding.EncodeToString([]byte("out"))),
	}})
	r, err := c.Exec(t.Context(), Command{Path: "/bin/sh", Args: []string{"-c", "exit 3"}, Stdin: []byte("in")})
	if err != nil || r.ExitCode != 3 || string(r.Stdout) != "out" || r.Truncated {
		t.Errorf("%+v, %v", r, err)
	}
	if _, err := c.Exec(t.Context(), Command{Path: "x", Stdin: make([]byte, MaxStdin+1)}); err == nil {
		t.Error("too much input was taken")
	}
	forever := serve(t, &agent{answers: map[string]string{"guest-exec": `{"return": {"pid": 7}}`, "guest-exec-status": `{"return": {"exited": false}}`}})
	if _, err := forever.Exec(short(t), Command{Path: "/bin/sleep"}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
}

// TestExecOfSilentAgent: an agent that ends while a command runs does not hold who waits for it.
func TestExecOfSilentAgent(t *testing.T) {
	for name, answers := range map[string]map[string]string{
		"at the start": {},
		"later":        {"guest-exec": `{"return": {"pid": 7}}`},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				if _, err := serve(t, &agent{answers: answers}).Exec(t.Context(), Command{Path: "/bin/sleep"}); !errors.Is(err, ErrNoAgent) {
					t.Errorf("%v", err)
				}
			})
		})
	}
}

func TestShutdown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &agent{}
		if err := serve(t, a).Shutdown(t.Context(), Reboot); err != nil || <-a.said != "guest-shutdown" {
			t.Errorf("%v", err)
		}
		refuses := &agent{answers: map[string]string{"guest-shutdown": `{"error": {"class": "GenericError", "desc": "no"}}`}}
		var refused *Error
		if err := serve(t, refuses).Shutdown(t.Context(), Reboot); !errors.As(err, &refused) {
			t.Errorf("%v", err)
		}
	})
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte(`{"return": [{"name": "eth0", "ip-addresses": [{"ip-address": "::1", "prefix": 128}]}]}`))
	f.Add([]byte(`{"error": {"desc": "\u0000\ud800"}}`))
	f.Add([]byte(`{"return": {"exited": true, "out-data": "AAAA"}}`))
	f.Fuzz(func(t *testing.T, line []byte) {
		var interfaces []interfaceAnswer
		var status execStatus
		for _, result := range []any{&interfaces, &status, nil} {
			err := decode("x", line, result)
			var refused *Error
			if errors.As(err, &refused) && (len(refused.Desc) > maxText || strings.ContainsAny(refused.Desc, "\n\x00\x1b")) {
				t.Errorf("%q", refused.Desc)
			}
		}
		status.result()
	})
}

// FuzzConversation: whatever a guest says, an exchange ends.
func FuzzConversation(f *testing.F) {
	f.Add([]byte("\xff{\"return\": 1}\n{\"return\": {}}\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		ours, theirs := net.Pipe()
		go func() {
			_, _ = bufio.NewReader(theirs).ReadBytes('\n')
			_, _ = theirs.Write(data)
			_ = theirs.Close()
		}()
		c := New(ours)
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		if err := c.Ping(ctx); err == nil && !bytes.Contains(data, []byte("return")) {
			t.Error("an answer out of nothing")
		}
		_ = c.Close()
	})
}
