package pki

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func testConfig(t *testing.T, now *time.Time) Config {
	t.Helper()
	dir := t.TempDir()
	return Config{
		Dir:             filepath.Join(dir, "pki"),
		KubeconfigDir:   filepath.Join(dir, "kubeconfig"),
		AdminKubeconfig: filepath.Join(dir, "admin.kubeconfig"),
		NodeName:        "host-1",
		NodeAddrs:       []netip.Addr{netip.MustParseAddr("192.0.2.7")},
		ExtraSANs:       []string{"api.example.org", "198.51.100.4"},
		ServiceIP:       netip.MustParseAddr("10.96.0.1"),
		Domain:          "cluster.local",
		APIServer:       "https://127.0.0.1:6443",
		AdminURL:        "https://192.0.2.7:6443",
		Now:             func() time.Time { return *now },
	}
}

func ensure(t *testing.T, cfg Config) []string {
	t.Helper()
	p, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	made, err := p.Ensure()
	if err != nil {
		t.Fatal(err)
	}
	return made
}

// snapshot reads every file below dir.
func snapshot(t *testing.T, dir string) map[string]string {
	t.Helper()
	files := make(map[string]string)
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := os.ReadFile(path)
		files[path] = string(data)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

func TestEnsureIsIdempotent(t *testing.T) {
	now := time.Now()
	cfg := testConfig(t, &now)
	if made := ensure(t, cfg); len(made) != 25 {
		t.Fatalf("made %d certificates: %v", len(made), made)
	}
	root := filepath.Dir(cfg.Dir)
	before := snapshot(t, root)
	if made := ensure(t, cfg); len(made) != 0 {
		t.Fatalf("second call made %v", made)
	}
	after := snapshot(t, root)
	if len(before) != len(after) {
		t.Fatalf("%d files, then %d", len(before), len(after))
	}
	for path, content := range before {
		if after[path] != content {
			t.Errorf("%s changed", path)
		}
	}
	for path := range after {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		secret := strings.HasSuffix(path, ".key") || strings.HasSuffix(path, ".kubeconfig")
		if secret && info.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %v", path, info.Mode())
		}
	}
}

func TestCertificatesVerify(t *testing.T) {
	now := time.Now()
	cfg := testConfig(t, &now)
	ensure(t, cfg)
	f := Files{Dir: cfg.Dir, KubeconfigDir: cfg.KubeconfigDir}
	for _, c := range []struct {
		name   string
		ca     Authority
		usage  x509.ExtKeyUsage
		host   string
		org    string
		common string
	}{
		{APIServer, ClusterCA, x509.ExtKeyUsageServerAuth, "kubernetes.default.svc.cluster.local", "", "kube-apiserver"},
		{APIServer, ClusterCA, x509.ExtKeyUsageServerAuth, "10.96.0.1", "", "kube-apiserver"},
		{APIServer, ClusterCA, x509.ExtKeyUsageServerAuth, "192.0.2.7", "", "kube-apiserver"},
		{APIServer, ClusterCA, x509.ExtKeyUsageServerAuth, "198.51.100.4", "", "kube-apiserver"},
		{APIServer, ClusterCA, x509.ExtKeyUsageServerAuth, "api.example.org", "", "kube-apiserver"},
		{EtcdServer, EtcdCA, x509.ExtKeyUsageServerAuth, "127.0.0.1", "", "host-1"},
		{APIServerEtcdClient, EtcdCA, x509.ExtKeyUsageClientAuth, "", "", "kube-apiserver-etcd-client"},
		{FrontProxyClient, FrontProxyCA, x509.ExtKeyUsageClientAuth, "", "", "front-proxy-client"},
		{Kubelet, ClusterCA, x509.ExtKeyUsageClientAuth, "", "system:nodes", "system:node:host-1"},
		{KubeletServing, ClusterCA, x509.ExtKeyUsageServerAuth, "host-1", "system:nodes", "system:node:host-1"},
		{Admin, ClusterCA, x509.ExtKeyUsageClientAuth, "", "system:masters", "atoll-admin"},
	} {
		caPEM, err := os.ReadFile(f.CACert(c.ca))
		if err != nil {
			t.Fatal(err)
		}
		pool := x509.NewCertPool()
		pool.AppendCertsFromPEM(caPEM)
		pair, err := tls.LoadX509KeyPair(f.Cert(c.name), f.Key(c.name))
		if err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		_, err = pair.Leaf.Verify(x509.VerifyOptions{Roots: pool, DNSName: c.host, KeyUsages: []x509.ExtKeyUsage{c.usage}})
		if err != nil {
			t.Errorf("%s for %q: %v", c.name, c.host, err)
		}
		if pair.Leaf.Subject.CommonName != c.common {
			t.Errorf("%s: common name %q", c.name, pair.Leaf.Subject.CommonName)
		}
		if c.org != "" && !slices.Contains(pair.Leaf.Subject.Organization, c.org) {
			t.Errorf("%s: organizations %v", c.name, pair.Leaf.Subject.Organization)
		}
	}
}

