package registry

import (
	"context"
	"log/slog"
	"strings"

	"github.com/sirupsen/logrus"
)

// BridgeLogs has distribution say what goes wrong only, and to logger. It holds for the process.
func BridgeLogs(logger *slog.Logger) {
	logrus.SetLevel(logrus.ErrorLevel)
	logrus.SetFormatter(&logrus.TextFormatter{DisableColors: true, DisableTimestamp: true})
	logrus.SetOutput(logWriter(func(line string) {
		level := slog.LevelDebug // what clients do wrong
		if strings.Contains(line, "err.code=unknown") || strings.Contains(line, "level=fatal") {
			level = slog.LevelWarn
		}
		logger.Log(context.Background(), level, "distribution", "said", line)
	}))
}

// logWriter takes one line per call.
type logWriter func(line string)

// Write implements io.Writer.
func (w logWriter) Write(line []byte) (int, error) {
	w(strings.TrimSpace(string(line)))
	return len(line), nil
}
