//go:build ceph

package rbd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"atoll.dev/atoll/internal/storage/datastore"
	"atoll.dev/atoll/internal/storage/datastore/enginetest"
)

// cluster is a Ceph of one monitor, one manager and one OSD on a file, on the loopback interface and without
// authentication. It ends with the test.
type cluster struct {
	testing.TB
	dir, conf string
	daemons   []*exec.Cmd
}

const pool = "atoll"

func newCluster(t testing.TB) *cluster {
	t.Helper()
	dir := t.TempDir()
	c := &cluster{TB: t, dir: dir, conf: filepath.Join(dir, "ceph.conf")}
	for _, name := range []string{"mon", "mgr", "osd", "run"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	l.Close()
	fsid, osd := uuid(t), uuid(t)
	text := strings.NewReplacer("DIR", dir, "FSID", fsid, "ADDRESS", address).Replace(cephConf)
	if err := os.WriteFile(c.conf, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	c.run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", "[v2:"+address+"]", filepath.Join(dir, "monmap"))
	c.run("ceph-mon", "-i", "a", "--mkfs", "--monmap", filepath.Join(dir, "monmap"))
	t.Cleanup(c.stop)
	c.start("ceph-mon", "-i", "a", "-f")
	c.start("ceph-mgr", "-i", "x", "-f")
	c.run("ceph", "osd", "new", osd)
	c.run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
	c.start("ceph-osd", "-i", "0", "-f")
	c.run("ceph", "osd", "pool", "create", pool, "8")
	c.run("rbd", "pool", "init", pool)
	probe := &place{Config: Config{Pool: pool, Conf: c.conf, Timeout: 10 * time.Second}}
	for begun := time.Now(); ; {
		_, _, err := probe.Space()
		if err == nil {
			return c
		}
		if time.Since(begun) > time.Minute {
			t.Fatal(err)
		}
	}
}

const cephConf = `[global]
fsid = FSID
mon_host = [v2:ADDRESS/0]
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
osd_pool_default_size = 1
mon_allow_pool_size_one = true
osd_crush_chooseleaf_type = 0
public_addr = 127.0.0.1
run_dir = DIR/run
admin_socket = DIR/run/$name.asok
log_file = DIR/$name.log
bluestore_block_size = 4294967296
ms_bind_msgr1 = false
mon_data_avail_warn = 1
mon_data_avail_crit = 1
[client]
admin_socket =
log_file =
[mon.a]
mon_data = DIR/mon
[mgr.x]
mgr_data = DIR/mgr
[osd.0]
osd_data = DIR/osd
`

func uuid(t testing.TB) string {
	t.Helper()
	b, err := os.ReadFile("/proc/sys/kernel/random/uuid")
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}

// run runs a command of Ceph.
func (c *cluster) run(name string, args ...string) {
	c.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, append([]string{"--conf", c.conf}, args...)...)
	if name == "monmaptool" {
		cmd = exec.CommandContext(ctx, name, args...)
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		c.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
}

// start starts a daemon.
func (c *cluster) start(name string, args ...string) {
	c.Helper()
	cmd := exec.Command(name, append([]string{"--conf", c.conf}, args...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		c.Fatal(err)
	}
	c.daemons = append(c.daemons, cmd)
}

// stop ends all daemons.
func (c *cluster) stop() {
	for _, d := range c.daemons {
		_ = d.Process.Kill()
	}
	for _, d := range c.daemons {
		_ = d.Wait() // killed
	}
	c.daemons = nil
}

// config is a datastore in a namespace of its own.
func (c *cluster) config(name string) Config {
	c.Helper()
	c.run("rbd", "namespace", "create", pool+"/"+name)
	return Config{Pool: pool, Namespace: name, Conf: c.conf}
}

func TestCeph(t *testing.T) {
	c := newCluster(t)
	n := 0
	enginetest.Suite(t, 24<<20, func(t *testing.T, k datastore.Keys) enginetest.Store {
		n++
		config := c.config(fmt.Sprintf("suite%d", n))
		config.Keys = k
		s, err := New(config)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Init(t.Context()); err != nil {
			t.Fatal(err)
		}
		return s
	})
	t.Run("DeadHolder", func(t *testing.T) { deadHolder(t, c.config("dead")) })
	t.Run("OtherPool", func(t *testing.T) {
		config := c.config("other")
		config.ID = "dunknown"
		s, err := New(config)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Init(t.Context()); !errors.Is(err, datastore.ErrUnavailable) {
			t.Error(err)
		}
	})
	t.Run("Unreachable", func(t *testing.T) {
		config := c.config("gone")
		config.Timeout = 3 * time.Second
		s, err := New(config)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Init(t.Context()); err != nil {
			t.Fatal(err)
		}
		c.stop()
		begun := time.Now()
		_, err = s.Create(t.Context(), datastore.Spec{ID: "v", Size: 1 << 30})
		if took := time.Since(begun); !errors.Is(err, datastore.ErrUnavailable) || took > 20*time.Second {
			t.Errorf("%v after %s", err, took)
		}
	})
}

// deadHolder: a lock of a process that was killed is not waited for.
func deadHolder(t *testing.T, config Config) {
	s, err := New(config)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Init(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Create(t.Context(), datastore.Spec{ID: "v", Size: 1 << 30}); err != nil {
		t.Fatal(err)
	}
	child := exec.Command("sleep", "1000")
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	boot, _, _ := strings.Cut(me(), "/")
	description := fmt.Sprintf("%s/%d/%s", boot, child.Process.Pid, started(child.Process.Pid))
	var out bytes.Buffer
	lock := exec.Command("rados", "--conf", config.Conf, "--pool", config.Pool, "--namespace", config.Namespace,
		"lock", "get", (&locks{}).object("volumes/v"), lockName, "--lock-cookie", "c", "--lock-description", description)
	lock.Stderr = &out
	if err := lock.Run(); err != nil {
		t.Fatalf("%v: %s", err, out.Bytes())
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	if err := s.Delete(ctx, "v"); !errors.Is(err, datastore.ErrBusy) {
		t.Errorf("while its holder lives: %v", err)
	}
	if err := child.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = child.Wait() // killed
	if err := s.Delete(t.Context(), "v"); err != nil {
		t.Errorf("after its holder was killed: %v", err)
	}
}
