package agent

import (
	"net/netip"
	"strings"
	"testing"
)

func TestValidateNamesEverythingMissing(t *testing.T) {
	err := Config{NodeIP: netip.MustParseAddr("127.0.0.1")}.WithDefaults().Validate()
	if err == nil {
		t.Fatal("no error")
	}
	for _, name := range []string{"PKIDir", "KubeconfigDir", "KubeletDir", "PodLogsDir", "StateDir", "ContentDir", "ContainerdSocket", "NodeName", "NodeIP"} {
		if !strings.Contains(err.Error(), name) {
			t.Errorf("%s is not named in %v", name, err)
		}
	}
}
