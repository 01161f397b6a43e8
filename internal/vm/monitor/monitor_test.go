package monitor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"atoll.dev/atoll/internal/vm/qemu"
	"atoll.dev/atoll/internal/vm/qmp"
)

// fake answers like QEMU: by the command and its id, and what it says after that.
func fake(t *testing.T, answers map[string]string) (*Monitor, chan struct{}, *[]string) {
	t.Helper()
	conn, child, err := qemu.SocketPair()
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	var said []string
	go serve(child, answers, &said)
	m := New(conn, ended, nil)
	t.Cleanup(func() { _ = m.Close(); _ = child.Close() })
	return m, ended, &said
}

func serve(conn *os.File, answers map[string]string, said *[]string) {
	commands := json.NewDecoder(conn)
	for {
		var c struct {
			Execute   string         `json:"execute"`
			Arguments map[string]any `json:"arguments"`
		}
		if commands.Decode(&c) != nil {
			return
		}
		id, _ := c.Arguments["id"].(string)
		*said = append(*said, strings.TrimSpace(c.Execute+" "+id))
		answer := answers[c.Execute]
		if answer == "" {
			answer = `{"return": {}}`
		}
		if _, err := fmt.Fprintln(conn, answer); err != nil {
			return
		}
	}
}

const gone = `{"event": "DEVICE_DELETED", "data": {"device": "d1", "path": "/machine/peripheral/d1"}}`

func TestUnplug(t *testing.T) {
	for name, test := range map[string]struct {
		answer string
		want   error
	}{
		"plain":           {`{"return": {}}` + "\n" + gone, nil},
		"event first":     {gone + "\n" + `{"return": {}}`, nil},
		"others":          {`{"return": {}}` + "\n" + strings.ReplaceAll(gone, "d1", "d2"), context.DeadlineExceeded},
		"on its way":      {`{"error": {"class": "GenericError", "desc": "Device d1 is already in the process of unplug"}}` + "\n" + gone, nil},
		"not there":       {`{"error": {"class": "DeviceNotFound", "desc": "Device 'd1' not found"}}`, nil},
		"does not let go": {`{"return": {}}`, context.DeadlineExceeded},
	} {
		t.Run(name, func(t *testing.T) {
			m, _, _ := fake(t, map[string]string{"device_del": test.answer})
			patience := 200 * time.Millisecond
			if test.want == nil {
				patience = 30 * time.Second
			}
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			if err := m.Unplug(ctx, "d1"); !errors.Is(err, test.want) {
				t.Errorf("%v, want %v", err, test.want)
			}
			if len(m.waiters) > 0 {
				t.Error("somebody waits still")
			}
		})
	}
}

func TestUnplugOfEnded(t *testing.T) {
	m, ended, _ := fake(t, nil)
	close(ended)
	if err := m.Unplug(t.Context(), "d1"); !errors.Is(err, ErrExited) {
		t.Errorf("%v", err)
	}
	_ = m.Close()
	if err := m.Do(t.Context(), "asking", qmp.Command{Name: "x"}); !errors.Is(err, ErrExited) {
		t.Errorf("%v", err)
	}
}

func TestPlugCPUs(t *testing.T) {
	slots := `{"return": [{"type": "cpu", "props": {"core-id": 2}}, {"type": "cpu", "props": {"core-id": 1}}, ` +
		`{"type": "cpu", "props": {"core-id": 0}, "qom-path": "/x"}]}`
	m, _, said := fake(t, map[string]string{"query-hotpluggable-cpus": slots})
	n, err := m.PlugCPUs(t.Context(), 2)
	if err != nil || n != 2 || strings.Join(*said, ",") != "query-hotpluggable-cpus,device_add cpu1" {
		t.Errorf("%d, %v, %v", n, err, *said)
	}
	refuses, _, _ := fake(t, map[string]string{"query-hotpluggable-cpus": slots, "device_add": `{"error": {"class": "GenericError", "desc": "no"}}`})
	if n, err := refuses.PlugCPUs(t.Context(), 3); err == nil || n != 1 {
		t.Errorf("%d, %v", n, err)
	}
}

func TestPlugMemoryUndone(t *testing.T) {
	m, _, said := fake(t, map[string]string{"device_add": `{"error": {"class": "GenericError", "desc": "no"}}`})
	if err := m.PlugMemory(t.Context(), 3, map[string]any{"qom-type": "memory-backend-ram"}); err == nil {
		t.Error("no error")
	}
	if strings.Join(*said, ",") != "object-add m3,device_add dimm3,object-del m3" {
		t.Errorf("%v", *said)
	}
}
