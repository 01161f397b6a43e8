package image

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// listsMaxAge is how old the package lists may be before they are fetched again.
const listsMaxAge = 24 * time.Hour

// deb is a package that apt chose.
type deb struct {
	file   string // name in the archive directory
	sha256 string
}

// apt runs the host's apt with its own state: no installed packages, own lists,
// own downloads. Only mirrors, keys and transport settings are the host's.
type apt struct {
	dir string
	log *slog.Logger
}

// lock keeps several builds from using the state at once.
func (a *apt) lock() (release func(), err error) {
	for _, dir := range []string{"state/lists/partial", "archives/partial", "cache/none/partial"} {
		if err := os.MkdirAll(filepath.Join(a.dir, dir), 0o755); err != nil {
			return nil, fmt.Errorf("creating apt state: %w", err)
		}
	}
	file, err := os.OpenFile(filepath.Join(a.dir, "lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, fmt.Errorf("opening apt lock: %w", err)
	}
	if err := unix.Flock(int(file.Fd()), unix.LOCK_EX); err != nil {
		return nil, errors.Join(fmt.Errorf("locking apt state: %w", err), file.Close())
	}
	return func() { _ = file.Close() }, nil
}

// configure writes the apt configuration.
func (a *apt) configure(ctx context.Context) error {
	for _, tool := range []string{"apt-get", "apt-config", "dpkg-deb"} {
		if _, err := exec.LookPath(tool); err != nil {
			return fmt.Errorf("the recipe lists Debian packages, which needs %s on this host: %w", tool, err)
		}
	}
	host, err := output(exec.CommandContext(ctx, "apt-config", "dump", "Acquire"))
	if err != nil {
		return err
	}
	var config bytes.Buffer
	for line := range bytes.Lines(host) {
		if bytes.HasPrefix(line, []byte("Acquire::")) && !bytes.HasPrefix(line, []byte("Acquire::IndexTargets")) {
			config.Write(line)
		}
	}
	for _, option := range [][2]string{
		{"Dir::Etc::parts", "/dev/null"},
		{"Dir::Etc::main", "/dev/null"},
		{"Dir::State", filepath.Join(a.dir, "state")},
		{"Dir::State::status", filepath.Join(a.dir, "status")},
		{"Dir::Cache", filepath.Join(a.dir, "cache")},
		{"Dir::Cache::archives", a.archives()},
		{"APT::Install-Recommends", "false"},
		{"APT::Architecture", "amd64"},
		{"APT::Keep-Downloaded-Packages", "true"},
		{"APT::Sandbox::User", "root"},
		{"Acquire::Languages", "none"},
		{"Acquire::ForceHash", "SHA256"},
		{"Acquire::Retries", "3"},
	} {
		fmt.Fprintf(&config, "%s %q;\n", option[0], option[1])
	}
	if err := os.WriteFile(filepath.Join(a.dir, "status"), nil, 0o644); err != nil {
		return fmt.Errorf("writing apt status: %w", err)
	}
	if err := os.WriteFile(a.config(), config.Bytes(), 0o644); err != nil {
		return fmt.Errorf("writing apt configuration: %w", err)
	}
	return nil
}

func (a *apt) config() string   { return filepath.Join(a.dir, "apt.conf") }
func (a *apt) archives() string { return filepath.Join(a.dir, "archives") }

func (a *apt) get(ctx context.Context, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, "apt-get", args...)
	cmd.Env = append(os.Environ(), "APT_CONFIG="+a.config(), "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive")
	return output(cmd)
}

// update fetches the package lists when they are missing, old, or when forced.
// The lists of one source may fail as long as the packages are found in others.
func (a *apt) update(ctx context.Context, force bool) error {
	stamp := filepath.Join(a.dir, "updated")
	if info, err := os.Stat(stamp); err == nil && !force && time.Since(info.ModTime()) < listsMaxAge {
		return nil
	}
	a.log.Info("fetching package lists")
	if _, err := a.get(ctx, "update", "-qq"); err != nil {
		return err
	}
	return os.WriteFile(stamp, nil, 0o644)
}

// ready locks the cache until release is called, and makes configuration and lists ready. Old lists may do, so that
// the failure to fetch new ones is an error apart.
func (a *apt) ready(ctx context.Context) (release func(), updateErr, err error) {
	if release, err = a.lock(); err != nil {
		return nil, nil, err
	}
	if err := a.configure(ctx); err != nil {
		release()
		return nil, nil, err
	}
	return release, a.update(ctx, false), nil
}

