package scheduler

import (
	"strings"
	"testing"

	"atoll.dev/atoll/internal/datadir/pki"
	"atoll.dev/atoll/internal/testkit/golden"
)

func TestGoldenFlags(t *testing.T) {
	cfg := Config{Files: pki.Files{Dir: "/data/pki", KubeconfigDir: "/data/kubeconfig"}, Port: 10259}
	golden.Compare(t, "flags.txt", strings.Join(cfg.flags(), "\n")+"\n")
}
