package etcd

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/transport"
	clientv3 "go.etcd.io/etcd/client/v3"

	"atoll.dev/atoll/internal/datadir/pki"
)

// lab is an etcd directory with certificates.
type lab struct {
	cfg   Config
	files pki.Files
}

func newLab(t *testing.T) lab {
	t.Helper()
	dir := t.TempDir()
	files := pki.Files{Dir: filepath.Join(dir, "pki"), KubeconfigDir: filepath.Join(dir, "kubeconfig")}
	certs, err := pki.New(pki.Config{
		Dir: files.Dir, KubeconfigDir: files.KubeconfigDir, AdminKubeconfig: filepath.Join(dir, "admin"),
		NodeName: "n1", Domain: "cluster.local", APIServer: "https://127.0.0.1:1", AdminURL: "https://127.0.0.1:1",
		ServiceIP: netip.MustParseAddr("10.96.0.1"),
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := certs.Ensure(); err != nil {
		t.Fatal(err)
	}
	return lab{files: files, cfg: Config{
		Dir: filepath.Join(dir, "etcd"), MarkerFile: filepath.Join(dir, "created"), Name: "n1",
		ClientPort: freePort(t), PeerPort: freePort(t), QuotaBytes: 1 << 30,
		CACert: files.CACert(pki.EtcdCA), ServerCert: files.Cert(pki.EtcdServer), ServerKey: files.Key(pki.EtcdServer),
		PeerCert: files.Cert(pki.EtcdPeer), PeerKey: files.Key(pki.EtcdPeer),
		Logger: slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelError})),
	}}
}

// freePort is below those that the kernel gives to others while nobody listens there.
func freePort(t *testing.T) int {
	t.Helper()
	for range 1000 {
		port := 20000 + rand.IntN(12000)
		if l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port)); err == nil {
			_ = l.Close()
			return port
		}
	}
	t.Fatal("no free port")
	return 0
}

// while runs etcd, calls f when it is ready, and stops it again. It returns what
// Run returned.
func (l lab) while(t *testing.T, f func(*clientv3.Client)) error {
	t.Helper()
	e, err := New(l.cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- e.Run(ctx) }()
	select {
	case err := <-done:
		return err
	case <-e.Ready():
	}
	client := l.client(t, pki.APIServerEtcdClient)
	defer client.Close()
	f(client)
	cancel()
	return <-done
}

// client connects with the named certificate, or without one.
func (l lab) client(t *testing.T, cert string) *clientv3.Client {
	t.Helper()
	info := transport.TLSInfo{TrustedCAFile: l.files.CACert(pki.EtcdCA)}
	if cert != "" {
		info.CertFile, info.KeyFile = l.files.Cert(cert), l.files.Key(cert)
	}
	tls, err := info.ClientConfig()
	if err != nil {
		t.Fatal(err)
	}
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{loopbackURL(l.cfg.ClientPort)[0].String()}, TLS: tls})
	if err != nil {
		t.Fatal(err)
	}
	return client
}

// fill writes enough for the database to have many pages.
func fill(t *testing.T, client *clientv3.Client) {
	t.Helper()
	for i := range 50 {
		persist(t, func(ctx context.Context) error {
			_, err := client.Put(ctx, "key"+string(rune('a'+i)), strings.Repeat("v", 8<<10))
			return err
		})
	}
	// The database is written behind the log; make it catch up.
	persist(t, func(ctx context.Context) error {
		_, err := client.Defragment(ctx, client.Endpoints()[0])
		return err
	})
}

