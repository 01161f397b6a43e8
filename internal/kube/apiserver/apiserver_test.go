package apiserver

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"k8s.io/apiserver/pkg/server/options/encryptionconfig"
	"k8s.io/kubernetes/cmd/kube-apiserver/app/options"
	"k8s.io/kubernetes/plugin/pkg/admission/runtimeclass"

	"atoll.dev/atoll/internal/datadir/pki"
	"atoll.dev/atoll/internal/kube/admission/namespacebounds"
	"atoll.dev/atoll/internal/kube/admission/podruntime"
	"atoll.dev/atoll/internal/testkit/golden"
)

func testServer(dir string) *APIServer {
	return New(Config{
		Files:       pki.Files{Dir: dir + "/pki", KubeconfigDir: dir + "/kubeconfig"},
		StateDir:    dir + "/server",
		AuditLog:    dir + "/logs/audit.log",
		BindAddress: netip.MustParseAddr("0.0.0.0"),
		Port:        6443,
		Advertise:   netip.MustParseAddr("192.0.2.7"),
		EtcdPort:    2379,
		KubeletPort: 10250,
		ServiceCIDR: netip.MustParsePrefix("10.96.0.0/16"),
		Domain:      "cluster.local",
		Identity:    9444,
	})
}

func TestGoldenFlags(t *testing.T) {
	golden.Compare(t, "flags.txt", strings.Join(testServer("/data").flags(), "\n")+"\n")
}

func TestFilesAreKept(t *testing.T) {
	s := testServer(t.TempDir())
	if err := s.writeFiles(); err != nil {
		t.Fatal(err)
	}
	key, err := os.ReadFile(s.encryptionFile())
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(s.encryptionFile())
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("mode %v, %v", info.Mode(), err)
	}
	if err := s.writeFiles(); err != nil {
		t.Fatal(err)
	}
	again, err := os.ReadFile(s.encryptionFile())
	if err != nil || string(again) != string(key) {
		t.Fatal("the encryption key changed")
	}
	if _, err := encryptionconfig.LoadEncryptionConfig(context.Background(), s.encryptionFile(), false, "test"); err != nil {
		t.Fatal(err)
	}
}

func TestMissingKeyIsNotReplaced(t *testing.T) {
	s := testServer(t.TempDir())
	s.cfg.HasData = true
	if err := s.writeFiles(); !errors.Is(err, ErrNoEncryptionKey) {
		t.Fatalf("error %v", err)
	}
	if _, err := os.Stat(filepath.Join(s.cfg.StateDir, "encryption.yaml")); err == nil {
		t.Fatal("a key was made")
	}
}

func TestAdmissionOrder(t *testing.T) {
	first := options.NewServerRunOptions()
	registerAdmission(first, namespacebounds.NewSource())
	order := first.Admission.GenericAdmission.RecommendedPluginOrder
	ours := slices.Index(order, podruntime.PluginName)
	if ours < 0 || order[ours+1] != runtimeclass.PluginName {
		t.Fatalf("order %v", order)
	}
	if slices.Contains(options.NewServerRunOptions().Admission.GenericAdmission.RecommendedPluginOrder, podruntime.PluginName) {
		t.Fatal("upstream's list was changed")
	}
}
