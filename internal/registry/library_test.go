package registry

import (
	"fmt"
	"testing"

	"github.com/google/go-containerregistry/pkg/v1/remote"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
)

// TestNoNamespaceGovernsTheLibrary: one that has its name, from before the name was taken, changes nothing in it.
func TestNoNamespaceGovernsTheLibrary(t *testing.T) {
	h := start(t)
	h.robot("ci", "secret-of-ci", atoll.RobotPush)
	h.change(func() {
		h.namespaces["library"] = "uid-of-library"
		h.settings["library"] = atoll.NamespaceRegistry{
			Quota: quantity(1), ImmutableTags: []string{"*:*"}, Retention: []atoll.RegistryRetention{{Pattern: "*:*", KeepLast: 1}},
		}
		robot := h.robots["shop/ci"].DeepCopy()
		robot.Namespace = "library"
		h.robots["library/ci"] = robot
	})
	for i := range 3 {
		h.push(fmt.Sprintf("library/base:%d", i), h.image(64, 1), h.as("root"))
	}
	h.push("library/base:0", h.image(64, 1), h.as("root"))
	h.collect(false)
	if tags, err := remote.List(h.ref("library/base:x").Context(), h.as("root")...); err != nil || len(tags) != 3 {
		t.Errorf("tags of the library: %v, %v", tags, err)
	}
	refused(t, remote.Write(h.ref("library/base:9"), h.image(64, 1), h.login("robot$library+ci", "secret-of-ci")...), "may not push")
}
