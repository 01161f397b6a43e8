package rbd

import (
	"errors"
	"os"
	"strings"
	"testing"

	"atoll.dev/atoll/internal/storage/datastore"
)

// printed is what rados listomapvals prints.
const printed = `datastore
value (7 bytes) :
00000000  7b 22 61 22 3a 31 7d                              |{"a":1}|
00000007

empty
value (0 bytes) :

volumes/v
value (65 bytes) :
00000000  61 61 61 61 61 61 61 61  61 61 61 61 61 61 61 61  |aaaaaaaaaaaaaaaa|
*
00000040  62                                                |b|
00000041

`

func TestParseValues(t *testing.T) {
	values, err := parseValues([]byte(printed))
	if err != nil {
		t.Fatal(err)
	}
	for key, want := range map[string]string{"datastore": `{"a":1}`, "empty": "", "volumes/v": strings.Repeat("a", 64) + "b"} {
		if got, ok := values[key]; !ok || string(got) != want {
			t.Errorf("%s: %q", key, got)
		}
	}
	if len(values) != 3 {
		t.Errorf("%q", values)
	}
	for _, cut := range []string{"x\ny\n", "x\nvalue (9 bytes) :\n00000000  61", "x\nvalue (99 bytes) :\n*\n00000063\n", strings.Replace(printed, "62  ", "zz  ", 1)} {
		if _, err := parseValues([]byte(cut)); err == nil {
			t.Errorf("%q was read", cut)
		}
	}
}

func FuzzParseValues(f *testing.F) {
	f.Add([]byte(printed))
	f.Fuzz(func(t *testing.T, b []byte) {
		values, err := parseValues(b)
		if err == nil && len(values) > len(b) {
			t.Fatal(len(values))
		}
	})
}

func TestEnded(t *testing.T) {
	if ended(me()) {
		t.Error("this process has ended")
	}
	boot, _, _ := strings.Cut(me(), "/")
	for description, want := range map[string]bool{boot + "/999999999/1": true, boot + "/1/1": true, "other-boot/1/1": false, "": false, "x": false} {
		if ended(description) != want {
			t.Errorf("%q: %t", description, !want)
		}
	}
	if started(os.Getpid()) == "" {
		t.Error("no start time")
	}
}

func TestNew(t *testing.T) {
	for _, c := range []Config{{}, {Pool: "a b"}, {Pool: "-x"}, {Pool: "p", User: "a,b"}, {Pool: "p", Namespace: "a/b"}} {
		if _, err := New(c); !errors.Is(err, datastore.ErrInvalid) {
			t.Errorf("%+v: %v", c, err)
		}
	}
}
