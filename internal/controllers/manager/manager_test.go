package manager

import (
	"bytes"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/runtime/schema"
)

func TestSchemeKnowsWhatIsDefined(t *testing.T) {
	s, err := NewScheme()
	if err != nil {
		t.Fatal(err)
	}
	kinds := definedKinds(s)
	for _, want := range []string{
		"VirtualMachine", "VirtualMachineClass", "VirtualMachineClassInstance", "VirtualMachineImage", "ClusterVirtualMachineImage",
		"VirtualMachineService", "VirtualMachineSnapshot", "VirtualMachineReplicaSet", "Network", "NetworkInterface",
	} {
		if !slices.ContainsFunc(kinds, func(k schema.GroupVersionKind) bool { return k.Kind == want }) {
			t.Errorf("%s is not among %v", want, kinds)
		}
	}
	for _, k := range kinds {
		if strings.HasSuffix(k.Kind, "List") || strings.HasSuffix(k.Kind, "Options") {
			t.Errorf("%s is no kind of objects", k)
		}
	}
}

func TestLoggerIsQuiet(t *testing.T) {
	var out bytes.Buffer
	log := newLogger(slog.New(slog.NewTextHandler(&out, nil))).WithName("x").WithValues("a", 1)
	log.Info("starting")
	log.Error(errors.New("broken"), "failed")
	if text := out.String(); strings.Contains(text, "starting") || !strings.Contains(text, "failed") {
		t.Fatalf("logged %q", text)
	}
}
