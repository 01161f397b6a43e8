package guest

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"

	guestv1 "atoll.dev/atoll/api/guest/v1"
	"atoll.dev/atoll/internal/guest/container"
	"atoll.dev/atoll/internal/guest/volume"
)

func TestCountList(t *testing.T) {
	for list, want := range map[string]int{"0": 1, "0-3": 4, "0-1,4,6-7": 5, "": 0, "3-1": 0, "x": 0} {
		if got := countList(list); got != want {
			t.Errorf("%q: %d, want %d", list, got, want)
		}
	}
}

func TestParseNetwork(t *testing.T) {
	ok := &guestv1.Network{
		Mac: "02:00:00:00:00:01", Addresses: []string{"10.0.0.2/24", "fd00::2/64"},
		Routes: []*guestv1.Route{{Destination: "0.0.0.0/0", Gateway: "10.0.0.1"}, {Destination: "fd01::/64"}},
	}
	n, err := parseNetwork(ok)
	if err != nil || len(n.addresses) != 2 || len(n.routes) != 2 || n.routes[1].gateway.IsValid() {
		t.Errorf("%+v, %v", n, err)
	}
	if n, err := parseNetwork(nil); n != nil || err != nil {
		t.Errorf("no network: %v, %v", n, err)
	}
	for _, bad := range []*guestv1.Network{
		{Mac: "x"},
		{Mac: ok.Mac, Addresses: []string{"10.0.0.1"}},
		{Mac: ok.Mac, Routes: []*guestv1.Route{{Destination: "default"}}},
		{Mac: ok.Mac, Routes: []*guestv1.Route{{Destination: "::/0", Gateway: "gw"}}},
	} {
		if _, err := parseNetwork(bad); !errors.Is(err, errInvalid) {
			t.Errorf("%v: %v", bad, err)
		}
	}
}

func TestStatus(t *testing.T) {
	for err, want := range map[error]codes.Code{
		container.ErrNotFound: codes.NotFound, volume.ErrExists: codes.AlreadyExists, errNotReady: codes.FailedPrecondition,
		errInvalid: codes.InvalidArgument, errors.New("x"): codes.Unknown,
	} {
		if got := grpcstatus.Code(status(err)); got != want {
			t.Errorf("%v: %v, want %v", err, got, want)
		}
	}
	if status(nil) != nil {
		t.Error("an error for nil")
	}
}

func TestBarrier(t *testing.T) {
	for in, ok := range map[string]bool{"ATOLLGO\nrest": true, "ATOLLNO\n": false, "": false, strings.Repeat("x", 100): false} {
		var out bytes.Buffer
		p := strings.NewReader(in)
		err := barrier(readWriter{p, &out})
		if (err == nil) != ok || out.String() != "ATOLLRDY" {
			t.Errorf("%q: %v, wrote %q", in, err, out.String())
		}
		if ok && p.Len() != len("rest") {
			t.Errorf("%d bytes left, want those after the line", p.Len())
		}
	}
}

type readWriter struct {
	*strings.Reader
	out *bytes.Buffer
}

func (r readWriter) Write(p []byte) (int, error) { return r.out.Write(p) }
