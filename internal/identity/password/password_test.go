package password

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"
)

func TestCheck(t *testing.T) {
	for _, tt := range []struct{ user, password, want string }{
		{"anna", "correct horse battery", ""},
		{"anna", "pässwörter sind lang", ""},
		{"anna", "short", "at least 12"},
		{"anna", strings.Repeat("abcdefgh", 10), "at most 72"},
		{"anna", "my name is Anna!!", "name of the user"},
		{"anna", "aaaaaaaaaaaaaaaa", "different characters"},
		{"anna", "with a \x00 in it...", "control"},
		{"anna", "not utf8 \xff\xff\xff\xff", "UTF-8"},
	} {
		err := Policy{}.Check(tt.user, tt.password)
		if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%q: %v, want %q", tt.password, err, tt.want)
		}
	}
	if err := (Policy{MinLength: 1}).Check("a", "1234567"); err == nil {
		t.Error("a policy allows seven characters")
	}
}

func TestGenerate(t *testing.T) {
	one, err := Generate()
	if err != nil {
		t.Fatal(err)
	}
	two, _ := Generate()
	if one == two || len(one) != 23 || (Policy{}).Check("administrator", one) != nil {
		t.Errorf("%q, %q", one, two)
	}
}

func TestMatches(t *testing.T) {
	c, err := NewComparer(1)
	if err != nil {
		t.Fatal(err)
	}
	long := strings.Repeat("x", MaxBytes)
	hash, err := Hash(long)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		hash, password string
		want           bool
	}{
		{hash, long, true},
		{hash, long + "y", false},
		{hash, long[1:], false},
		{hash, "", false},
		{"", "anything", false},
		{"", "", false},
		{"damaged", "anything", false},
	} {
		began := time.Now()
		got, err := c.Matches(t.Context(), tt.hash, tt.password)
		if err != nil || got != tt.want {
			t.Errorf("%.10q, %d bytes: %v, %v", tt.hash, len(tt.password), got, err)
		}
		t.Logf("%s", time.Since(began).Round(time.Millisecond))
	}
}

func TestBounded(t *testing.T) {
	c, err := NewComparer(1)
	if err != nil {
		t.Fatal(err)
	}
	c.slots <- struct{}{}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	for range cap(c.waiting) {
		go func() {
			_, err := c.Matches(ctx, "", "x")
			done <- err
		}()
	}
	for len(c.waiting) < cap(c.waiting) {
		time.Sleep(time.Millisecond)
	}
	if _, err := c.Matches(ctx, "", "x"); !errors.Is(err, ErrBusy) {
		t.Errorf("error %v", err)
	}
	cancel()
	for range cap(c.waiting) {
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("error %v", err)
		}
	}
}
