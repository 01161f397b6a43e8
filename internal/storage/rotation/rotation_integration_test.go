//go:build integration

package rotation

import (
	"bytes"
	"context"
	"errors"
	"path/filepath"
	"strings"
	"testing"

	"atoll.dev/atoll/internal/storage/datastore"
	"atoll.dev/atoll/internal/storage/datastore/directory"
	"atoll.dev/atoll/internal/storage/datastore/keys"
	"atoll.dev/atoll/internal/storage/stores"
)

// source has classes that name a key of a provider.
type source struct {
	classes   map[string][2]string
	providers map[string]map[string][]byte
}

func (s source) Class(_ context.Context, class string) (provider, key string, err error) {
	c, ok := s.classes[class]
	if !ok {
		return "", "", errors.New("there is no such class")
	}
	return c[0], c[1], nil
}

func (s source) Provider(_ context.Context, name string) (string, map[string][]byte, error) {
	p, ok := s.providers[name]
	if !ok {
		return "", nil, errors.New("there is no such provider")
	}
	return keys.KindSecret, p, nil
}

func TestRewrap(t *testing.T) {
	key := func(c byte) []byte { return bytes.Repeat([]byte{c}, keys.Size) }
	from := source{
		classes:   map[string][2]string{"team/gold": {"corp", "a"}, "other/gold": {"corp", "a"}},
		providers: map[string]map[string][]byte{"corp": {"a": key(1), "b": key(2)}, "new": {"x": key(3)}},
	}
	wrapper := keys.Wrapper{Source: from}
	engine, err := directory.New(directory.Config{Path: filepath.Join(t.TempDir(), "store"), Keys: wrapper})
	if err != nil {
		t.Fatal(err)
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	_, err = engine.Init(t.Context())
	must(err)
	create := func(id, class string) {
		t.Helper()
		_, err := engine.Create(t.Context(), datastore.Spec{ID: id, Size: datastore.SizeUnit, Encryption: class})
		must(err)
	}
	create("one", "team/gold")
	create("two", "team/gold")
	create("three", "other/gold")
	create("clear", "")
	_, err = engine.Snapshot(t.Context(), "s", "one", nil)
	must(err)
	list := []stores.Store{{Name: "d", Backend: engine}}
	rotate := func(class string) Result {
		t.Helper()
		items, err := Items(t.Context(), list)
		must(err)
		told := 0
		r := Rewrap(t.Context(), wrapper, items, class, func(Result) { told++ })
		if r.KeyErr == nil && told == 0 {
			t.Error("no progress was told")
		}
		return r
	}
	if r := rotate("team/gold"); r.Total != 3 || r.Current != 3 || r.KEK.ID != "a" {
		t.Errorf("nothing to do: %+v", r)
	}

	from.classes["team/gold"] = [2]string{"corp", "c"}
	if r := rotate("team/gold"); r.KeyErr == nil || !strings.Contains(r.KeyErr.Error(), `no key "c"; ask the administrator`) || r.Current != 0 {
		t.Errorf("a key that is not there: %+v", r)
	}
	from.classes["team/gold"] = [2]string{"nobody", ""}
	if r := rotate("team/gold"); !errors.Is(r.KeyErr, datastore.ErrKey) {
		t.Errorf("a provider that is not there: %+v", r)
	}

	// Another provider: the old one is needed until all is done.
	from.classes["team/gold"] = [2]string{"new", ""}
	old := from.providers["corp"]
	from.providers["corp"] = map[string][]byte{"a": key(9)}
	if r := rotate("team/gold"); r.Err == nil || !strings.Contains(r.Err.Error(), "another key") || r.Total != 3 || r.Current != 0 {
		t.Errorf("without the old key: %+v", r)
	}
	from.providers["corp"] = old
	if r := rotate("team/gold"); r.Err != nil || r.Current != 3 || r.KEK.Provider != "new" {
		t.Errorf("%+v", r)
	}
	delete(from.providers, "corp")
	delete(from.classes, "team/gold")
	for _, id := range []string{"one", "two"} {
		disk, err := engine.Attach(t.Context(), id, "h", datastore.ReadWrite)
		must(err)
		if _, err := engine.Unlock(t.Context(), disk); err != nil {
			t.Errorf("%s without old key and class: %v", id, err)
		}
		must(engine.Detach(t.Context(), id, "h"))
	}
	items, err := Items(t.Context(), list)
	must(err)
	from.classes["team/silver"] = [2]string{"new", "x"}
	for _, i := range items {
		if i.Source.Volume == "two" {
			must(Move(t.Context(), i, "team/silver"))
		}
	}
	if v, err := engine.Volume(t.Context(), "two"); err != nil || v.Encryption != "team/silver" {
		t.Errorf("moved: %+v, %v", v, err)
	}
	if v, err := engine.Volume(t.Context(), "three"); err != nil || v.KEKs[0].Provider != "corp" {
		t.Errorf("of another class: %+v, %v", v, err)
	}
}
