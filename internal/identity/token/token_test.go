package token

import (
	"strings"
	"testing"
	"time"
)

func signer(t testing.TB) *Signer {
	t.Helper()
	s, err := NewSigner(NewKey())
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestTokens(t *testing.T) {
	s, now := signer(t), time.Now()
	text, err := s.Sign(Claims{Subject: "sso:a@atoll.local", ID: NewID(), Use: Access, IssuedAt: now.Unix(), Expires: now.Add(time.Minute).Unix()})
	if err != nil {
		t.Fatal(err)
	}
	if !Looks(text) || !Ours(text) {
		t.Errorf("%q does not look like one", text)
	}
	c, err := s.Verify(text, Access, now)
	if err != nil || c.Subject != "sso:a@atoll.local" || c.Issuer != Issuer {
		t.Errorf("%+v, %v", c, err)
	}
	head, rest, _ := strings.Cut(text, ".")
	payload, mac, _ := strings.Cut(rest, ".")
	for name, bad := range map[string]string{
		"empty": "", "no signature": head + "." + payload + ".", "two parts": head + "." + payload,
		"none":          "eyJhbGciOiJub25lIiwidHlwIjoiSldUIn0." + payload + ".",
		"another head":  "eyJhbGciOiJIUzUxMiJ9." + payload + "." + mac,
		"cut":           text[:len(text)-1],
		"longer":        text + "A",
		"padded":        text + "=",
		"upper payload": head + "." + strings.ToUpper(payload) + "." + mac,
		"huge":          text + strings.Repeat("A", maxSize),
	} {
		if _, err := s.Verify(bad, Access, now); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	if _, err := s.Verify(text, Refresh, now); err == nil {
		t.Error("an access token refreshes")
	}
	for _, at := range []time.Duration{time.Minute, time.Hour, -2 * time.Minute} {
		if _, err := s.Verify(text, Access, now.Add(at)); err == nil {
			t.Errorf("accepted at %s", at)
		}
	}
	if _, err := signer(t).Verify(text, Access, now); err == nil {
		t.Error("another key takes it")
	}
	if Digest("a") == Digest("b") || len(Digest("a")) != 32 {
		t.Error("digests")
	}
}

func FuzzVerify(f *testing.F) {
	s := signer(f)
	good, err := s.Sign(Claims{ID: "x", Use: Access, Expires: 1 << 40})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add("eyJ.eyJ.x")
	f.Add(header + "..")
	f.Fuzz(func(t *testing.T, text string) {
		if _, err := s.Verify(text, Access, time.Unix(1<<30, 0)); err == nil && text != good {
			t.Errorf("accepted %q", text)
		}
	})
}
