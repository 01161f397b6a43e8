package main

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"syscall"

	"golang.org/x/sys/unix"
)

// maxOutput bounds what is kept of a command's output, and one read of a file.
const maxOutput = 16 << 20

// run is a command that was started.
type run struct {
	out, err bounded
	capture  bool
	done     bool
	state    *os.ProcessState
}

// bounded keeps the first bytes of what is written to it.
type bounded struct {
	bytes.Buffer
	cut bool
}

func (b *bounded) Write(data []byte) (int, error) {
	if room := maxOutput - b.Len(); len(data) > room {
		b.cut = true
		_, _ = b.Buffer.Write(data[:room])
		return len(data), nil
	}
	return b.Buffer.Write(data)
}

func (a *agent) exec(arguments json.RawMessage) (any, error) {
	args, err := read[struct {
		Path    string   `json:"path"`
		Arg     []string `json:"arg"`
		Env     []string `json:"env"`
		Input   string   `json:"input-data"`
		Capture any      `json:"capture-output"` // a truth value, or a word in newer versions
	}](arguments)
	if err != nil {
		return nil, err
	}
	input, err := base64.StdEncoding.DecodeString(args.Input)
	if err != nil {
		return nil, fmt.Errorf("input-data: %w", err)
	}
	r := &run{capture: args.Capture != nil && args.Capture != false && args.Capture != "none"}
	cmd := exec.Command(args.Path, args.Arg...)
	cmd.Dir = "/"
	if args.Env != nil {
		cmd.Env = args.Env
	}
	cmd.Stdin = bytes.NewReader(input)
	if r.capture {
		cmd.Stdout, cmd.Stderr = &r.out, &r.err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("failed to execute child process: %w", err)
	}
	pid := int64(cmd.Process.Pid)
	a.mu.Lock()
	a.runs[pid] = r
	a.mu.Unlock()
	go func() {
		_ = cmd.Wait()
		a.mu.Lock()
		defer a.mu.Unlock()
		r.done, r.state = true, cmd.ProcessState
	}()
	return map[string]any{"pid": pid}, nil
}

