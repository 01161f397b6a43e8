// Package cephtest starts a real Ceph of one monitor, one manager and one OSD on a file, for tests. It is on the
// loopback interface of the process's network namespace and ends with the test. It takes about 15 s to start, 400
// MiB of memory and what is written of 4 GiB of disk.
//
// Tests of packages that open volumes in Ceph import it. It needs Debian's packages ceph-mon, ceph-mgr, ceph-osd
// and ceph-common; what fails ends the test.
package cephtest

import (
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Pool is the pool that there is.
const Pool = "atoll"

// User is a user, without "client.", who may use Pool as RBD does and nothing else, if there is authentication.
const User = "atoll"

// Cluster is a running cluster.
type Cluster struct {
	testing.TB
	// Conf is its ceph.conf, in which the keyring of every user is named.
	Conf string

	dir     string
	daemons map[string]*daemon
}

// Start starts a cluster, with authentication (cephx) or without.
func Start(t testing.TB, cephx bool) *Cluster {
	t.Helper()
	dir := t.TempDir()
	c := &Cluster{TB: t, dir: dir, Conf: filepath.Join(dir, "ceph.conf"), daemons: map[string]*daemon{}}
	for _, name := range []string{"mon", "mgr", "osd", "run"} {
		c.check(os.Mkdir(c.path(name), 0o700))
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	c.check(err)
	address := l.Addr().String()
	c.check(l.Close())
	auth := "none"
	if cephx {
		auth = "cephx"
	}
	fsid, osd := c.uuid(), c.uuid()
	text := strings.NewReplacer("DIR", dir, "FSID", fsid, "ADDRESS", address, "AUTH", auth).Replace(conf)
	c.check(os.WriteFile(c.Conf, []byte(text), 0o600))
	c.makeKeys()
	c.command("monmaptool", "--create", "--fsid", fsid, "--addv", "a", "[v2:"+address+"]", c.path("monmap"))
	c.Run("ceph-mon", "-i", "a", "--mkfs", "--monmap", c.path("monmap"), "--keyring", c.path("all.keyring"))
	t.Cleanup(c.Stop)
	c.Resume("mon")
	c.Resume("mgr")
	c.Run("ceph", "osd", "new", osd)
	c.Run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
	c.Resume("osd")
	c.Run("ceph", "osd", "pool", "create", Pool, "8")
	c.Run("rbd", "pool", "init", Pool)
	for begun := time.Now(); ; { // the manager reports room some seconds later
		out := c.Run("rados", "df", "--format", "json")
		if !strings.Contains(out, `"total_space":0`) {
			return c
		}
		if time.Since(begun) > time.Minute {
			t.Fatalf("the cluster has no room: %s", out)
		}
	}
}

const conf = `[global]
fsid = FSID
mon_host = [v2:ADDRESS/0]
auth_cluster_required = AUTH
auth_service_required = AUTH
auth client required = AUTH
keyring = DIR/$name.keyring
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
keyring = DIR/mon/keyring
[mgr.x]
mgr_data = DIR/mgr
[osd.0]
osd_data = DIR/osd
`

// makeKeys makes a keyring for each user and one of all of them, for the monitor.
func (c *Cluster) makeKeys() {
	all := c.path("all.keyring")
	c.command("ceph-authtool", "--create-keyring", all, "--gen-key", "--name", "mon.", "--cap", "mon", "allow *")
	for name, caps := range map[string][3]string{ // of monitors, OSDs, managers
		"client.admin":   {"allow *", "allow *", "allow *"},
		"client." + User: {"profile rbd", "profile rbd pool=" + Pool, "profile rbd pool=" + Pool},
		"mgr.x":          {"allow profile mgr", "allow *", "allow *"},
		"osd.0":          {"allow profile osd", "allow *", "allow profile osd"},
	} {
		file := c.path(name + ".keyring")
		c.command("ceph-authtool", "--create-keyring", file, "--gen-key", "--name", name,
			"--cap", "mon", caps[0], "--cap", "osd", caps[1], "--cap", "mgr", caps[2])
		c.command("ceph-authtool", all, "--import-keyring", file)
	}
}

// Key is the key of User.
func (c *Cluster) Key() string {
	return strings.TrimSpace(c.command("ceph-authtool", c.path("client."+User+".keyring"), "--name", "client."+User, "--print-key"))
}

func (c *Cluster) path(name string) string { return filepath.Join(c.dir, name) }

func (c *Cluster) check(err error) {
	c.Helper()
	if err != nil {
		c.Fatal(err)
	}
}

func (c *Cluster) uuid() string {
	c.Helper()
	b, err := os.ReadFile("/proc/sys/kernel/random/uuid")
	c.check(err)
	return strings.TrimSpace(string(b))
}

// Run runs a command of Ceph as the administrator, and returns what it prints.
func (c *Cluster) Run(name string, args ...string) string {
	c.Helper()
	return c.command(name, append([]string{"--conf", c.Conf}, args...)...)
}

func (c *Cluster) command(name string, args ...string) string {
	c.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		c.Fatalf("%s %v: %v\n%s%s", name, args, err, out, stderr.String())
	}
	return string(out)
}

// daemon is a process that dies with this one.
type daemon struct {
	*exec.Cmd
	ended chan struct{}
}

// Resume starts a daemon, "mon", "mgr" or "osd", that does not run.
func (c *Cluster) Resume(name string) {
	c.Helper()
	id := map[string]string{"mon": "a", "mgr": "x", "osd": "0"}[name]
	d := &daemon{Cmd: exec.Command("ceph-"+name, "--conf", c.Conf, "-i", id, "-f"), ended: make(chan struct{})}
	d.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	started := make(chan error, 1)
	go func() {
		defer close(d.ended)
		runtime.LockOSThread() // whose end is what the signal is about: it lives for as long as the daemon
		err := d.Start()
		started <- err
		if err == nil {
			_ = d.Wait() // it is killed in the end
		}
	}()
	c.check(<-started)
	c.daemons[name] = d
}

// Kill kills a daemon.
func (c *Cluster) Kill(name string) {
	if d := c.daemons[name]; d != nil {
		_ = d.Process.Kill()
		<-d.ended
	}
	delete(c.daemons, name)
}

// Stop ends all daemons.
func (c *Cluster) Stop() {
	for _, d := range []string{"osd", "mgr", "mon"} {
		c.Kill(d)
	}
}
