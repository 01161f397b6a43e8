// Package logging leads the log output of upstream code into slog.
//
// Kubernetes logs through klog, etcd through zap, CoreDNS through log; all become records of one
// slog.Logger. It is not a logger itself. The roles call Install once per
// process, before any upstream code runs. What can go wrong: nothing; a record
// that cannot be converted keeps its message.
package logging

import (
	"context"
	"log"
	"log/slog"
	"strings"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"k8s.io/client-go/rest"
	"k8s.io/klog/v2"
)

// Install makes klog write to logger for the rest of the process and silences
// the warnings API servers send to their own components.
func Install(logger *slog.Logger) {
	klog.SetSlogLogger(logger)
	rest.SetDefaultWarningHandler(rest.NoWarnings{})
}

// NewZap returns a zap logger that writes to logger. Fatal records panic
// instead of ending the process, so that the caller can turn them into errors.
func NewZap(logger *slog.Logger) *zap.Logger {
	return zap.New(core{handler: logger.Handler()}, zap.WithFatalHook(zapcore.WriteThenPanic))
}

// core is a zapcore.Core over a slog.Handler.
type core struct {
	handler slog.Handler
}

// Enabled implements zapcore.Core.
func (c core) Enabled(level zapcore.Level) bool {
	return c.handler.Enabled(context.Background(), slogLevel(level))
}

// With implements zapcore.Core.
func (c core) With(fields []zapcore.Field) zapcore.Core {
	return core{handler: c.handler.WithAttrs(attrs(fields))}
}

// Check implements zapcore.Core.
func (c core) Check(entry zapcore.Entry, checked *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.Enabled(entry.Level) {
		return checked.AddCore(entry, c)
	}
	return checked
}

// Write implements zapcore.Core.
func (c core) Write(entry zapcore.Entry, fields []zapcore.Field) error {
	at := entry.Time
	if at.IsZero() {
		at = time.Now()
	}
	record := slog.NewRecord(at, slogLevel(entry.Level), entry.Message, 0)
	record.AddAttrs(attrs(fields)...)
	if entry.LoggerName != "" {
		record.AddAttrs(slog.String("logger", entry.LoggerName))
	}
	return c.handler.Handle(context.Background(), record)
}

// Sync implements zapcore.Core.
func (core) Sync() error { return nil }

func attrs(fields []zapcore.Field) []slog.Attr {
	enc := zapcore.NewMapObjectEncoder()
	out := make([]slog.Attr, 0, len(fields))
	for _, f := range fields {
		f.AddTo(enc)
		if v, ok := enc.Fields[f.Key]; ok {
			out = append(out, slog.Any(f.Key, v))
		}
	}
	return out
}

func slogLevel(level zapcore.Level) slog.Level {
	switch {
	case level <= zapcore.DebugLevel:
		return slog.LevelDebug
	case level == zapcore.InfoLevel:
		return slog.LevelInfo
	case level == zapcore.WarnLevel:
		return slog.LevelWarn
	default:
		return slog.LevelError
	}
}

// InstallStd makes the standard library's log package write to logger. CoreDNS
// logs through it, with the level in brackets in front.
func InstallStd(logger *slog.Logger) {
	log.SetFlags(0)
	log.SetOutput(stdWriter{logger: logger})
}

// stdWriter takes one line per call.
type stdWriter struct {
	logger *slog.Logger
}

// Write implements io.Writer.
func (w stdWriter) Write(line []byte) (int, error) {
	text := strings.TrimSpace(string(line))
	level := slog.LevelInfo
	for prefix, l := range map[string]slog.Level{
		"[DEBUG] ": slog.LevelDebug, "[INFO] ": slog.LevelInfo, "[WARNING] ": slog.LevelWarn, "[ERROR] ": slog.LevelError, "[FATAL] ": slog.LevelError,
	} {
		if rest, ok := strings.CutPrefix(text, prefix); ok {
			level, text = l, rest
			break
		}
	}
	w.logger.Log(context.Background(), level, text)
	return len(line), nil
}