func (a *agent) execStatus(arguments json.RawMessage) (any, error) {
	args, err := read[struct {
		PID int64 `json:"pid"`
	}](arguments)
	if err != nil {
		return nil, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	r := a.runs[args.PID]
	if r == nil {
		return nil, agentError{"GenericError", fmt.Sprintf("Invalid parameter 'pid': %d", args.PID)}
	}
	if !r.done {
		return map[string]any{"exited": false}, nil
	}
	delete(a.runs, args.PID)
	out := map[string]any{"exited": true}
	if status, ok := r.state.Sys().(syscall.WaitStatus); ok && status.Signaled() {
		out["signal"] = int(status.Signal())
	} else {
		out["exitcode"] = r.state.ExitCode()
	}
	for name, b := range map[string]*bounded{"out": &r.out, "err": &r.err} {
		if b.Len() > 0 {
			out[name+"-data"] = base64.StdEncoding.EncodeToString(b.Bytes())
		}
		if b.cut {
			out[name+"-truncated"] = true
		}
	}
	return out, nil
}

func (a *agent) fileOpen(arguments json.RawMessage) (any, error) {
	args, err := read[struct {
		Path string `json:"path"`
		Mode string `json:"mode"`
	}](arguments)
	if err != nil {
		return nil, err
	}
	flags := map[string]int{
		"": os.O_RDONLY, "r": os.O_RDONLY, "rb": os.O_RDONLY, "r+": os.O_RDWR,
		"w": os.O_WRONLY | os.O_CREATE | os.O_TRUNC, "wb": os.O_WRONLY | os.O_CREATE | os.O_TRUNC,
		"w+": os.O_RDWR | os.O_CREATE | os.O_TRUNC, "a": os.O_WRONLY | os.O_CREATE | os.O_APPEND,
	}
	flag, ok := flags[args.Mode]
	if !ok {
		return nil, agentError{"GenericError", "invalid file open mode '" + args.Mode + "'"}
	}
	file, err := os.OpenFile(args.Path, flag, 0o666)
	if err != nil {
		return nil, fmt.Errorf("failed to open file '%s' (mode: '%s'): %w", args.Path, args.Mode, err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.nextID++
	a.files[a.nextID] = file
	return a.nextID, nil
}

// file finds an open file.
func (a *agent) file(handle int64) (*os.File, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if file := a.files[handle]; file != nil {
		return file, nil
	}
	return nil, agentError{"GenericError", fmt.Sprintf("handle '%d' has not been found", handle)}
}

func (a *agent) fileRead(arguments json.RawMessage) (any, error) {
	args, err := read[struct {
		Handle int64  `json:"handle"`
		Count  *int64 `json:"count"`
	}](arguments)
	if err != nil {
		return nil, err
	}
	file, err := a.file(args.Handle)
	if err != nil {
		return nil, err
	}
	count := int64(4096)
	if args.Count != nil {
		count = *args.Count
	}
	if count < 0 || count > maxOutput {
		return nil, agentError{"GenericError", fmt.Sprintf("value '%d' is invalid for argument count", count)}
	}
	buffer := make([]byte, count)
	n, err := io.ReadFull(file, buffer)
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return nil, err
	}
	return map[string]any{"count": n, "buf-b64": base64.StdEncoding.EncodeToString(buffer[:n]), "eof": int64(n) < count}, nil
}

func (a *agent) fileWrite(arguments json.RawMessage) (any, error) {
	args, err := read[struct {
		Handle int64  `json:"handle"`
		Data   []byte `json:"buf-b64"`
		Count  *int   `json:"count"`
	}](arguments)
	if err != nil {
		return nil, err
	}
	file, err := a.file(args.Handle)
	if err != nil {
		return nil, err
	}
	data := args.Data
	if args.Count != nil && *args.Count >= 0 && *args.Count < len(data) {
		data = data[:*args.Count]
	}
	n, err := file.Write(data)
	if err != nil {
		return nil, err
	}
	return map[string]any{"count": n, "eof": false}, nil
}

func (a *agent) fileFlush(arguments json.RawMessage) (any, error) {
	args, err := read[struct {
		Handle int64 `json:"handle"`
	}](arguments)
	if err != nil {
		return nil, err
	}
	if _, err := a.file(args.Handle); err != nil {
		return nil, err
	}
	return struct{}{}, nil
}

func (a *agent) fileClose(arguments json.RawMessage) (any, error) {
	args, err := read[struct {
		Handle int64 `json:"handle"`
	}](arguments)
	if err != nil {
		return nil, err
	}
	file, err := a.file(args.Handle)
	if err != nil {
		return nil, err
	}
	a.mu.Lock()
	delete(a.files, args.Handle)
	a.mu.Unlock()
	return struct{}{}, file.Close()
}

// Numbers of linux/fs.h.
const (
	fiFreeze = 0xc0045877
	fiThaw   = 0xc0045878
	fiTrim   = 0xc0185879
)

// dataIoctl calls an ioctl on the data file system.
func dataIoctl(request uint) error {
	fd, err := unix.Open("/data", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	return unix.IoctlSetInt(fd, request, 0)
}

func (a *agent) freezeStatus(json.RawMessage) (any, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.frozen {
		return "frozen", nil
	}
	return "thawed", nil
}

// freeze stops writes to the data file system: all that is on a disk.
func (a *agent) freeze(json.RawMessage) (any, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.frozen {
		return nil, agentError{"GenericError", "the file systems are frozen already"}
	}
	err := dataIoctl(fiFreeze)
	if errors.Is(err, unix.EOPNOTSUPP) {
		return 0, nil // in memory
	}
	if err != nil {
		return nil, fmt.Errorf("freezing /data: %w", err)
	}
	a.frozen = true
	return 1, os.WriteFile("/run/frozen", nil, 0o600)
}

func (a *agent) thaw(json.RawMessage) (any, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.frozen {
		return 0, nil
	}
	if err := dataIoctl(fiThaw); err != nil {
		return nil, fmt.Errorf("thawing /data: %w", err)
	}
	a.frozen = false
	return 1, os.Remove("/run/frozen")
}
