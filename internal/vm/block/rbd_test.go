package block

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"atoll.dev/atoll/internal/vm/qemu"
	"atoll.dev/atoll/internal/vm/qmp"
)

// graphQEMU keeps block nodes as QEMU does. It is slow with one command.
type graphQEMU struct {
	conn  *os.File
	slow  string        // name of the command
	goOn  chan struct{} // it waits for it then
	nodes map[string]map[string]any
}

func (q *graphQEMU) run() {
	commands := json.NewDecoder(q.conn)
	for {
		var c struct {
			Execute   string         `json:"execute"`
			Arguments map[string]any `json:"arguments"`
		}
		if commands.Decode(&c) != nil {
			return
		}
		name, _ := c.Arguments["node-name"].(string)
		if c.Execute+" "+name == q.slow {
			<-q.goOn
		}
		answer, refusal := `{"return": {}}`, ""
		switch c.Execute {
		case "add-fd":
			answer = `{"return": {"fdset-id": 1000, "fd": 7}}`
		case "blockdev-add":
			if q.nodes[name] != nil {
				refusal = "Duplicate nodes with node-name=" + name
			} else {
				q.nodes[name] = c.Arguments
			}
		case "blockdev-snapshot":
			overlay, _ := c.Arguments["overlay"].(string)
			q.nodes[overlay]["backing"] = c.Arguments["node"]
		case "blockdev-reopen":
			if q.slow == c.Execute {
				<-q.goOn
			}
			options, _ := c.Arguments["options"].([]any)
			for _, o := range options {
				o, _ := o.(map[string]any)
				name, _ := o["node-name"].(string)
				q.nodes[name] = o
			}
		case "blockdev-del":
			used := func(n map[string]any) bool { return n["file"] == name || n["backing"] == name }
			switch {
			case q.nodes[name] == nil:
				refusal = "Failed to find node with node-name=" + name
			case slices.ContainsFunc(slices.Collect(maps.Values(q.nodes)), used):
				refusal = "Block device " + name + " is in use"
			default:
				delete(q.nodes, name)
			}
		}
		if refusal != "" {
			answer = fmt.Sprintf(`{"error": {"class": "GenericError", "desc": %q}}`, refusal)
		}
		if _, err := fmt.Fprintln(q.conn, answer); err != nil {
			return
		}
	}
}

// TestFreezingNotWaitedFor: no image in Ceph stays open when a volume is closed, whatever took too long when a layer
// was frozen, and freezing can be done again.
func TestFreezingNotWaitedFor(t *testing.T) {
	for _, slow := range []string{"blockdev-add v0.0r", "blockdev-reopen", "blockdev-del v0.0f"} {
		for _, again := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/%v", slow, again), func(t *testing.T) {
				t.Parallel()
				patiently(t, func(patience time.Duration) bool { return freezingNotWaitedFor(t, patience, slow, again) })
			})
		}
	}
}

// patiently runs a test with more patience if it says that the host stood still meanwhile.
func patiently(t *testing.T, test func(patience time.Duration) bool) {
	t.Helper()
	if !slices.ContainsFunc([]time.Duration{3 * time.Second, time.Minute}, test) {
		t.Fatal("nothing gets done in a minute")
	}
}

// freezingNotWaitedFor returns false if the layer was not even put on top in time.
func freezingNotWaitedFor(t *testing.T, patience time.Duration, slow string, again bool) bool {
	conn, child, err := qemu.SocketPair()
	if err != nil {
		t.Fatal(err)
	}
	defer child.Close()
	q := &graphQEMU{conn: child, slow: slow, goOn: make(chan struct{}), nodes: map[string]map[string]any{}}
	go q.run()
	v := &Chain{prefix: "v0"}
	client := qmp.New(conn, nil)
	defer client.Close()
	g := New(run(client), patience)
	in := func(image string) Layer {
		return Layer{Format: QCOW2, RBD: &RBD{Pool: "p", Image: image, Conf: []byte("[global]")}}
	}
	if err := g.addLayer(t.Context(), v, in("a"), "", true); err != nil {
		t.Fatal(err)
	}
	err = g.Snapshot(t.Context(), v, in("a"), in("b"))
	close(q.goOn)
	if errors.Is(err, context.DeadlineExceeded) {
		return false
	}
	if err != nil {
		t.Fatal(err)
	}
	g.patience = 30 * time.Second
	if again {
		if err := g.Snapshot(t.Context(), v, in("a"), in("b")); err != nil {
			t.Fatal(err)
		}
		if l := v.layers[0]; l.file != "v0.0r" || l.open["read-only"] != true {
			t.Errorf("not frozen: %+v", l)
		}
	}
	if err := g.Close(context.Background(), v); err != nil {
		t.Error(err)
	}
	if left := slices.Sorted(maps.Keys(q.nodes)); len(left) > 0 {
		t.Errorf("open still: %s", strings.Join(left, ", "))
	}
	return true
}

// run executes commands on a client.
func run(c *qmp.Client) Do {
	return func(ctx context.Context, doing string, commands ...qmp.Command) error {
		if err := c.Run(ctx, commands...); err != nil {
			return fmt.Errorf("%s: %w", doing, err)
		}
		return nil
	}
}
