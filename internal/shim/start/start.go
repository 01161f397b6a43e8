// Package start is what containerd executes: "start" asks the warm pool for a shim daemon, or starts one for a
// virtual machine, and prints where it listens, "delete" ends a daemon and cleans up after it, "-info" describes the runtime.
//
// All of them are short-lived and hold no state. The protocol is containerd's shim bootstrap
// (containerd 2.3, pkg/shim and core/runtime/v2/binary.go): parameters in protobuf on standard input,
// the answer in protobuf on standard output, flags and environment as older versions had them.
// internal/shim calls Main.
//
// What can go wrong: there is no pool (start waits for it, it may be restarting), or it cannot make a
// micro-VM; the error goes to standard error, from where containerd takes it.
package start

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	task "github.com/containerd/containerd/api/runtime/task/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"atoll.dev/atoll/internal/pool/registry"
	"atoll.dev/atoll/internal/pool/wire"
)

const (
	// RuntimeName is the name of the runtime in containerd's configuration.
	RuntimeName = "io.containerd.atoll.v1"
	// shimVersion is that of the sandbox API: one shim serves all containers of a sandbox.
	shimVersion = 3
	// startTimeout bounds the wait for a micro-VM, in a burst or while the pool restarts. With the start of the
	// sandbox after it that is within the four minutes that the kubelet waits.
	startTimeout = 2 * time.Minute
	// deleteTimeout is within the 5 s that containerd gives.
	deleteTimeout = 4 * time.Second
	// maxParams bounds the parameters.
	maxParams = 10 << 20
)

// Environment of a shim.
const (
	envRunDir = "ATOLL_RUN_DIR" // default: the directory of containerd's socket
	envTTRPC  = "TTRPC_ADDRESS"
	envGRPC   = "GRPC_ADDRESS"
)

// request is one call of the shim binary.
type request struct {
	id, namespace, address, bundle string
	debug, info, version           bool
	action                         string
	machine                        bool // for virtual machines

	env func(string) string
	in  io.Reader
	out io.Writer
	now time.Time
}

// Main carries out one call.
func Main(args []string) int { return serveCall(args, false) }

// MachineMain carries out one call for the pod of a virtual machine.
func MachineMain(args []string) int { return serveCall(args, true) }

func serveCall(args []string, machine bool) int {
	r := &request{env: os.Getenv, in: os.Stdin, out: os.Stdout, now: time.Now(), machine: machine}
	err := r.parse(args)
	if err == nil {
		err = r.run(context.Background())
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", RuntimeName, err)
		return 1
	}
	return 0
}

// parse reads the flags that containerd sets, in its own spelling.
func (r *request) parse(args []string) error {
	f := flag.NewFlagSet(RuntimeName, flag.ContinueOnError)
	f.StringVar(&r.id, "id", "", "id of the sandbox")
	f.StringVar(&r.namespace, "namespace", "", "containerd namespace")
	f.StringVar(&r.address, "address", "", "address of containerd")
	f.StringVar(&r.bundle, "bundle", "", "bundle, if it is not the working directory")
	f.String("publish-binary", "", "not used")
	f.BoolVar(&r.debug, "debug", false, "log more")
	f.BoolVar(&r.info, "info", false, "print what the runtime can do")
	f.BoolVar(&r.version, "v", false, "print the version")
	f.BoolVar(&r.version, "version", false, "print the version")
	if err := f.Parse(args); err != nil {
		return err
	}
	r.action = f.Arg(0)
	return nil
}

func (r *request) run(ctx context.Context) error {
	switch {
	case r.version:
		_, err := fmt.Fprintln(r.out, RuntimeName)
		return err
	case r.info:
		return r.printInfo()
	case r.action == "start":
		return r.start(ctx)
	case r.action == "delete":
		return r.delete(ctx)
	}
	return fmt.Errorf("unknown action %q; containerd executes this program", r.action)
}

// start gets a daemon from the pool and says where it listens.
func (r *request) start(ctx context.Context) error {
	params, err := r.params()
	if err != nil {
		return err
	}
	bundle, err := os.Getwd()
	if err != nil {
		return fmt.Errorf("finding bundle: %w", err)
	}
	if r.machine {
		address, err := r.startMachine(params, bundle)
		if err != nil {
			return err
		}
		return r.print(&bootapi.BootstrapResult{Version: shimVersion, Protocol: "ttrpc", Address: address})
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	taken, err := wire.Take(ctx, r.poolSocket(params.GetContainerdGrpcAddress()), wire.Assignment{
		Sandbox: params.GetInstanceID(), Namespace: params.GetNamespace(), TTRPC: params.GetContainerdTtrpcAddress(),
		Bundle: bundle, Since: r.now, Debug: params.GetLogLevel() <= bootapi.LogLevel_LOG_LEVEL_DEBUG,
	})
	if err != nil {
		return err
	}
	return r.print(&bootapi.BootstrapResult{Version: shimVersion, Protocol: "ttrpc", Address: taken.Address})
}

// params reads the bootstrap parameters, and takes flags and environment for what they do not say.
func (r *request) params() (*bootapi.BootstrapParams, error) {
	data, err := io.ReadAll(io.LimitReader(r.in, maxParams))
	if err != nil {
		return nil, fmt.Errorf("reading parameters: %w", err)
	}
	p := &bootapi.BootstrapParams{}
	if err := proto.Unmarshal(data, p); err != nil || p.InstanceID == "" {
		p = &bootapi.BootstrapParams{
			InstanceID: r.id, Namespace: r.namespace,
			ContainerdGrpcAddress: r.address, ContainerdTtrpcAddress: r.env(envTTRPC),
		}
		if r.debug {
			p.LogLevel = bootapi.LogLevel_LOG_LEVEL_DEBUG
		}
	}
	if p.InstanceID == "" || filepath.Base(p.InstanceID) != p.InstanceID {
		return nil, fmt.Errorf("sandbox id %q is not valid", p.InstanceID)
	}
	return p, nil
}

// runDir is where the pool of this containerd is.
func (r *request) runDir(grpc string) string {
	if dir := r.env(envRunDir); dir != "" {
		return dir
	}
	for _, address := range []string{grpc, r.address, r.env(envGRPC)} {
		if address != "" {
			return filepath.Dir(strings.TrimPrefix(address, "unix://"))
		}
	}
	return "/run/atoll"
}

func (r *request) poolSocket(grpc string) string {
	return filepath.Join(r.runDir(grpc), "pool.sock")
}

// delete ends the daemon of a sandbox, if there is one. containerd also asks for containers, which end
// with their sandbox: for them there is nothing to do.
func (r *request) delete(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, deleteTimeout)
	defer cancel()
	reg := registry.New(r.runDir(""))
	e, ok, err := reg.Find(r.id)
	if ok {
		err = errors.Join(err, reg.End(ctx, e))
	}
	if err != nil {
		return err
	}
	const killed = 137
	return r.print(&task.DeleteResponse{Pid: uint32(e.QEMU), ExitStatus: killed, ExitedAt: timestamppb.New(r.now)})
}

func (r *request) print(m proto.Message) error {
	data, err := proto.Marshal(m)
	if err != nil {
		return fmt.Errorf("encoding answer: %w", err)
	}
	if _, err := r.out.Write(data); err != nil {
		return fmt.Errorf("answering: %w", err)
	}
	return nil
}