// fetch resolves the packages with their dependencies and downloads them. Apt
// verifies the signatures of the lists and the hash of every package.
func (a *apt) fetch(ctx context.Context, packages []string) ([]deb, error) {
	release, updateErr, err := a.ready(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	debs, err := a.resolveAndDownload(ctx, packages)
	if err == nil {
		return debs, nil
	}
	if updateErr == nil {
		// The lists may be older than the archive.
		updateErr = a.update(ctx, true)
	}
	if updateErr != nil {
		return nil, errors.Join(err, updateErr)
	}
	return a.resolveAndDownload(ctx, packages)
}

// resolve asks apt what it would install.
func (a *apt) resolve(ctx context.Context, packages []string) ([]deb, error) {
	// Apt leaves out what it has downloaded, so it must not look at that here.
	empty := "Dir::Cache::archives=" + filepath.Join(a.dir, "cache/none")
	args := append([]string{"install", "-y", "-qq", "--print-uris", "-o", empty}, packages...)
	lines, err := a.get(ctx, args...)
	if err != nil {
		return nil, fmt.Errorf("resolving packages: %w", err)
	}
	debs, err := parseURIs(lines)
	if err != nil {
		return nil, err
	}
	if len(debs) == 0 {
		return nil, fmt.Errorf("resolving packages: apt chose nothing for %s", strings.Join(packages, " "))
	}
	return debs, nil
}

func (a *apt) resolveAndDownload(ctx context.Context, packages []string) ([]deb, error) {
	debs, err := a.resolve(ctx, packages)
	if err != nil {
		return nil, err
	}
	if a.complete(debs) {
		return debs, nil
	}
	a.log.Info("downloading packages", "count", len(debs))
	args := append([]string{"install", "-y", "-qq", "--download-only"}, packages...)
	if _, err := a.get(ctx, args...); err != nil {
		return nil, fmt.Errorf("downloading packages: %w", err)
	}
	return debs, nil
}

// complete reports whether every package is in the archive directory, unharmed.
func (a *apt) complete(debs []deb) bool {
	for _, d := range debs {
		sum, err := fileSHA256(filepath.Join(a.archives(), d.file))
		if err != nil || sum != d.sha256 {
			return false
		}
	}
	return true
}

// parseURIs reads lines of the form 'URI' FILE SIZE SHA256:HEX.
func parseURIs(lines []byte) ([]deb, error) {
	var debs []deb
	scanner := bufio.NewScanner(bytes.NewReader(lines))
	for scanner.Scan() {
		line := scanner.Text()
		if !strings.HasPrefix(line, "'") {
			continue
		}
		fields := strings.Fields(line)
		if len(fields) != 4 {
			return nil, fmt.Errorf("reading apt's choice: unexpected line %q", line)
		}
		sum, ok := strings.CutPrefix(fields[3], "SHA256:")
		if !ok || len(sum) != 2*sha256.Size || filepath.Base(fields[1]) != fields[1] || !strings.HasSuffix(fields[1], ".deb") {
			return nil, fmt.Errorf("reading apt's choice: unexpected line %q", line)
		}
		debs = append(debs, deb{file: fields[1], sha256: sum})
	}
	return debs, scanner.Err()
}

// unpack adds the files of a package to the tree.
func (a *apt) unpack(ctx context.Context, d deb, t *tree) error {
	cmd := exec.CommandContext(ctx, "dpkg-deb", "--fsys-tarfile", filepath.Join(a.archives(), d.file))
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return fmt.Errorf("unpacking %s: %w", d.file, err)
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("unpacking %s: %w", d.file, err)
	}
	addErr := t.addTar(stdout)
	_, drainErr := io.Copy(io.Discard, stdout)
	if err := errors.Join(addErr, drainErr, cmd.Wait()); err != nil {
		return fmt.Errorf("unpacking %s: %w%s", d.file, err, tail(stderr.Bytes()))
	}
	return nil
}

func fileSHA256(name string) (string, error) {
	file, err := os.Open(name)
	if err != nil {
		return "", err
	}
	defer func() { _ = file.Close() }()
	sum := sha256.New()
	if _, err := io.Copy(sum, file); err != nil {
		return "", fmt.Errorf("reading %s: %w", name, err)
	}
	return hex.EncodeToString(sum.Sum(nil)), nil
}

// output runs a command and returns what it printed; the error holds the end of
// what it complained about.
func output(cmd *exec.Cmd) ([]byte, error) {
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("running %s %s: %w%s", filepath.Base(cmd.Path), strings.Join(cmd.Args[1:], " "), err, tail(stderr.Bytes()))
	}
	return stdout.Bytes(), nil
}

// tail returns the last lines of a program's complaint, set off by a newline.
func tail(text []byte) string {
	const limit = 4096
	text = bytes.TrimSpace(text)
	if len(text) > limit {
		text = text[len(text)-limit:]
	}
	if len(text) == 0 {
		return ""
	}
	return "\n" + string(text)
}
