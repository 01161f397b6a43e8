//go:build integration

package network_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/linux/netns"
	"atoll.dev/atoll/internal/network"
	"atoll.dev/atoll/internal/network/cniconf"
)

// dialIn connects from inside a namespace, like containerd's port-forward.
func dialIn(path, network, to string) (conn net.Conn, err error) {
	err = netns.Do(path, func() error {
		conn, err = net.DialTimeout(network, to, 20*time.Second)
		return err
	})
	return conn, err
}

func TestPortForward(t *testing.T) {
	lab := newLab(t)
	pod := lab.Pod(t, "a")
	lab.Add(t, "a", pod, cniconf.RuntimeConfig{})
	// The "guest" reads to the end, then answers with what it read.
	guest, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer guest.Close()
	go func() {
		for {
			c, err := guest.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				b, _ := io.ReadAll(c)
				_, _ = c.Write(append([]byte("got "), b...))
			}()
		}
	}()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- network.ServePortForward(ctx, pod, func(_ context.Context, port uint16) (net.Conn, error) {
			if port != 80 && port != 65535 {
				return nil, errors.New("nothing listens there")
			}
			return net.Dial("tcp", guest.Addr().String())
		})
	}()
	waitFor(t, func() bool {
		c, err := dialIn(pod, "tcp4", "127.0.0.1:80")
		if err == nil {
			_ = c.Close()
		}
		return err == nil
	})
	for _, to := range []struct{ network, addr string }{
		{"tcp4", "127.0.0.1:80"}, {"tcp6", "[::1]:80"}, {"tcp4", "127.0.0.1:65535"}, {"tcp4", "127.1.2.3:80"},
	} {
		c, err := dialIn(pod, to.network, to.addr)
		if err != nil {
			t.Errorf("%s: %v", to.addr, err)
			continue
		}
		msg := strings.Repeat("x", 1<<20)
		go func() {
			_, _ = io.WriteString(c, msg)
			_ = c.(*net.TCPConn).CloseWrite()
		}()
		b, err := io.ReadAll(c)
		if err != nil || string(b) != "got "+msg {
			t.Errorf("%s: got %d bytes, %v", to.addr, len(b), err)
		}
		_ = c.Close()
	}
	// A port nobody serves is reset.
	c, err := dialIn(pod, "tcp4", "127.0.0.1:81")
	if err == nil {
		_, err = c.Read(make([]byte, 1))
	}
	if !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("port without a server: %v", err)
	}
	// Ending it closes what is open, and it can be started again.
	open, err := dialIn(pod, "tcp4", "127.0.0.1:80")
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Errorf("after the end: %v", err)
	}
	if _, err := open.Read(make([]byte, 1)); err == nil {
		t.Error("connection survives the end of forwarding")
	}
	ctx, cancel = context.WithCancel(context.Background())
	defer cancel()
	go func() {
		done <- network.ServePortForward(ctx, pod, func(context.Context, uint16) (net.Conn, error) {
			return net.Dial("tcp", guest.Addr().String())
		})
	}()
	waitFor(t, func() bool {
		c, err := dialIn(pod, "tcp4", "127.0.0.1:81")
		if err != nil {
			return false
		}
		defer c.Close()
		_ = c.(*net.TCPConn).CloseWrite()
		b, err := io.ReadAll(c)
		return err == nil && string(b) == "got "
	})
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestPortForwardWithoutPod(t *testing.T) {
	err := network.ServePortForward(context.Background(), filepath.Join(t.TempDir(), "gone"), nil)
	if err == nil || !strings.Contains(err.Error(), "no such file") {
		t.Errorf("error %v", err)
	}
}

func waitFor(t *testing.T, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); time.Now().Before(end); {
		if ok() {
			return
		}
		<-time.After(10 * time.Millisecond)
	}
	t.Fatal(fmt.Errorf("condition not reached in a minute"))
}
