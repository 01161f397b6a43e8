package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	agentPort    = "org.qemu.guest_agent.0"
	agentVersion = "7.2.0"
	// maxRequest bounds one request: a file write of 32 MiB in base64.
	maxRequest = 48 << 20
)

// errorClass is an error of the protocol.
type agentError struct{ Class, Desc string }

func (e agentError) Error() string { return e.Desc }

// agent is the guest agent's state between requests.
type agent struct {
	system *system

	mu     sync.Mutex
	nextID int64
	runs   map[int64]*run
	files  map[int64]*os.File
	frozen bool
}

// handler does one command.
type handler func(a *agent, arguments json.RawMessage) (any, error)

// commands are all that the agent knows.
func commands() map[string]handler {
	return map[string]handler{
		"guest-sync":                   (*agent).sync,
		"guest-ping":                   empty,
		"guest-info":                   (*agent).info,
		"guest-get-host-name":          (*agent).hostName,
		"guest-get-osinfo":             (*agent).osInfo,
		"guest-get-time":               (*agent).getTime,
		"guest-set-time":               (*agent).setTime,
		"guest-get-timezone":           (*agent).timezone,
		"guest-get-users":              (*agent).users,
		"guest-get-fsinfo":             (*agent).fileSystems,
		"guest-network-get-interfaces": (*agent).interfaces,
		"guest-get-vcpus":              (*agent).processors,
		"guest-set-vcpus":              (*agent).setProcessors,
		"guest-get-memory-blocks":      (*agent).memoryBlocks,
		"guest-set-memory-blocks":      (*agent).setMemoryBlocks,
		"guest-get-memory-block-info":  (*agent).memoryBlockInfo,
		"guest-exec":                   (*agent).exec,
		"guest-exec-status":            (*agent).execStatus,
		"guest-file-open":              (*agent).fileOpen,
		"guest-file-read":              (*agent).fileRead,
		"guest-file-write":             (*agent).fileWrite,
		"guest-file-flush":             (*agent).fileFlush,
		"guest-file-close":             (*agent).fileClose,
		"guest-fsfreeze-status":        (*agent).freezeStatus,
		"guest-fsfreeze-freeze":        (*agent).freeze,
		"guest-fsfreeze-freeze-list":   (*agent).freeze,
		"guest-fsfreeze-thaw":          (*agent).thaw,
		"guest-fstrim":                 (*agent).trim,
		"guest-shutdown":               (*agent).shutdown,
		"guest-suspend-ram":            (*agent).suspend,
	}
}

// serveAgent answers on the virtio port, which may come and go. While the file
// /run/agent-off is there it does not; see also say.
func (s *system) serveAgent() {
	a := &agent{system: s, runs: map[int64]*run{}, files: map[int64]*os.File{}}
	for {
		if device, ok := findPort(agentPort); ok {
			if err := a.serve(device); err != nil {
				s.say("guest agent: %v", err)
			}
		}
		<-time.After(100 * time.Millisecond)
	}
}

func findPort(name string) (string, bool) {
	files, _ := filepath.Glob("/sys/class/virtio-ports/*/name")
	for _, file := range files {
		if text, err := os.ReadFile(file); err == nil && strings.TrimSpace(string(text)) == name {
			return filepath.Join("/dev", filepath.Base(filepath.Dir(file))), true
		}
	}
	return "", false
}

// serve reads requests until the device fails. Reading nothing means that the
// host has nobody at its end.
func (a *agent) serve(device string) error {
	fd, err := unix.Open(device, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("opening %s: %w", device, err)
	}
	defer func() { _ = unix.Close(fd) }()
	var pending []byte
	chunk := make([]byte, 64<<10)
	for {
		n, err := unix.Read(fd, chunk)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return fmt.Errorf("reading %s: %w", device, err)
		}
		if n == 0 {
			pending = nil
			<-time.After(50 * time.Millisecond)
			continue
		}
		pending = append(pending, chunk[:n]...)
		for {
			request, rest, ok := cutRequest(pending)
			pending = rest
			if !ok {
				break
			}
			if unix.Access("/run/agent-off", unix.F_OK) == nil {
				continue
			}
			if err := writeAll(fd, a.say(request)); err != nil {
				return fmt.Errorf("answering: %w", err)
			}
		}
	}
}

