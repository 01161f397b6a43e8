//go:build integration

package cpumodel

import (
	"testing"

	"atoll.dev/atoll/internal/vm/qemu"
)

// TestSupported asks a real QEMU, of an emulated processor: it has all of Nehalem's features and not all of Haswell's.
func TestSupported(t *testing.T) {
	got, err := Supported(t.Context(), "/usr/bin/qemu-system-x86_64", "tcg", qemu.Credential{UID: 65534, GID: 65534})
	if err != nil {
		t.Fatal(err)
	}
	if !got.Models["Nehalem-v1"] || got.Models["Haswell-v4"] || len(got.Models) < 50 || !got.Features["sse2"] || got.Features["md-clear"] {
		t.Errorf("%v", got)
	}
	for _, vendor := range []string{"GenuineIntel", "AuthenticAMD"} {
		for _, model := range baselines(vendor) {
			if _, known := got.Models[model]; !known {
				t.Errorf("QEMU has no model %s", model)
			}
		}
	}
	if _, err := Supported(t.Context(), "/usr/bin/qemu-system-x86_64", "none", qemu.Credential{UID: 65534, GID: 65534}); err == nil {
		t.Error("no error without an accelerator")
	}
}
