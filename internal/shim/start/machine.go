package start

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/pool/registry"
	"atoll.dev/atoll/internal/shim/machine/config"
)

// daemonTimeout bounds how long the daemon of a virtual machine may take until it listens, which is a moment unless the
// host stands still. It is within the four minutes that the kubelet waits.
const daemonTimeout = 2 * time.Minute

// startMachine starts the daemon of a virtual machine and returns its address. The daemon's user id is chosen under
// a lock that is held until the daemon is on record with it.
func (r *request) startMachine(params *bootapi.BootstrapParams, bundle string) (string, error) {
	runDir := r.runDir(params.GetContainerdGrpcAddress())
	cfg, err := config.Load(runDir)
	if err != nil {
		return "", fmt.Errorf("%w; is atoll running?", err)
	}
	unlock, err := lock(filepath.Join(runDir, "machines.lock"))
	if err != nil {
		return "", err
	}
	defer unlock()
	uid, err := freeUser(registry.New(runDir), cfg)
	if err != nil {
		return "", err
	}
	id := make([]byte, 6)
	_, _ = rand.Read(id) // never fails
	return spawn(config.Order{
		Member: "m" + hex.EncodeToString(id), UID: uid, Sandbox: params.GetInstanceID(), Namespace: params.GetNamespace(),
		TTRPC: params.GetContainerdTtrpcAddress(), Bundle: bundle, Config: cfg,
		Debug: params.GetLogLevel() <= bootapi.LogLevel_LOG_LEVEL_DEBUG,
	})
}

func lock(name string) (unlock func(), err error) {
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("locking user ids: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		return nil, errors.Join(fmt.Errorf("locking user ids: %w", err), f.Close())
	}
	return func() { _ = f.Close() }, nil
}

// freeUser finds a user that nothing runs as and no daemon is on record with.
func freeUser(reg registry.Registry, cfg config.Config) (uint32, error) {
	taken := map[uint32]bool{}
	entries, err := reg.List()
	if err != nil {
		return 0, err
	}
	for _, e := range entries {
		taken[e.UID] = true
	}
	processes, err := os.ReadDir("/proc")
	if err != nil {
		return 0, fmt.Errorf("looking for used user ids: %w", err)
	}
	for _, p := range processes {
		if _, err := strconv.Atoi(p.Name()); err != nil {
			continue
		}
		if st, err := os.Stat("/proc/" + p.Name()); err == nil {
			taken[st.Sys().(*syscall.Stat_t).Uid] = true
		}
	}
	for uid := cfg.UIDBase; uid < cfg.UIDBase+cfg.UIDCount; uid++ {
		if !taken[uid] {
			return uid, nil
		}
	}
	return 0, fmt.Errorf("all %d user ids for virtual machines are in use", cfg.UIDCount)
}

// spawn starts a daemon and waits until it listens.
func spawn(o config.Order) (string, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return "", fmt.Errorf("making a socket pair: %w", err)
	}
	mine, theirs := os.NewFile(uintptr(fds[0]), "ours"), os.NewFile(uintptr(fds[1]), "theirs")
	defer mine.Close()
	conn, err := net.FileConn(mine)
	if err != nil {
		return "", errors.Join(fmt.Errorf("making a socket pair: %w", err), theirs.Close())
	}
	defer conn.Close()
	// containerd waits for the end of this process's output, which the daemon must not hold.
	cmd := &exec.Cmd{
		Path: o.Config.Binary, Args: []string{"atoll-pod", registry.Role, o.Member, config.Role},
		Env: []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}, Dir: "/", ExtraFiles: []*os.File{theirs},
		SysProcAttr: &syscall.SysProcAttr{Setsid: true},
	}
	err = cmd.Start()
	_ = theirs.Close()
	if err != nil {
		return "", fmt.Errorf("starting a shim daemon: %w", err)
	}
	_ = conn.SetDeadline(time.Now().Add(daemonTimeout))
	var s config.Started
	err = json.NewEncoder(conn).Encode(o)
	if err == nil {
		err = json.NewDecoder(io.LimitReader(conn, maxParams)).Decode(&s)
	}
	if err == nil && s.Error != "" {
		err = errors.New(s.Error)
	}
	if err != nil {
		return "", errors.Join(fmt.Errorf("starting a shim daemon: %w", err), cmd.Process.Kill())
	}
	return s.Address, cmd.Process.Release()
}
