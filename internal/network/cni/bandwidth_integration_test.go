//go:build integration

package cni_test

import (
	"io"
	"math"
	"net"
	"testing"
	"time"

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

func TestBandwidthIsLimited(t *testing.T) {
	lab := newLab(t)
	pod, free := lab.Pod(t, "a"), lab.Pod(t, "b")
	// What containerd asks for when a pod has the annotations.
	addr := lab.Add(t, "a", pod, cniconf.RuntimeConfig{Bandwidth: &cniconf.Bandwidth{
		IngressRate: 10e6, IngressBurst: math.MaxUint32, EgressRate: 20e6, EgressBurst: math.MaxUint32,
	}}).String()
	freeAddr := lab.Add(t, "b", free, cniconf.RuntimeConfig{}).String()
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
		if took < want*9/10 || took > want*3+time.Second {
			t.Errorf("%s: %d bytes took %s, want about %s", tc.name, size, took, want)
		}
	}
	if took := transfer(t, lab.Host, free, freeAddr, 20<<20); took > 2*time.Second {
		t.Errorf("a pod without limits is slow: %s", took)
	}
	if err := netns.Remove(pod); err != nil {
		t.Fatal(err)
	}
	lab.Del(t, "a", pod)
	lab.Del(t, "b", free)
	expectClean(t, lab)
}
