//go:build ceph

package rbd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"testing"
	"time"

	"atoll.dev/atoll/internal/storage/datastore"
	"atoll.dev/atoll/internal/storage/datastore/enginetest"
	"atoll.dev/atoll/internal/storage/datastore/rbd/cephtest"
)

// cluster is a cluster with authentication, used by a user who may do nothing but RBD.
type cluster struct{ *cephtest.Cluster }

// config is a datastore in a namespace of its own.
func (c cluster) config(name string) Config {
	c.Helper()
	c.Run("rbd", "namespace", "create", cephtest.Pool+"/"+name)
	return Config{Pool: cephtest.Pool, Namespace: name, Conf: c.Conf, User: cephtest.User}
}

func TestCeph(t *testing.T) {
	c := cluster{cephtest.Start(t, true)}
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
	t.Run("CutOff", func(t *testing.T) { c.cutOff(t, c.config("cut")) })
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
		c.Kill("mon")
		begun := time.Now()
		_, err = s.Create(t.Context(), datastore.Spec{ID: "v", Size: 1 << 30})
		if took := time.Since(begun); !errors.Is(err, datastore.ErrUnavailable) || took > 20*time.Second {
			t.Errorf("%v after %s", err, took)
		}
	})
}

// cutOff: who owns the lock of an image and watches it no more is cut off as well, and for years.
func (c cluster) cutOff(t *testing.T, config Config) {
	config.Timeout = 30 * time.Second
	p := &place{Config: config}
	image := p.spec("image")
	c.Run("rbd", "create", "--size", "16", image)
	if err := p.fence("image"); err != nil {
		t.Fatal(err)
	}
	before := c.Run("ceph", "osd", "blocklist", "ls")
	c.Run("rbd", "lock", "add", image, "gone") // by a process that ends at once
	owners, err := p.owners("image")
	if err != nil || len(owners) != 1 || strings.Contains(before, owners[0].Address) {
		t.Fatalf("owners %v, %v; cut off before: %s", owners, err, before)
	}
	if err := p.fence("image"); err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(c.Run("ceph", "osd", "blocklist", "ls")) {
		address, until, _ := strings.Cut(strings.TrimSpace(line), " ")
		if address == owners[0].Address && until > time.Now().AddDate(9, 0, 0).Format(time.DateOnly) {
			return
		}
	}
	t.Errorf("%s is not cut off for long: %s", owners[0].Address, c.Run("ceph", "osd", "blocklist", "ls"))
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
	lock := exec.Command("rados", "--conf", config.Conf, "--id", config.User, "--pool", config.Pool, "--namespace", config.Namespace,
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