func TestRenewal(t *testing.T) {
	const day = 24 * time.Hour
	for _, c := range []struct {
		name  string
		shift time.Duration
		renew bool
	}{
		{"fresh", day, false},
		{"two thirds gone", 250 * day, false},
		{"71% gone", 260 * day, true},
		{"expired", 400 * day, true},
		{"clock set back", -2 * day, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			now := time.Now()
			cfg := testConfig(t, &now)
			first := ensure(t, cfg)
			now = now.Add(c.shift)
			made := ensure(t, cfg)
			want := 0
			if c.renew {
				want = len(first)
			}
			if len(made) != want {
				t.Fatalf("renewed %v", made)
			}
		})
	}
}

func TestReissueOnChange(t *testing.T) {
	now := time.Now()
	cfg := testConfig(t, &now)
	ensure(t, cfg)

	cfg.NodeAddrs = append(cfg.NodeAddrs, netip.MustParseAddr("192.0.2.8"))
	want := []string{APIServer, EtcdServer, EtcdPeer, KubeletServing, Portal}
	if made := ensure(t, cfg); !slices.Equal(made, want) {
		t.Fatalf("new address: made %v", made)
	}
	cfg.NodeAddrs = cfg.NodeAddrs[:1]
	if made := ensure(t, cfg); len(made) != 0 {
		t.Fatalf("address gone: made %v", made)
	}

	f := Files{Dir: cfg.Dir, KubeconfigDir: cfg.KubeconfigDir}
	if err := os.WriteFile(f.Key(Scheduler), []byte("garbage"), 0o600); err != nil {
		t.Fatal(err)
	}
	if made := ensure(t, cfg); !slices.Equal(made, []string{Scheduler}) {
		t.Fatalf("damaged key: made %v", made)
	}
	// A crash between the two writes of a renewal leaves a pair that differs.
	other, err := os.ReadFile(f.Key(Kubelet))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(f.Key(KubeProxy), other, 0o600); err != nil {
		t.Fatal(err)
	}
	if made := ensure(t, cfg); !slices.Equal(made, []string{KubeProxy}) {
		t.Fatalf("mismatched pair: made %v", made)
	}
}

func TestDamagedAuthorityIsNeverReplaced(t *testing.T) {
	for _, c := range []struct {
		name   string
		damage func(f Files) error
	}{
		{"truncated certificate", func(f Files) error { return os.Truncate(f.CACert(ClusterCA), 100) }},
		{"missing key", func(f Files) error { return os.Remove(f.CAKey(EtcdCA)) }},
		{"empty key", func(f Files) error { return os.Truncate(f.CAKey(FrontProxyCA), 0) }},
		{"service account key", func(f Files) error { return os.Truncate(f.ServiceAccountKey(), 50) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			now := time.Now()
			cfg := testConfig(t, &now)
			ensure(t, cfg)
			if err := c.damage(Files{Dir: cfg.Dir, KubeconfigDir: cfg.KubeconfigDir}); err != nil {
				t.Fatal(err)
			}
			before := snapshot(t, cfg.Dir)
			p, err := New(cfg)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := p.Ensure(); !errors.Is(err, ErrDamaged) {
				t.Fatalf("error %v", err)
			}
			after := snapshot(t, cfg.Dir)
			for path, content := range before {
				if after[path] != content {
					t.Errorf("%s changed", path)
				}
			}
		})
	}
}

func TestNewRefusesIncompleteConfig(t *testing.T) {
	if _, err := New(Config{Dir: "relative"}); err == nil {
		t.Fatal("no error")
	}
}
