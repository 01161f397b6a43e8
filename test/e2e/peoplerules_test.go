//go:build e2e

package e2e

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"regexp"
	"strings"
	"testing"
	"time"
)

// TestFirstAdministrator: the password that `atoll up` prints is good to log in with and to do what administrators do,
// and it is printed by the first start only.
func TestFirstAdministrator(t *testing.T) {
	const once = "This is the only time the password is shown"
	if again := host(t, "", "up", "--detach", "--timeout", "15m"); strings.Contains(again, once) || !strings.Contains(again, "Ready after") {
		t.Errorf("the second start prints: %s", again)
	}
	p := account(t, "administrator")
	if suite.own {
		m := regexp.MustCompile(`The first administrator is administrator@atoll\.local\. ` + once + `:\n  (\S+)\n`).FindStringSubmatch(suite.printed)
		if m == nil {
			t.Fatalf("the first start has printed: %s", suite.printed)
		}
		p.password = m[1]
	} else { // somebody else was told it
		_, made, _ := strings.Cut(host(t, "", "user", "reset-password", p.name), "(shown this once): ")
		p.password = p.changed(strings.TrimSpace(made))
	}
	p.login()
	equal(t, "namespaces", fmt.Sprint(p.can("delete", "namespaces", "-A")), "true")
	const name = "e2e-first-administrator"
	t.Cleanup(func() { _, _ = kubectl(context.Background(), "", "delete", "svns", name, "--ignore-not-found") })
	p.apply("default", fmt.Sprintf(`{"apiVersion": "atoll.dev/v1alpha1", "kind": "SupervisorNamespace", "metadata": {"name": %q}, "spec": {"resources": {"counts": {"podCount": 1}}}}`, name))
	p.kubectl("wait", "svns/"+name, "--for=condition=Ready", timeout(patience))
	p.kubectl("delete", "svns", name, timeout(patience))
}

// changed gives oneself another password, and returns it.
func (p *actor) changed(old string) string {
	p.t.Helper()
	now := "another " + old
	if out, err := p.passwd(old, now); err != nil {
		p.t.Fatal(err, out)
	}
	return now
}

func (p *actor) passwd(old, now string) (string, error) {
	return p.atoll(old+"\n"+now+"\n", "user", "passwd", "--server", portal(p.t), "--user", p.name, "--password-stdin", "--ca-file", portalCA(p.t))
}

// rewrite changes one entry of a Secret in atoll-system.
func rewrite(t *testing.T, secret, key, value string) {
	t.Helper()
	patch, err := json.Marshal(map[string]any{"data": map[string]string{key: base64.StdEncoding.EncodeToString([]byte(value))}})
	if err != nil {
		t.Fatal(err)
	}
	run(t, "", "-n", "atoll-system", "patch", "secret", secret, "--type=merge", "-p", string(patch))
}

// TestRulesForPeople: the rules of examples/people/identity-policy.yaml count at the next login: banner, length of
// sessions, length and age of passwords, when a user is locked. A session ends when its time is over.
func TestRulesForPeople(t *testing.T) {
	t.Cleanup(func() {
		if _, err := kubectl(context.Background(), "", "-n", "atoll-system", "delete", "configmap", "identity-policy", "--ignore-not-found"); err != nil {
			t.Error(err)
		}
	})
	run(t, example(t, "people/identity-policy.yaml"), "apply", "-f", "-")
	p := newActor(t, "e2e-rita")
	out, err := p.tryLogin(p.password)
	if err != nil || !strings.Contains(out, "For people of Example Corporation only.") {
		t.Errorf("%v: %s", err, out)
	}
	var who struct{ SessionExpires time.Time }
	if out, err := p.atoll("", "whoami", "-o", "json"); err != nil || json.Unmarshal([]byte(out), &who) != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if left := time.Until(who.SessionExpires); left < 11*time.Hour || left > 12*time.Hour {
		t.Errorf("a session lasts %s, the example says 12 hours", left)
	}
	if out, err := p.passwd(p.password, "fifteen letters"); err == nil || !strings.Contains(out, "use at least 16") {
		t.Errorf("a short password: %v %s", err, out)
	}
	for range 6 { // without the example the fifth locks
		if out, err := p.guess("wrong"); err == nil || !strings.Contains(out, "wrong user name or password") {
			t.Errorf("a wrong password: %v %s", err, out)
		}
	}
	p.login()

	rewrite(t, "user-"+p.name, "changed", time.Now().AddDate(0, 0, -181).UTC().Format(time.RFC3339))
	if out, err := p.tryLogin(p.password); err == nil || !strings.Contains(out, "must be changed") {
		t.Errorf("a password of 181 days: %v %s", err, out)
	}
	p.password = p.changed(p.password)
	p.login()
	p.kubectl("auth", "whoami")
	d := newDocker(t, p.name, p.token())
	if d.token() == "" {
		t.Error("the registry does not take the session")
	}

	for secret := range strings.FieldsSeq(run(t, "", "-n", "atoll-system", "get", "secrets", "-l", "atoll.dev/session="+p.name, "-o", "name")) {
		secret = strings.TrimPrefix(secret, "secret/")
		text, err := base64.StdEncoding.DecodeString(run(t, "", "-n", "atoll-system", "get", "secret", secret, "-o", "jsonpath={.data.session}"))
		if err != nil {
			t.Fatal(err)
		}
		var session map[string]any
		if err := json.Unmarshal(text, &session); err != nil || session["expires"] == nil {
			t.Fatalf("%v: %s", err, text)
		}
		session["expires"] = time.Now().Add(-time.Second)
		over, err := json.Marshal(session)
		if err != nil {
			t.Fatal(err)
		}
		rewrite(t, secret, "session", string(over))
	}
	eventually(t, "the session to end with its time", func() error { return loggedOut(p.try("", "auth", "whoami")) })
	if d.token() != "" {
		t.Error("the registry takes a session that is over")
	}
}
