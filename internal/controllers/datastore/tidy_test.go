package datastore

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	api "atoll.dev/atoll/api/atoll/v1alpha1"
)

// slowHost merges the layers of a datastore for as long as there is time.
type slowHost struct {
	tidying, looked chan string
	listed          chan struct{}
	closed          chan string
}

func (h slowHost) Open(context.Context, *api.Datastore) error { return nil }
func (h slowHost) Close(name string)                          { h.closed <- name }
func (h slowHost) Elsewhere(string)                           {}
func (h slowHost) Listed()                                    { close(h.listed) }
func (h slowHost) Look(_ context.Context, name string) State {
	h.looked <- name
	return State{}
}

func (h slowHost) Tidy(ctx context.Context, name string) error {
	h.tidying <- name
	<-ctx.Done()
	h.tidying <- "end of " + name
	return ctx.Err()
}

// datastoreAPI answers for two datastores, of which the first is deleted when delete is closed.
func datastoreAPI(t *testing.T, del chan struct{}) *httptest.Server {
	t.Helper()
	item := func(name string) map[string]any {
		return map[string]any{
			"apiVersion": "atoll.dev/v1alpha1", "kind": "Datastore",
			"metadata": map[string]any{"name": name, "uid": name, "resourceVersion": "1", "generation": 1, "finalizers": []string{Finalizer}},
			"spec":     map[string]any{"directory": map[string]any{"path": "/" + name}},
		}
	}
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		if r.Method != http.MethodGet {
			_ = json.NewEncoder(w).Encode(item("a"))
			return
		}
		// The informer lists by watching.
		event := func(kind string, object any) {
			_ = json.NewEncoder(w).Encode(map[string]any{"type": kind, "object": object})
			w.(http.Flusher).Flush()
		}
		event("ADDED", item("a"))
		event("ADDED", item("b"))
		end := item("")
		end["metadata"] = metav1.ObjectMeta{ResourceVersion: "1", Annotations: map[string]string{metav1.InitialEventsAnnotationKey: "true"}}
		event("BOOKMARK", end)
		select {
		case <-del:
			event("DELETED", item("a"))
			<-r.Context().Done()
		case <-r.Context().Done():
		}
	}))
	t.Cleanup(s.Close)
	return s
}

// TestTidyingIsSlow: a merge that goes on and on keeps no datastore from being looked at, and ends with its own.
func TestTidyingIsSlow(t *testing.T) {
	h := slowHost{tidying: make(chan string, 9), looked: make(chan string, 99), listed: make(chan struct{}), closed: make(chan string, 9)}
	del := make(chan struct{})
	c, err := New(Config{Client: &rest.Config{Host: datastoreAPI(t, del).URL}, Node: "n", Host: h, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ran := make(chan error, 1)
	go func() { ran <- c.Run(ctx) }()
	defer func() {
		cancel()
		if err := <-ran; err != nil {
			t.Error(err)
		}
	}()
	deadline := time.After(5 * time.Minute)
	wait := func(what string, ch chan string, want ...string) {
		t.Helper()
		missing := map[string]bool{}
		for _, w := range want {
			missing[w] = true
		}
		for len(missing) > 0 {
			select {
			case got := <-ch:
				delete(missing, got)
			case <-deadline:
				t.Fatalf("%s: %s", what, fmt.Sprint(missing))
			}
		}
	}
	wait("not tidied", h.tidying, "a", "b")
	wait("not looked at", h.looked, "a", "b")
	select {
	case <-h.listed:
	case <-deadline:
		t.Fatal("nobody learns that all have been seen")
	}
	c.Touch()
	wait("not looked at again", h.looked, "a", "b")
	close(del)
	wait("not closed", h.closed, "a")
	wait("goes on without its datastore", h.tidying, "end of a")
}