// persist repeats what etcd gives up after some seconds when the disk is slow.
func persist(t *testing.T, do func(context.Context) error) {
	t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); ; {
		err := do(t.Context())
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

func TestDataSurvivesRestart(t *testing.T) {
	l := newLab(t)
	if err := l.while(t, func(c *clientv3.Client) { fill(t, c) }); err != nil {
		t.Fatal(err)
	}
	err := l.while(t, func(c *clientv3.Client) {
		persist(t, func(ctx context.Context) error {
			got, err := c.Get(ctx, "key", clientv3.WithPrefix(), clientv3.WithCountOnly())
			if err == nil && got.Count != 50 {
				t.Errorf("%+v", got)
			}
			return err
		})
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestOnlyTheClusterMayConnect(t *testing.T) {
	l := newLab(t)
	err := l.while(t, func(*clientv3.Client) {
		for _, cert := range []string{"", pki.Admin} {
			c := l.client(t, cert)
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
			if _, err := c.Get(ctx, "x"); err == nil {
				t.Errorf("a client with certificate %q was let in", cert)
			}
			cancel()
			_ = c.Close()
		}
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestDamageIsReportedAndLeftAlone(t *testing.T) {
	l := newLab(t)
	if err := l.while(t, func(c *clientv3.Client) { fill(t, c) }); err != nil {
		t.Fatal(err)
	}
	database := filepath.Join("member", "snap", "db")
	for _, c := range []struct {
		name   string
		damage func(dir string) error
	}{
		{"database cut in half", func(dir string) error { return cut(filepath.Join(dir, database), 2) }},
		{"database empty", func(dir string) error { return os.Truncate(filepath.Join(dir, database), 0) }},
		{"database gone", func(dir string) error { return os.Remove(filepath.Join(dir, database)) }},
		{"database garbage", func(dir string) error { return scribble(filepath.Join(dir, database)) }},
		{"log gone", func(dir string) error { return os.RemoveAll(filepath.Join(dir, "member", "wal")) }},
		{"log cut", func(dir string) error { return cutLog(filepath.Join(dir, "member", "wal")) }},
		{"all gone", func(dir string) error { return os.RemoveAll(filepath.Join(dir, "member")) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			broken := l
			broken.cfg.Dir = filepath.Join(t.TempDir(), "etcd")
			if err := os.CopyFS(broken.cfg.Dir, os.DirFS(l.cfg.Dir)); err != nil {
				t.Fatal(err)
			}
			if err := c.damage(broken.cfg.Dir); err != nil {
				t.Fatal(err)
			}
			before := sizes(t, broken.cfg.Dir)
			err := broken.while(t, func(*clientv3.Client) { t.Error("etcd started") })
			if !errors.Is(err, ErrDamaged) {
				t.Fatalf("error %v", err)
			}
			t.Log(err)
			after := sizes(t, broken.cfg.Dir)
			for path, size := range before {
				if after[path] != size {
					t.Errorf("%s: %d bytes, then %d", path, size, after[path])
				}
			}
		})
	}
}

// TestHalfWrittenEntry is how a crash looks: the last entry is incomplete and
// was not applied.
func TestHalfWrittenEntry(t *testing.T) {
	l := newLab(t)
	if err := l.while(t, func(c *clientv3.Client) { fill(t, c) }); err != nil {
		t.Fatal(err)
	}
	segment := lastSegment(t, filepath.Join(l.cfg.Dir, "member", "wal"))
	data, err := os.ReadFile(segment)
	if err != nil {
		t.Fatal(err)
	}
	end := len(data)
	for end > 0 && data[end-1] == 0 {
		end--
	}
	// A frame that promises more bytes than follow.
	end = (end + 7) / 8 * 8
	data[end] = 0x40
	if err := os.WriteFile(segment, data[:end+16], 0o600); err != nil {
		t.Fatal(err)
	}
	if err := l.while(t, func(*clientv3.Client) {}); err != nil {
		t.Fatal(err)
	}
}

func TestBusyPort(t *testing.T) {
	l := newLab(t)
	listener, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", "0"))
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	l.cfg.ClientPort = listener.Addr().(*net.TCPAddr).Port
	err = l.while(t, func(*clientv3.Client) {})
	if err == nil || errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), "address already in use") {
		t.Fatalf("error %v", err)
	}
}

func cut(path string, by int64) error {
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	return os.Truncate(path, info.Size()/by)
}

// scribble overwrites everything behind the two meta pages.
func scribble(path string) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	page := os.Getpagesize()
	for i := 2 * page; i < len(data); i++ {
		data[i] = byte(i*7 + i>>8)
	}
	return os.WriteFile(path, data, 0o600)
}

// cutLog drops the second half of what is in the log.
func cutLog(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if !strings.HasSuffix(path, ".wal") {
			continue
		}
		end := len(data)
		for end > 0 && data[end-1] == 0 {
			end--
		}
		if err := os.Truncate(path, int64(end/2)); err != nil {
			return err
		}
	}
	return nil
}

func lastSegment(t *testing.T, dir string) string {
	t.Helper()
	names, err := walFiles(dir)
	if err != nil || len(names) == 0 {
		t.Fatalf("%v, %v", names, err)
	}
	return filepath.Join(dir, names[len(names)-1])
}

func sizes(t *testing.T, dir string) map[string]int64 {
	t.Helper()
	out := make(map[string]int64)
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		out[path] = info.Size()
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}
