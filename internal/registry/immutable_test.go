package registry

import (
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
)

// immutable are the settings of a project with immutable tags.
func immutable(patterns ...string) atoll.NamespaceRegistry {
	return atoll.NamespaceRegistry{ImmutableTags: patterns}
}

func TestRetentionKeepsImmutableTags(t *testing.T) {
	h := start(t)
	h.change(func() {
		s := immutable("web:v*")
		s.Retention = []atoll.RegistryRetention{{Pattern: "web:*", KeepLast: 1}}
		h.settings["shop"] = s
	})
	for _, tag := range []string{"v1", "build-1", "v2", "build-2"} {
		h.push("shop/web:"+tag, h.image(64, 1), h.as("olga"))
	}
	h.collect(false)
	tags, err := remote.List(h.ref("shop/web:x").Context(), h.as("olga")...)
	if err != nil || strings.Join(tags, " ") != "build-2 v1 v2" {
		t.Errorf("%v, %v", tags, err)
	}
	refused(t, remote.Write(h.ref("shop/web:v1"), h.image(64, 1), h.as("olga")...), "immutable")
}

// TestImmutableIndex: what an index lists stays as long as the index.
func TestImmutableIndex(t *testing.T) {
	h := start(t)
	h.change(func() { h.settings["shop"] = immutable("multi:v*") })
	img, other := h.image(64, 1), h.image(64, 1)
	inner := mutate.AppendManifests(empty.Index, mutate.IndexAddendum{Add: img})
	index := mutate.AppendManifests(empty.Index, mutate.IndexAddendum{Add: inner})
	if err := remote.WriteIndex(h.ref("shop/multi:v1"), index, h.as("olga")...); err != nil {
		t.Fatal(err)
	}
	h.push("shop/multi:latest", other, h.as("olga"))
	child, _ := img.Digest()
	middle, _ := inner.Digest()
	for _, digest := range []string{child.String(), middle.String()} {
		refused(t, remote.Delete(h.ref("shop/multi@"+digest), h.as("olga")...), "tag shop/multi:v1 is immutable")
	}
	if err := h.pull("shop/multi@"+child.String(), h.as("olga")); err != nil {
		t.Error(err)
	}
	free, _ := other.Digest()
	if err := remote.Delete(h.ref("shop/multi@"+free.String()), h.as("olga")...); err != nil {
		t.Errorf("what no immutable tag needs: %v", err)
	}
}
