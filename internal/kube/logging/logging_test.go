package logging

import (
	"bytes"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"k8s.io/klog/v2"
)

func newBuffer(level slog.Level) (*bytes.Buffer, *slog.Logger) {
	var buf bytes.Buffer
	return &buf, slog.New(slog.NewTextHandler(&buf, &slog.HandlerOptions{
		Level: level,
		ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
			if a.Key == slog.TimeKey {
				return slog.Attr{}
			}
			return a
		},
	}))
}

func TestZap(t *testing.T) {
	buf, logger := newBuffer(slog.LevelInfo)
	z := NewZap(logger).With(zap.String("member", "a"))
	z.Debug("hidden")
	z.Info("started", zap.Int("port", 2379), zap.Duration("took", time.Second))
	z.Error("failed", zap.Error(errors.New("disk full")))
	want := "level=INFO msg=started member=a port=2379 took=1s\n" +
		"level=ERROR msg=failed member=a error=\"disk full\"\n"
	if buf.String() != want {
		t.Fatalf("got:\n%swant:\n%s", buf, want)
	}
}

func TestZapFatalPanics(t *testing.T) {
	buf, logger := newBuffer(slog.LevelInfo)
	defer func() {
		if recover() == nil || !strings.Contains(buf.String(), "bad data") {
			t.Fatalf("no panic, or no record: %s", buf)
		}
	}()
	NewZap(logger).Fatal("bad data")
}

func TestKlog(t *testing.T) {
	defer klog.CaptureState().Restore()
	buf, logger := newBuffer(slog.LevelInfo)
	Install(logger)
	klog.InfoS("hello", "pod", klog.KRef("ns", "name"))
	klog.V(2).InfoS("hidden")
	if !strings.Contains(buf.String(), `level=INFO msg=hello pod.name=name pod.namespace=ns`) || strings.Contains(buf.String(), "hidden") {
		t.Fatalf("got %s", buf)
	}
}
