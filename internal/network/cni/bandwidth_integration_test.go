//go:build integration

package cni_test

import (
	"fmt"
	"io"
	"math"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"atoll.dev/atoll/internal/linux/netns"
	"atoll.dev/atoll/internal/network/cniconf"
	"atoll.dev/atoll/internal/network/networktest"
)

// transfer sends n bytes from one namespace to a listener in another and
// returns how long it took until all had arrived.
func transfer(t *testing.T, from, to, addr string, n int64) time.Duration {
	t.Helper()
	var l net.Listener
	networktest.Do(t, to, func() (err error) {
		l, err = net.Listen("tcp4", addr+":0")
		return err
	})
	defer l.Close()
	var c net.Conn
	networktest.Do(t, from, func() (err error) {
		c, err = net.Dial("tcp4", l.Addr().String())
		return err
	})
	s, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	start := time.Now()
	go func() {
		_, _ = io.CopyN(c, zeros{}, n)
		_ = c.Close()
	}()
	if got, err := io.Copy(io.Discard, s); err != nil || got != n {
		t.Fatalf("received %d bytes, %v", got, err)
	}
	return time.Since(start)
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }

// shaped is what queues packets in a namespace, and the rates of those queues in bytes per second.
func shaped(t *testing.T, path string) string {
	t.Helper()
	var out []string
	networktest.Do(t, path, func() error {
		all, err := netlink.QdiscList(nil)
		for _, q := range all {
			if bucket, ok := q.(*netlink.Tbf); ok {
				out = append(out, fmt.Sprint(bucket.Type(), " ", bucket.Rate))
			} else if q.Type() != "noqueue" {
				out = append(out, q.Type())
			}
		}
		return err
	})
	return strings.Join(out, ", ")
}

func TestBandwidthIsLimited(t *testing.T) {
	lab := newLab(t)
	pod, free := lab.Pod(t, "a"), lab.Pod(t, "b")
	// What containerd asks for when a pod has the annotations.
	addr := lab.Add(t, "a", pod, cniconf.RuntimeConfig{Bandwidth: &cniconf.Bandwidth{
		IngressRate: 10e6, IngressBurst: math.MaxUint32, EgressRate: 20e6, EgressBurst: math.MaxUint32,
	}}).String()
	lab.Add(t, "b", free, cniconf.RuntimeConfig{})
	const size = 2 << 20
	for _, tc := range []struct {
		name, from, to, addr string
		rate                 float64 // bytes per second
	}{
		{"ingress", lab.Host, pod, addr, 10e6 / 8},
		{"egress", pod, lab.World, networktest.WorldAddress, 20e6 / 8},
	} {
		burst := max(tc.rate/10, 64<<10)
		want := time.Duration((size - burst) / tc.rate * float64(time.Second))
		took := transfer(t, tc.from, tc.to, tc.addr, size)
		t.Logf("%s: %d bytes took %s, %s at the limit", tc.name, size, took, want)
		if took < want*9/10 {
			t.Errorf("%s: %d bytes took %s, want %s", tc.name, size, took, want)
		}
		if got, want := shaped(t, tc.from), fmt.Sprintf("tbf %.0f", tc.rate); got != want {
			t.Errorf("%s: packets are held back by %q, want %q alone", tc.name, got, want)
		}
	}
	if got := shaped(t, free); got != "" {
		t.Errorf("packets of a pod without limits are held back by %q", got)
	}
	if err := netns.Remove(pod); err != nil {
		t.Fatal(err)
	}
	lab.Del(t, "a", pod)
	lab.Del(t, "b", free)
	expectClean(t, lab)
}