// say is what is sent for a request: the answer, or what a test has put into the
// file /run/agent-says for all but the synchronisation.
func (a *agent) say(request []byte) []byte {
	if lie, err := os.ReadFile("/run/agent-says"); err == nil && !bytes.Contains(request, []byte("guest-sync")) {
		return lie
	}
	return a.answer(request)
}

// cutRequest takes the first complete request off what was read. The byte 0xff
// starts anew, whatever came before it.
func cutRequest(data []byte) (request, rest []byte, ok bool) {
	if i := bytes.LastIndexByte(data, 0xff); i >= 0 {
		data = data[i+1:]
	}
	if line, after, found := bytes.Cut(data, []byte("\n")); found {
		return line, after, true
	}
	if trimmed := bytes.TrimSpace(data); len(trimmed) > 0 && json.Valid(trimmed) {
		return trimmed, nil, true
	}
	if len(data) > maxRequest {
		return nil, nil, false
	}
	return nil, data, false
}

func writeAll(fd int, data []byte) error {
	for len(data) > 0 {
		n, err := unix.Write(fd, data)
		if err == unix.EINTR || err == unix.EAGAIN {
			continue
		}
		if err != nil {
			return err
		}
		data = data[n:]
	}
	return nil
}

// answer does a request and returns what to send; nothing for an empty line and
// for commands that do not answer when they succeed.
func (a *agent) answer(line []byte) []byte {
	if len(bytes.TrimSpace(line)) == 0 {
		return nil
	}
	var request struct {
		Execute   string          `json:"execute"`
		Arguments json.RawMessage `json:"arguments"`
		ID        json.RawMessage `json:"id,omitempty"`
	}
	reply := map[string]any{}
	var prefix []byte
	result, err := any(nil), error(nil)
	if err = json.Unmarshal(line, &request); err != nil {
		err = agentError{"GenericError", "Invalid JSON syntax: " + err.Error()}
	} else if request.Execute == "guest-sync-delimited" {
		prefix = []byte{0xff}
		result, err = a.sync(request.Arguments)
	} else if do, known := commands()[request.Execute]; known {
		result, err = do(a, request.Arguments)
	} else {
		err = agentError{"CommandNotFound", fmt.Sprintf("The command %s has not been found", request.Execute)}
	}
	if errors.Is(err, errNoAnswer) {
		return nil
	}
	if err != nil {
		class := agentError{"GenericError", err.Error()}
		_ = errors.As(err, &class)
		reply["error"] = map[string]string{"class": class.Class, "desc": class.Desc}
	} else {
		reply["return"] = result
	}
	if len(request.ID) > 0 {
		reply["id"] = request.ID
	}
	data, err := json.Marshal(reply)
	if err != nil {
		return nil
	}
	return append(append(prefix, data...), '\n')
}

// errNoAnswer is for commands whose success the host sees in another way.
var errNoAnswer = errors.New("no answer")

// read decodes the arguments of a command.
func read[T any](arguments json.RawMessage) (T, error) {
	var out T
	if len(arguments) == 0 {
		return out, nil
	}
	if err := json.Unmarshal(arguments, &out); err != nil {
		return out, agentError{"GenericError", "Invalid parameter: " + err.Error()}
	}
	return out, nil
}

func empty(*agent, json.RawMessage) (any, error) { return struct{}{}, nil }

func (a *agent) sync(arguments json.RawMessage) (any, error) {
	args, err := read[struct {
		ID json.Number `json:"id"`
	}](arguments)
	return args.ID, err
}

func (a *agent) info(json.RawMessage) (any, error) {
	var list []map[string]any
	for name := range commands() {
		list = append(list, map[string]any{"name": name, "enabled": true, "success-response": name != "guest-shutdown"})
	}
	list = append(list, map[string]any{"name": "guest-sync-delimited", "enabled": true, "success-response": true})
	return map[string]any{"version": agentVersion, "supported_commands": list}, nil
}
