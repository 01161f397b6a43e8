package registry

import (
	"bytes"
	"log/slog"
	"net/http"
	"strings"
	"testing"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
)

// TestPeopleAreAskedForAtEachRequest: a token does not outlive the session of its owner, nor the membership of a group.
func TestPeopleAreAskedForAtEachRequest(t *testing.T) {
	h := start(t)
	h.push("shop/web:1", h.image(16, 1), h.as("olga"))
	h.may("people", "shop", "get")
	tokens := map[string]string{}
	for _, who := range []string{"olga", "stranger"} {
		_, tokens[who] = h.token(who, passwords()[who], "repository:shop/web:pull")
	}
	read := func(who, path string) int {
		status, _, _ := h.do(http.MethodGet, path, tokens[who], nil, nil)
		return status
	}
	for _, who := range []string{"olga", "stranger"} {
		if got := read(who, "/v2/shop/web/tags/list"); got != http.StatusOK {
			t.Fatalf("%s: %d", who, got)
		}
	}
	h.change(func() { h.groups["stranger"] = nil })
	if got := read("stranger", "/v2/shop/web/tags/list"); got != http.StatusForbidden {
		t.Errorf("out of the group: %d", got)
	}
	h.change(func() { h.ended["olga"] = true })
	for _, path := range []string{"/v2/shop/web/tags/list", "/v2/", "/v2/_catalog"} {
		if got := read("olga", path); got != http.StatusUnauthorized {
			t.Errorf("%s after the session has ended: %d", path, got)
		}
	}
}

// TestNamesOfNobodyAreNotLogged: people type passwords where a name belongs.
func TestNamesOfNobodyAreNotLogged(t *testing.T) {
	var log bytes.Buffer
	h := start(t, func(c *Config) { c.Logger = slog.New(slog.NewTextHandler(&log, nil)) })
	for name, logged := range map[string]bool{
		"olga": true, "my-Secret-Passphrase": false, "robot$shop+gone": true, "robot$my-Secret Passphrase+x": false,
		"robot$my-Secret": false, atoll.RobotPrefix + "shop+" + strings.Repeat("x", 200): false,
	} {
		log.Reset()
		if status, _ := h.token(name, "wrong"); status != http.StatusUnauthorized {
			t.Errorf("%s: %d", name, status)
		}
		text := log.String()
		if !strings.Contains(text, "registry login refused") || strings.Contains(text, name) != logged {
			t.Errorf("%s: logged %q", name, text)
		}
	}
}
