package serial

import (
	"io"
	"net"
	"strings"
	"testing"
	"time"
)

func TestPort(t *testing.T) {
	ours, guest := net.Pipe()
	c := New(ours)
	early := c.Follow()
	if _, err := guest.Write([]byte("boot\r\n")); err != nil {
		t.Fatal(err)
	}
	read := func(f io.Reader, want string) {
		t.Helper()
		buf := make([]byte, len(want))
		if _, err := io.ReadFull(f, buf); err != nil || string(buf) != want {
			t.Fatalf("%q, %v; want %q", buf, err, want)
		}
	}
	read(early, "boot\r\n")
	late := c.Follow()
	read(late, "boot\r\n")
	go func() { _, _ = late.Write([]byte("ls\n")) }()
	buf := make([]byte, 3)
	if _, err := io.ReadFull(guest, buf); err != nil || string(buf) != "ls\n" {
		t.Fatalf("%q, %v", buf, err)
	}
	// Nobody waits for a reader that does not read.
	line := []byte(strings.Repeat("x", 1023) + "\n")
	for range 2 * followBytes / len(line) {
		if _, err := guest.Write(line); err != nil {
			t.Fatal(err)
		}
	}
	if err := late.Close(); err != nil {
		t.Fatal(err)
	}
	end := time.Now().Add(time.Minute)
	for f, lost := early.(*follower), 0; lost < followBytes; time.Sleep(time.Millisecond) { // until all has come
		if time.Now().After(end) {
			t.Fatalf("%d bytes are lost", lost)
		}
		f.mu.Lock()
		lost = f.lost
		f.mu.Unlock()
	}
	read(early, strings.Repeat(string(line), followBytes/len(line)))
	if _, err := guest.Write([]byte("more")); err != nil {
		t.Fatal(err)
	}
	all := make([]byte, 20)
	if _, err := io.ReadFull(early, all); err != nil || !strings.HasPrefix(string(all), "\r\n[262144 bytes") {
		t.Fatalf("%q, %v", all, err)
	}
	_ = guest.Close()
	if rest, err := io.ReadAll(early); err != nil || !strings.HasSuffix(string(rest), "more") {
		t.Errorf("%q, %v", rest, err)
	}
	if _, err := io.ReadAll(c.Follow()); err != nil {
		t.Error(err)
	}
}
