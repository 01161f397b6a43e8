// Package detach keeps `atoll up` running in the background: as a systemd unit
// where systemd is process 1, and with a small keeper process elsewhere.
//
// The keeper starts `atoll up`, waits for its end and starts it again; `atoll
// up` in turn starts the keeper again when that dies, so that killing either
// heals. They stop when the keep file in the run directory is gone. Without
// systemd nothing starts Atoll after a reboot.
//
// It is called by the command line. What can go wrong: systemctl refuses, or
// the data directory is on a file system mounted noexec.
package detach

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"atoll.dev/atoll/internal/datadir"
	"atoll.dev/atoll/internal/datadir/atomicfile"
	"atoll.dev/atoll/internal/linux/process"
	"atoll.dev/atoll/internal/supervise"
)

// Detacher starts and stops background supervisors of one data directory.
type Detacher struct {
	tree   datadir.Tree
	logger *slog.Logger
	// systemd is the directory of unit files, "" where systemd does not run.
	systemd string
}

// New returns a detacher that uses systemd if it is process 1.
func New(tree datadir.Tree, logger *slog.Logger) *Detacher {
	d := &Detacher{tree: tree, logger: logger}
	if info, err := os.Stat("/run/systemd/system"); err == nil && info.IsDir() {
		d.systemd = "/etc/systemd/system"
	}
	return d
}

// InstallBinary copies the running binary into the data directory, so that the
// background supervisor does not depend on where it was built. It reports
// whether the copy changed.
func (d *Detacher) InstallBinary() (changed bool, err error) {
	src, err := os.Open("/proc/self/exe")
	if err != nil {
		return false, fmt.Errorf("opening this binary: %w", err)
	}
	defer src.Close()
	dst := d.tree.Atoll()
	if same, err := sameContent(src, dst); err != nil || same {
		return false, err
	}
	tmp, err := os.CreateTemp(filepath.Dir(dst), ".atoll.*")
	if err != nil {
		return false, fmt.Errorf("copying the binary: %w", err)
	}
	defer os.Remove(tmp.Name()) // fails when all went well
	_, err = io.Copy(tmp, src)
	err = errors.Join(err, tmp.Chmod(0o755), tmp.Sync(), tmp.Close())
	if err == nil {
		err = os.Rename(tmp.Name(), dst)
	}
	if err != nil {
		return false, fmt.Errorf("copying the binary: %w", err)
	}
	return true, nil
}

// sameContent compares src with the file at path and rewinds src.
func sameContent(src *os.File, path string) (bool, error) {
	dst, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("opening the installed binary: %w", err)
	}
	defer dst.Close()
	same, err := equalFiles(src, dst)
	if err != nil {
		return false, fmt.Errorf("comparing binaries: %w", err)
	}
	if _, err := src.Seek(0, io.SeekStart); err != nil {
		return false, fmt.Errorf("comparing binaries: %w", err)
	}
	return same, nil
}

func equalFiles(a, b *os.File) (bool, error) {
	ia, err := a.Stat()
	if err != nil {
		return false, err
	}
	ib, err := b.Stat()
	if err != nil {
		return false, err
	}
	if os.SameFile(ia, ib) {
		return true, nil
	}
	if ia.Size() != ib.Size() {
		return false, nil
	}
	bufA, bufB := make([]byte, 1<<20), make([]byte, 1<<20)
	for {
		n, errA := io.ReadFull(a, bufA)
		m, errB := io.ReadFull(b, bufB)
		if n != m || string(bufA[:n]) != string(bufB[:m]) {
			return false, nil
		}
		if errA != nil || errB != nil {
			if errors.Is(errA, io.EOF) || errors.Is(errA, io.ErrUnexpectedEOF) {
				return true, nil
			}
			return false, errors.Join(errA, errB)
		}
	}
}

// Start begins to keep a supervisor running. It is fine to call it when one
// runs already.
func (d *Detacher) Start(ctx context.Context) error {
	if d.systemd != "" {
		return d.startUnit(ctx)
	}
	if err := atomicfile.Write(d.tree.Keep(), nil, 0o600); err != nil {
		return fmt.Errorf("noting that atoll is to be kept running: %w", err)
	}
	return d.ensureKeeper()
}

