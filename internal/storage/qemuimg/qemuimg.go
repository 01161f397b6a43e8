// Package qemuimg runs qemu-img on images whose block graph the caller spells out.
//
// Names in image headers are never followed: every call names the whole graph, and what is not named is
// null. Passphrases go through pipes, so that no argument, environment or file holds one. The process ends
// with the context. Callers are the storage engines. What can go wrong: qemu-img is missing (ErrMissing),
// the image is in use (ErrLocked), there is no room (ErrSpace), or qemu-img says something else (its last
// lines are in the error).
package qemuimg

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"atoll.dev/atoll/internal/datadir/handover"
)

// Errors to tell apart.
var (
	ErrMissing = errors.New("qemu-img is not installed (package qemu-utils)")
	ErrLocked  = errors.New("image is open elsewhere")
	ErrSpace   = errors.New("no space left")
	ErrSecret  = errors.New("passphrase does not open the image")
)

// Tool runs qemu-img. The zero value looks it up.
type Tool struct {
	// Path of qemu-img; empty looks it up.
	Path string
}

// Secrets are passphrases by the name that Layer.Key has.
type Secrets map[string][]byte

// maxOutput bounds what is kept of what qemu-img prints.
const maxOutput = 1 << 20

// Node is a block graph as QEMU's JSON pseudo-protocol takes it, with the layers from bottom to top and
// nothing below the first.
func Node(layers []handover.Layer) map[string]any {
	var below map[string]any
	for _, l := range layers {
		node := map[string]any{"driver": l.Format, "file": protocol(l)}
		if l.Format == handover.FormatQCOW2 {
			node["backing"] = nil
			if below != nil {
				node["backing"] = below
			}
			if l.Key != "" {
				node["encrypt"] = map[string]any{"format": "luks", "key-secret": SecretID(l.Key)}
			}
		}
		below = node
	}
	return below
}

// protocol is where a layer is.
func protocol(l handover.Layer) map[string]any {
	if l.RBD == nil {
		return map[string]any{"driver": "file", "filename": l.File}
	}
	node := map[string]any{"driver": "rbd", "pool": l.RBD.Pool, "image": l.RBD.Image}
	for key, value := range map[string]string{"namespace": l.RBD.Namespace, "conf": l.RBD.Conf, "user": l.RBD.User} {
		if value != "" {
			node[key] = value
		}
	}
	return node
}

// Zeros is a graph of that many bytes that read as zero.
func Zeros(bytes int64) map[string]any {
	return map[string]any{"driver": "null-co", "read-zeroes": true, "size": bytes}
}

// Name is a graph as an argument.
func Name(node map[string]any) (string, error) {
	b, err := json.Marshal(node)
	if err != nil {
		return "", fmt.Errorf("encoding a block graph: %w", err)
	}
	return "json:" + string(b), nil
}

// SecretID is the id of the secret object for a key: QEMU's ids have no slashes.
func SecretID(key string) string {
	return "k" + strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || r == '-' || r == '.' {
			return r
		}
		return '_'
	}, key)
}

// Check is what qemu-img check found.
type Check struct {
	Corruptions, Leaks, Errors int64
}

// Check reads all metadata of the top layer. The image may be open elsewhere for reading only.
func (t *Tool) Check(ctx context.Context, top handover.Layer, secrets Secrets) (Check, error) {
	name, err := Name(Node([]handover.Layer{top}))
	if err != nil {
		return Check{}, err
	}
	out, err := t.run(ctx, secrets, nil, "check", "--output=json", name)
	var exit *exec.ExitError
	if err != nil && (!errors.As(err, &exit) || exit.ExitCode() != 2 && exit.ExitCode() != 3) {
		return Check{}, err
	}
	var found struct {
		Corruptions int64 `json:"corruptions"`
		Leaks       int64 `json:"leaks"`
		Errors      int64 `json:"check-errors"`
	}
	if err := json.Unmarshal(out, &found); err != nil {
		return Check{}, fmt.Errorf("reading what qemu-img check says: %w", err)
	}
	return Check(found), nil
}

// Commit copies what the top layer holds into the one below. Both stay as they are otherwise.
func (t *Tool) Commit(ctx context.Context, layers []handover.Layer, secrets Secrets, progress func(done, total int64)) error {
	name, err := Name(Node(layers))
	if err != nil {
		return err
	}
	_, err = t.run(ctx, secrets, progress, "commit", "-d", "-p", name)
	return err
}

// Fill writes zeros to all of an image.
func (t *Tool) Fill(ctx context.Context, top handover.Layer, secrets Secrets, progress func(done, total int64)) error {
	from, err := Name(Zeros(top.Size))
	if err != nil {
		return err
	}
	to, err := Name(Node([]handover.Layer{top}))
	if err != nil {
		return err
	}
	_, err = t.run(ctx, secrets, progress, "convert", "-n", "-p", "-S", "0", "-t", "none", "-O", top.Format, from, to)
	return err
}

