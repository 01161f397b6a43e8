package volumes

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// pollInterval is how often links are looked at where inotify is not to be had: each user has only
// fs.inotify.max_user_instances of them, 128 by default, and all pods share them.
const pollInterval = 5 * time.Second

// maxPause is the longest pause before what could not be sent is tried again. It begins with pollInterval and doubles.
const maxPause = 5 * time.Minute

// settle is how long to wait after an event: the kubelet changes several names in a row.
const settle = 20 * time.Millisecond

// watcher watches directories that the kubelet's AtomicWriter writes: it calls back when "..data" was
// switched.
type watcher struct {
	added    chan string
	interval time.Duration   // between polls
	inotify  func() *inotify // nil result: poll
}

// newWatcher makes a watcher; directories can be added before it runs.
func newWatcher() *watcher {
	return &watcher{added: make(chan string, 1024), interval: pollInterval, inotify: startInotify}
}

// add begins to watch a directory. It may be called again for the same one.
func (w *watcher) add(dir string) { w.added <- dir }

// run watches until ctx ends. It calls changed once more for each directory when it is watched, since it may have been
// switched before, and later again for one that it returned an error for.
func (w *watcher) run(ctx context.Context, changed func(dir string) error) error {
	var in *inotify
	watched := map[string]string{} // what "..data" pointed to when changed was called, by directory
	failed := map[string]bool{}
	var poll, retry <-chan time.Time
	pause := w.interval
	look := func(dir string) {
		watched[dir] = link(dir)
		if changed(dir) == nil {
			delete(failed, dir)
			return
		}
		failed[dir] = true
		if retry == nil {
			retry = time.After(pause)
		}
	}
	for {
		var events <-chan string
		if in != nil {
			events = in.events
		}
		select {
		case <-ctx.Done():
			if in != nil {
				in.close()
			}
			return ctx.Err()
		case dir := <-w.added:
			if _, ok := watched[dir]; ok {
				continue
			}
			if in == nil && poll == nil {
				in = w.inotify()
			}
			if in == nil || in.add(dir) != nil {
				poll = time.After(w.interval)
			}
			look(dir)
		case dir := <-events:
			look(dir)
		case <-poll:
			poll = time.After(w.interval)
			for dir, old := range watched {
				if link(dir) != old {
					look(dir)
				}
			}
		case <-retry:
			retry, pause = nil, min(2*pause, maxPause)
			for dir := range failed {
				look(dir)
			}
			if len(failed) == 0 {
				pause = w.interval
			}
		}
	}
}

// link is what "..data" in a directory points to.
func link(dir string) string {
	target, _ := os.Readlink(filepath.Join(dir, dataLink)) // "" while there is none
	return target
}

// inotify reports directories in which "..data" was switched.
type inotify struct {
	file   *os.File
	events chan string
	done   chan struct{}

	mu   sync.Mutex // guards the field below
	dirs map[int32]string
}

// startInotify returns nil where there is no inotify to be had.
func startInotify() *inotify {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		slog.Debug("polling volumes for changes: no inotify", "error", err)
		return nil
	}
	in := &inotify{
		file: os.NewFile(uintptr(fd), "inotify"), events: make(chan string, 64),
		done: make(chan struct{}), dirs: map[int32]string{},
	}
	go in.read()
	return in
}

func (in *inotify) add(dir string) error {
	conn, err := in.file.SyscallConn()
	if err != nil {
		return err
	}
	var wd int
	cerr := conn.Control(func(fd uintptr) {
		wd, err = unix.InotifyAddWatch(int(fd), dir, unix.IN_MOVED_TO|unix.IN_ONLYDIR)
	})
	if cerr != nil || err != nil {
		return fmt.Errorf("watching %s: %w", dir, err)
	}
	in.mu.Lock()
	defer in.mu.Unlock()
	in.dirs[int32(wd)] = dir
	return nil
}

func (in *inotify) close() {
	close(in.done)
	_ = in.file.Close()
}

// read turns events into directory names, each once per burst.
func (in *inotify) read() {
	buf := make([]byte, 4096)
	for {
		n, err := in.file.Read(buf)
		if err != nil {
			return
		}
		dirs := in.switched(buf[:n])
		if len(dirs) == 0 {
			continue
		}
		select {
		case <-time.After(settle):
		case <-in.done:
			return
		}
		for dir := range dirs {
			select {
			case in.events <- dir:
			case <-in.done:
				return
			}
		}
	}
}

// switched decodes struct inotify_event.
func (in *inotify) switched(buf []byte) map[string]bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	dirs := map[string]bool{}
	for len(buf) >= unix.SizeofInotifyEvent {
		wd := int32(binary.NativeEndian.Uint32(buf))
		size := unix.SizeofInotifyEvent + int(binary.NativeEndian.Uint32(buf[12:]))
		if size > len(buf) {
			break
		}
		name, _, _ := bytes.Cut(buf[unix.SizeofInotifyEvent:size], []byte{0})
		buf = buf[size:]
		if dir, ok := in.dirs[wd]; ok && string(name) == dataLink {
			dirs[dir] = true
		}
	}
	return dirs
}