// Disable ends the keeping, now and after a reboot; the supervisor itself goes
// on. It is fine to call it when nothing is kept.
func (d *Detacher) Disable(ctx context.Context) error {
	if err := os.Remove(d.tree.Keep()); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("ending the keeping of atoll: %w", err)
	}
	if d.systemd != "" {
		if _, err := os.Stat(d.unitFile()); err == nil {
			return systemctl(ctx, "disable", d.unit())
		}
	}
	return nil
}

// Stop ends the supervisor that systemd runs, and the keeper. The caller has
// called Disable before.
func (d *Detacher) Stop(ctx context.Context) error {
	if d.systemd != "" {
		if _, err := os.Stat(d.unitFile()); err == nil {
			return systemctl(ctx, "stop", d.unit())
		}
	}
	pid, err := named(ctx, d.tree.KeeperHolder)
	if err != nil || pid == 0 {
		return err
	}
	keeper, err := process.Read(pid)
	if err != nil {
		return nil // it has just ended
	}
	return process.End(ctx, 5*time.Second, keeper)
}

// Purge removes the unit file.
func (d *Detacher) Purge(ctx context.Context) error {
	if d.systemd == "" {
		return nil
	}
	if err := os.Remove(d.unitFile()); errors.Is(err, os.ErrNotExist) {
		return nil
	} else if err != nil {
		return fmt.Errorf("removing the unit file: %w", err)
	}
	return systemctl(ctx, "daemon-reload")
}

func (d *Detacher) unit() string     { return d.tree.Instance() + ".service" }
func (d *Detacher) unitFile() string { return filepath.Join(d.systemd, d.unit()) }

// unitText is the systemd unit. KillMode=process leaves pods alone when the
// supervisor stops, and Delegate lets the kubelet make cgroups.
func unitText(t datadir.Tree) string {
	return fmt.Sprintf(`[Unit]
Description=Atoll supervisor on %[1]s
Wants=network-online.target
After=network-online.target

[Service]
ExecStart=%[2]s up --background --data-dir=%[1]s
Restart=always
RestartSec=1
KillMode=process
Delegate=yes
LimitNOFILE=1048576
LimitNPROC=infinity
TasksMax=infinity
TimeoutStopSec=180
StandardOutput=append:%[3]s
StandardError=append:%[3]s

[Install]
WantedBy=multi-user.target
`, t.Root(), t.Atoll(), t.Log("up"))
}

func (d *Detacher) startUnit(ctx context.Context) error {
	changed, err := atomicfile.WriteIfChanged(d.unitFile(), []byte(unitText(d.tree)), 0o644)
	if err != nil {
		return fmt.Errorf("writing the unit file: %w", err)
	}
	if changed {
		if err := systemctl(ctx, "daemon-reload"); err != nil {
			return err
		}
	}
	return systemctl(ctx, "enable", "--now", d.unit())
}

func systemctl(ctx context.Context, args ...string) error {
	out, err := exec.CommandContext(ctx, "systemctl", args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("running systemctl %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}

// ensureKeeper starts a keeper when none runs.
func (d *Detacher) ensureKeeper() error {
	pid, err := d.tree.KeeperHolder()
	if errors.Is(err, datadir.ErrUnnamed) {
		return nil // it has just begun
	}
	if err != nil || pid != 0 {
		return err
	}
	return d.spawn("keeper", "keeper")
}

// spawn starts the installed binary in a session of its own, not tied to this
// process.
func (d *Detacher) spawn(log string, args ...string) error {
	out, err := supervise.OpenLog(d.tree.Log(log))
	if err != nil {
		return err
	}
	defer out.Close()
	cmd := exec.Command(d.tree.Atoll(), append(args, "--data-dir="+d.tree.Root())...)
	cmd.Args[0] = "atoll"
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("starting %s: %w", strings.Join(cmd.Args, " "), err)
	}
	go func() { _ = cmd.Wait() }() // no zombie while this process lives
	return nil
}