// Target is an image to write.
type Target struct {
	// Layer is an image that exists, reads as zeros and is at least as large as what is written.
	Layer handover.Layer
	// Secrets are what Layer and the source need.
	Secrets Secrets
	// File, if Layer.Format is empty, is a file to make, of a format and with options as qemu-img has them.
	File, Format, Options string
	// Compress makes a smaller image, in more time.
	Compress bool
}

// Convert copies a disk, a block graph, into another image.
func (t *Tool) Convert(ctx context.Context, from map[string]any, to Target, progress func(done, total int64)) error {
	name, err := Name(from)
	if err != nil {
		return err
	}
	args := []string{"-p", "-t", "writeback"}
	if to.Layer.Format != "" {
		target, err := Name(Node([]handover.Layer{to.Layer}))
		if err != nil {
			return err
		}
		args = append(args, "-n", "--target-is-zero", "-O", to.Layer.Format, name, target)
	} else {
		if to.Compress {
			args = append(args, "-c")
		}
		if to.Options != "" {
			args = append(args, "-o", to.Options)
		}
		args = append(args, "-O", to.Format, name, to.File)
	}
	_, err = t.run(ctx, to.Secrets, progress, "convert", args...)
	return err
}

// Resize makes an image larger.
func (t *Tool) Resize(ctx context.Context, top handover.Layer, secrets Secrets, bytes int64) error {
	name, err := Name(Node([]handover.Layer{top}))
	if err != nil {
		return err
	}
	_, err = t.run(ctx, secrets, nil, "resize", "-q", name, strconv.FormatInt(bytes, 10))
	return err
}

// run runs one command and returns what it printed.
func (t *Tool) run(ctx context.Context, secrets Secrets, progress func(done, total int64), command string, args ...string) ([]byte, error) {
	path := t.Path
	if path == "" {
		var err error
		if path, err = exec.LookPath("qemu-img"); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrMissing, err)
		}
	}
	all := []string{command}
	var files []*os.File
	defer func() {
		for _, f := range files {
			_ = f.Close()
		}
	}()
	for key, secret := range secrets {
		r, w, err := os.Pipe()
		if err != nil {
			return nil, fmt.Errorf("handing over a passphrase: %w", err)
		}
		files = append(files, r)
		_, err = w.Write(secret) // shorter than any pipe
		if closeErr := w.Close(); err == nil {
			err = closeErr
		}
		if err != nil {
			return nil, fmt.Errorf("handing over a passphrase: %w", err)
		}
		all = append(all, "--object", fmt.Sprintf("secret,id=%s,file=/proc/self/fd/%d", SecretID(key), 2+len(files)))
	}
	cmd := exec.CommandContext(ctx, path, append(all, args...)...)
	cmd.WaitDelay = 5 * time.Second
	cmd.ExtraFiles = files
	cmd.Env = []string{"LC_ALL=C", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	runtime.LockOSThread() // whose death is what the signal is about
	defer runtime.UnlockOSThread()
	stdout, stderr := &output{progress: progress}, &output{}
	cmd.Stdout, cmd.Stderr = stdout, stderr
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return stdout.kept.Bytes(), explain(command, err, stderr.kept.String())
	}
	return stdout.kept.Bytes(), nil
}

// explain makes an error of what qemu-img printed last.
func explain(command string, err error, stderr string) error {
	text := strings.TrimSpace(stderr)
	if i := strings.LastIndexByte(text, '\n'); i >= 0 {
		text = text[i+1:]
	}
	text = strings.TrimPrefix(text, "qemu-img: ")
	if len(text) > 500 {
		text = "..." + text[len(text)-500:]
	}
	cause := err
	switch {
	case strings.Contains(stderr, "Failed to get ") && strings.Contains(stderr, "lock"):
		cause = fmt.Errorf("%w: %w", ErrLocked, err)
	case strings.Contains(stderr, "No space left on device"):
		cause = fmt.Errorf("%w: %w", ErrSpace, err)
	case strings.Contains(stderr, "Invalid password"):
		cause = fmt.Errorf("%w: %w", ErrSecret, err)
	}
	return fmt.Errorf("running qemu-img %s: %w: %s", command, cause, text)
}

// output keeps the first part of what is written, and tells the progress that is in it: "(12.34/100%)".
type output struct {
	kept     bytes.Buffer
	progress func(done, total int64)
}

var _ io.Writer = (*output)(nil)

func (o *output) Write(p []byte) (int, error) {
	if o.progress != nil {
		if i := bytes.LastIndexByte(p, '('); i >= 0 {
			number, _, ok := strings.Cut(string(p[i+1:]), "/")
			if percent, err := strconv.ParseFloat(number, 64); ok && err == nil {
				o.progress(int64(percent*100), 100*100)
			}
		}
		return len(p), nil
	}
	if room := maxOutput - o.kept.Len(); room > 0 {
		o.kept.Write(p[:min(room, len(p))])
	}
	return len(p), nil
}
