package manager

import (
	"context"
	"log/slog"

	"github.com/go-logr/logr"
)

// newLogger leads what controller-runtime says into slog. Its notes about starting and stopping are for debugging.
func newLogger(l *slog.Logger) logr.Logger {
	return logr.FromSlogHandler(quiet{l.Handler()})
}

// quiet lowers information to the level of debugging.
type quiet struct{ slog.Handler }

// Enabled implements slog.Handler.
func (q quiet) Enabled(ctx context.Context, level slog.Level) bool {
	return q.Handler.Enabled(ctx, lowered(level))
}

// Handle implements slog.Handler.
func (q quiet) Handle(ctx context.Context, r slog.Record) error {
	r.Level = lowered(r.Level)
	return q.Handler.Handle(ctx, r)
}

// WithAttrs implements slog.Handler.
func (q quiet) WithAttrs(attrs []slog.Attr) slog.Handler { return quiet{q.Handler.WithAttrs(attrs)} }

// WithGroup implements slog.Handler.
func (q quiet) WithGroup(name string) slog.Handler { return quiet{q.Handler.WithGroup(name)} }

func lowered(level slog.Level) slog.Level {
	if level <= slog.LevelInfo {
		return min(level, slog.LevelDebug)
	}
	return level
}
