// Package denied writes down what NetworkPolicies have denied: a file for each namespace, with the names of both ends.
//
// The rules of internal/network/policy send the headers of some of the packets that they drop to a netlink group; this
// package reads them. It is not complete by design: the kernel bounds how much a namespace may send, and what repeats
// itself is one line with a count. Counters are complete (policy.Counters). The agent runs a Log; `atoll network
// denied` prints the files.
//
// What can go wrong: the kernel has no nfnetlink_log, which Run returns as ErrUnsupported; the disk is full, then lines
// are lost, which is logged once. What the packets hold is written by pods and read with care (Parse has a fuzz test).
package denied

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"atoll.dev/atoll/internal/network/policy"
)

const (
	// quiet is how long a packet like one that was written is only counted.
	quiet = 10 * time.Second
	// maxPending bounds what is remembered for that.
	maxPending = 8192
	// maxFile is the size at which a file becomes its own predecessor, NAME.log.1.
	maxFile = 4 << 20
)

// Config of a log.
type Config struct {
	// Dir holds the files; it is made when missing, mode 0700.
	Dir string
	// Name returns what an address belongs to, "" when that is not known.
	Name   func(netip.Addr) string
	Logger *slog.Logger
	// Now is the clock, time.Now when nil.
	Now func() time.Time
}

// Log writes the files.
type Log struct {
	cfg     Config
	pending map[key]*count
	failed  bool
}

// key is what makes packets alike.
type key struct {
	prefix policy.Prefix
	packet Packet
}

type count struct {
	since time.Time
	more  int
}

// New makes a log. It touches nothing.
func New(cfg Config) *Log {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	return &Log{cfg: cfg, pending: map[key]*count{}}
}

// Path is the file of a namespace.
func Path(dir, namespace string) string { return filepath.Join(dir, namespace+".log") }

// Run reads and writes until ctx ends, and returns nil then.
func (l *Log) Run(ctx context.Context) error {
	if err := os.MkdirAll(l.cfg.Dir, 0o700); err != nil {
		return fmt.Errorf("logging denied traffic: %w", err)
	}
	if err := receive(ctx, policy.LogGroup, quiet/2, l.packet, l.expire); err != nil && ctx.Err() == nil {
		return fmt.Errorf("logging denied traffic: %w", err)
	}
	return nil
}

// packet takes one packet.
func (l *Log) packet(text string, payload []byte) {
	prefix, ok := policy.ParsePrefix(text)
	if !ok || filepath.Base(prefix.Namespace) != prefix.Namespace || prefix.Namespace == ".." {
		return
	}
	p, ok := Parse(payload)
	if !ok {
		return
	}
	k := key{prefix, p}
	if c := l.pending[k]; c != nil {
		c.more++
		return
	}
	if len(l.pending) >= maxPending {
		l.flush(func(*count) bool { return true })
	}
	now := l.cfg.Now()
	l.pending[k] = &count{since: now}
	l.write(k, now, 1)
}

// expire writes how often old packets have come again.
func (l *Log) expire() {
	now := l.cfg.Now()
	l.flush(func(c *count) bool { return now.Sub(c.since) >= quiet })
}

func (l *Log) flush(old func(*count) bool) {
	for k, c := range l.pending {
		if !old(c) {
			continue
		}
		delete(l.pending, k)
		if c.more > 0 {
			l.write(k, l.cfg.Now(), c.more)
		}
	}
}

// line is what is written of a packet.
func (l *Log) line(k key, at time.Time, n int) string {
	d := "egress"
	if k.prefix.Ingress {
		d = "ingress"
	}
	port := k.packet.Protocol
	if k.packet.HasPort {
		port = fmt.Sprintf("%d/%s", k.packet.Port, port)
	}
	return fmt.Sprintf("%s denied=%s tier=%s from=%s to=%s port=%s count=%d\n", at.UTC().Format("2006-01-02T15:04:05.000Z"), d, k.prefix.Tier, l.end(k.packet.From), l.end(k.packet.To), port, n)
}

// end is an address and, if that is known, whose it is.
func (l *Log) end(a netip.Addr) string {
	if l.cfg.Name != nil {
		if name := l.cfg.Name(a); name != "" {
			return name + "(" + a.String() + ")"
		}
	}
	return a.String()
}

func (l *Log) write(k key, at time.Time, n int) {
	err := l.appendLine(Path(l.cfg.Dir, k.prefix.Namespace), l.line(k, at, n))
	if err != nil && !l.failed {
		l.cfg.Logger.Error("denied traffic is not written down", "err", err)
	}
	l.failed = err != nil
}

// appendLine opens the file each time: there are few lines, and many namespaces.
func (l *Log) appendLine(path, line string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteString(line)
	info, statErr := f.Stat()
	err = errors.Join(err, statErr, f.Close())
	if err == nil && info.Size() > maxFile {
		err = os.Rename(path, path+".1")
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil // somebody has tidied up
	}
	return err
}
