package containerd

import (
	"context"
	"io"
	"log/slog"
	"maps"
	"slices"

	"github.com/sirupsen/logrus"
	"k8s.io/klog/v2"
)

// bridgeLogs sends what containerd and the libraries in it log to logger.
func bridgeLogs(logger *slog.Logger) {
	discardGRPC()
	klog.SetSlogLogger(logger)
	std := logrus.StandardLogger()
	std.SetOutput(io.Discard)
	std.SetFormatter(nothing{})
	std.ReplaceHooks(logrus.LevelHooks{})
	std.AddHook(logHook{logger})
}

// nothing spares the formatting of entries whose output is discarded.
type nothing struct{}

func (nothing) Format(*logrus.Entry) ([]byte, error) { return nil, nil }

// logHook hands logrus entries to slog.
type logHook struct {
	log *slog.Logger
}

func (logHook) Levels() []logrus.Level { return logrus.AllLevels }

func (h logHook) Fire(e *logrus.Entry) error {
	ctx := e.Context
	if ctx == nil {
		ctx = context.Background()
	}
	attrs := make([]slog.Attr, 0, len(e.Data))
	for _, key := range slices.Sorted(maps.Keys(e.Data)) {
		attrs = append(attrs, slog.Any(key, e.Data[key]))
	}
	h.log.LogAttrs(ctx, slogLevel(e.Level), e.Message, attrs...)
	return nil
}

func slogLevel(l logrus.Level) slog.Level {
	switch {
	case l <= logrus.ErrorLevel:
		return slog.LevelError
	case l == logrus.WarnLevel:
		return slog.LevelWarn
	case l == logrus.InfoLevel:
		return slog.LevelInfo
	}
	return slog.LevelDebug
}
