package convert

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"atoll.dev/atoll/internal/storage/diskimage"
	"atoll.dev/atoll/internal/storage/qemuimg"
)

// Image is an image of unknown origin.
type Image struct {
	// File must be readable for everybody, in a directory that is not.
	File *os.File
	// Offset and Length are where the image is in the file; Length 0 is all of it.
	Offset, Length int64
	// Info is what package diskimage has found.
	Info diskimage.Info
}

// name is the image as a reader's argument.
func (i Image) name() (string, error) {
	file := map[string]any{"driver": "file", "filename": diskPath, "read-only": true, "locking": "off"}
	if i.Length > 0 {
		file = map[string]any{"driver": "raw", "offset": i.Offset, "size": i.Length, "file": file, "read-only": true}
	}
	return qemuimg.Name(i.Info.Node(file))
}

// verifyWithin bounds how long reading the metadata of an image may take: one may be made to take for ever.
const verifyWithin = 30 * time.Minute

// Verify reads all metadata of an image, if its format has any, and tells whether it is whole.
func Verify(ctx context.Context, i Image) error {
	switch i.Info.Format {
	case diskimage.QCOW2, diskimage.VMDK, diskimage.VHDX:
	default:
		return nil
	}
	name, err := i.name()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, verifyWithin, fmt.Errorf("%w: looking through it takes longer than %v", diskimage.ErrDamaged, verifyWithin))
	defer cancel()
	var out bytes.Buffer
	err = sandboxed{Program: "qemu-img", Args: []string{"check", "--output=json", name}, Disk: i.File, Stdout: &limited{&out}}.run(ctx)
	var exit *exec.ExitError
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case !errors.As(err, &exit):
		return err
	case exit.ExitCode() == 3: // room that nothing uses
		return nil
	}
	var found struct {
		Corruptions int64 `json:"corruptions"`
		Errors      int64 `json:"check-errors"`
	}
	if json.Unmarshal(out.Bytes(), &found) == nil && exit.ExitCode() == 2 {
		return fmt.Errorf("%w: %d of its clusters are wrong or missing; was the transfer interrupted?", diskimage.ErrDamaged, found.Corruptions)
	}
	return fmt.Errorf("%w: %w", diskimage.ErrDamaged, err)
}

// limited is a buffer that takes so much and no more.
type limited struct{ *bytes.Buffer }

func (l *limited) Write(p []byte) (int, error) {
	if room := 64<<10 - l.Len(); room > 0 {
		l.Buffer.Write(p[:min(room, len(p))])
	}
	return len(p), nil
}

// xzMemory bounds what unpacking may take, in bytes: the largest dictionary of xz -9 and some.
const xzMemory = 128 << 20

// UnpackXZ writes what is in an .xz file. What was written is of no use if it fails.
func UnpackXZ(ctx context.Context, file *os.File, to io.Writer) error {
	failing := &keeper{Writer: to}
	err := sandboxed{
		Program: "xz", Args: []string{"--decompress", "--stdout", "--single-stream", fmt.Sprintf("--memlimit-decompress=%d", xzMemory), diskPath},
		Disk: file, Stdout: failing,
	}.run(ctx)
	if failing.err != nil && ctx.Err() == nil {
		return failing.err // xz only says that nobody reads any more
	}
	return err
}

// keeper keeps the error of a writer.
type keeper struct {
	io.Writer
	err error
}

func (k *keeper) Write(p []byte) (int, error) {
	n, err := k.Writer.Write(p)
	if err != nil {
		k.err = err
	}
	return n, err
}

// Serve has a process serve the disk in an image, and calls use with the block graph to read it by, once. It
// returns when both have ended.
func Serve(ctx context.Context, i Image, use func(ctx context.Context, disk map[string]any) error) error {
	name, err := i.name()
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "atoll-nbd-")
	if err != nil {
		return fmt.Errorf("serving an image: %w", err)
	}
	defer os.RemoveAll(dir)
	socket := filepath.Join(dir, "nbd")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		return fmt.Errorf("serving an image: %w", err)
	}
	l.SetUnlinkOnClose(false)
	listen, err := l.File()
	if err = errors.Join(err, l.Close()); err != nil {
		return fmt.Errorf("serving an image: %w", err)
	}
	defer listen.Close()
	running, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	done := make(chan error, 1)
	go func() { // ends with running
		err := sandboxed{Program: "qemu-nbd", Args: []string{"--read-only", "--shared=1", name}, Disk: i.File, Listen: listen}.run(running)
		if err != nil { // nobody would answer any more
			stop(fmt.Errorf("%w: %w", diskimage.ErrDamaged, err))
		}
		done <- err
	}()
	err = use(running, map[string]any{"driver": "nbd", "server": map[string]any{"type": "unix", "path": socket}, "read-only": true})
	cause := context.Cause(running)
	stop(nil)
	<-done
	if err != nil && ctx.Err() == nil && cause != nil {
		return cause
	}
	return err
}

// Into converts an image into a layer of a volume, which is at least as large.
func Into(ctx context.Context, tool *qemuimg.Tool, i Image, to qemuimg.Target, progress func(done, total int64)) error {
	return Serve(ctx, i, func(ctx context.Context, disk map[string]any) error {
		return tool.Convert(ctx, disk, to, progress)
	})
}
