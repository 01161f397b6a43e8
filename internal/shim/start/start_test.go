package start

import (
	"bytes"
	"encoding/json"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go/features"
	"google.golang.org/protobuf/proto"

	// Registers the type URL of features as containerd does.
	_ "github.com/containerd/containerd/v2/core/runtime"

	"atoll.dev/atoll/internal/pool/wire"
)

// pool answers one request.
func pool(t *testing.T, dir string, answer wire.Taken) <-chan wire.Request {
	t.Helper()
	l, err := net.Listen("unix", filepath.Join(dir, "pool.sock"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	got := make(chan wire.Request, 1)
	go func() {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		var r wire.Request
		_ = json.NewDecoder(conn).Decode(&r)
		got <- r
		_ = json.NewEncoder(conn).Encode(answer)
	}()
	return got
}

func call(t *testing.T, env map[string]string, in []byte, args ...string) ([]byte, error) {
	t.Helper()
	var out bytes.Buffer
	r := &request{env: func(k string) string { return env[k] }, in: bytes.NewReader(in), out: &out, now: time.Now()}
	if err := r.parse(args); err != nil {
		return nil, err
	}
	err := r.run(t.Context())
	return out.Bytes(), err
}

func TestStart(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	got := pool(t, dir, wire.Taken{Address: "unix:///s", PID: 7})
	in, err := proto.Marshal(&bootapi.BootstrapParams{
		InstanceID: "pod", Namespace: "k8s.io", ContainerdTtrpcAddress: "/c.ttrpc",
		ContainerdGrpcAddress: filepath.Join(dir, "containerd.sock"), LogLevel: bootapi.LogLevel_LOG_LEVEL_DEBUG,
	})
	if err != nil {
		t.Fatal(err)
	}
	out, err := call(t, nil, in, "-namespace", "k8s.io", "-address", "/elsewhere/x.sock", "-publish-binary", "/c", "-id", "pod", "start")
	if err != nil {
		t.Fatal(err)
	}
	var result bootapi.BootstrapResult
	if err := proto.Unmarshal(out, &result); err != nil || result.Version != 3 || result.Protocol != "ttrpc" || result.Address != "unix:///s" {
		t.Errorf("printed %v, %v", &result, err)
	}
	r := <-got
	a := r.Assignment
	if r.Op != wire.OpTake || a.Sandbox != "pod" || a.TTRPC != "/c.ttrpc" || a.Namespace != "k8s.io" || a.Bundle != dir || !a.Debug || a.Since.IsZero() {
		t.Errorf("asked for %+v", a)
	}
}

// TestStartOldStyle: no parameters on standard input, everything in flags and environment.
func TestStartOldStyle(t *testing.T) {
	dir := t.TempDir()
	got := pool(t, dir, wire.Taken{Error: "no memory"})
	env := map[string]string{"TTRPC_ADDRESS": "/t", "ATOLL_RUN_DIR": dir}
	_, err := call(t, env, nil, "-namespace", "ns", "-address", "/elsewhere/x.sock", "-id", "pod", "-debug", "start")
	if err == nil || !strings.Contains(err.Error(), "no memory") {
		t.Errorf("got %v", err)
	}
	if a := (<-got).Assignment; a.Sandbox != "pod" || a.Namespace != "ns" || a.TTRPC != "/t" || !a.Debug {
		t.Errorf("asked for %+v", a)
	}
}

func TestDeleteOfUnknown(t *testing.T) {
	out, err := call(t, map[string]string{"GRPC_ADDRESS": filepath.Join(t.TempDir(), "c.sock")}, nil, "-namespace", "ns", "-id", "container", "-bundle", "/b", "delete")
	if err != nil {
		t.Fatal(err)
	}
	var resp task.DeleteResponse
	if err := proto.Unmarshal(out, &resp); err != nil || resp.ExitStatus != 137 || resp.ExitedAt == nil {
		t.Errorf("printed %v, %v", &resp, err)
	}
}

func TestInfo(t *testing.T) {
	out, err := call(t, nil, nil, "-info")
	if err != nil {
		t.Fatal(err)
	}
	var info types.RuntimeInfo
	if err := proto.Unmarshal(out, &info); err != nil || info.Name != RuntimeName {
		t.Fatalf("printed %v, %v", &info, err)
	}
	typeurl.Register(&features.Features{}, "types.containerd.io/opencontainers/runtime-spec/1/features/Features")
	v, err := typeurl.UnmarshalAny(info.Features)
	if err != nil {
		t.Fatal(err)
	}
	f, ok := v.(*features.Features)
	if !ok || !strings.Contains(strings.Join(f.MountOptions, ","), "rro") || strings.Contains(strings.Join(f.Linux.Namespaces, ","), "user") {
		t.Errorf("features %+v", v)
	}
}

func TestBadCalls(t *testing.T) {
	t.Chdir(t.TempDir())
	for _, args := range [][]string{{"dance"}, {}, {"-unknown"}, {"-id", "../x", "start"}, {"start"}, {"-id", "a/b", "delete"}} {
		if out, err := call(t, map[string]string{"ATOLL_RUN_DIR": t.TempDir()}, nil, args...); err == nil {
			t.Errorf("%v printed %q", args, out)
		}
	}
	if out, err := call(t, nil, nil, "-v"); err != nil || len(out) == 0 {
		t.Errorf("version: %q, %v", out, err)
	}
}

// FuzzParams reads what is on standard input.
func FuzzParams(f *testing.F) {
	in, err := proto.Marshal(&bootapi.BootstrapParams{InstanceID: "pod"})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(in)
	f.Fuzz(func(t *testing.T, b []byte) {
		r := &request{env: os.Getenv, in: bytes.NewReader(b)}
		if p, err := r.params(); err == nil && filepath.Base(p.InstanceID) != p.InstanceID {
			t.Errorf("id %q", p.InstanceID)
		}
	})
}
