package stores

import (
	"errors"
	"strings"
	"testing"

	"atoll.dev/atoll/internal/storage/datastore"
)

func TestSplit(t *testing.T) {
	store, id, err := Split(Handle("default", "pvc-1"))
	if err != nil || store != "default" || id != "pvc-1" {
		t.Errorf("%q, %q, %v", store, id, err)
	}
	for _, bad := range []string{"", "pvc-1", "/pvc-1", "default/", "a/b/c"} {
		if _, _, err := Split(bad); !errors.Is(err, ErrHandle) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

// TestWhyADatastoreIsNotOpen: each reason is told apart, since some mean waiting and some mean a mistake.
func TestWhyADatastoreIsNotOpen(t *testing.T) {
	s := &Set{}
	want := func(name string, target error) {
		t.Helper()
		if _, err := s.Get(name); !errors.Is(err, target) {
			t.Errorf("%s: %v, want %v", name, err, target)
		}
	}
	want("a", ErrUnknown)
	s.Put(Store{Name: "a"})
	s.Close("b", ErrElsewhere)
	s.Close("c", datastore.ErrUnavailable)
	if s.Complete() {
		t.Error("complete before everything was listed")
	}
	s.Listed()
	want("a", nil)
	want("b", ErrElsewhere)
	want("c", datastore.ErrUnavailable)
	want("d", ErrNone)
	if s.Complete() {
		t.Error("complete with closed datastores")
	}
	s.Remove("b")
	s.Put(Store{Name: "c"})
	want("b", ErrNone)
	want("c", nil)
	if !s.Complete() || len(s.All()) != 2 {
		t.Errorf("%v", s.All())
	}
}

// TestKnown: what cannot be looked at is said, unless it is somebody else's.
func TestKnown(t *testing.T) {
	s := &Set{}
	s.Put(Store{Name: "a"})
	if all, err := s.Known(); len(all) != 1 || err == nil || !strings.Contains(err.Error(), "not opened all datastores") {
		t.Errorf("before everything was listed: %v, %v", all, err)
	}
	s.Listed()
	s.Close("b", ErrElsewhere)
	if all, err := s.Known(); len(all) != 1 || err != nil {
		t.Errorf("with one of another host: %v, %v", all, err)
	}
	s.Close("a", datastore.ErrUnavailable)
	if all, err := s.Known(); len(all) != 0 || !errors.Is(err, datastore.ErrUnavailable) || !strings.Contains(err.Error(), "datastore a is not open") {
		t.Errorf("with one that is down: %v, %v", all, err)
	}
}

func TestClaim(t *testing.T) {
	v := datastore.Volume{Labels: map[string]string{LabelClaim: "data", LabelNamespace: "shop"}}
	if got := Claim(v); got != "shop/data" {
		t.Error(got)
	}
	if got := Claim(datastore.Volume{}); got != "" {
		t.Error(got)
	}
}
