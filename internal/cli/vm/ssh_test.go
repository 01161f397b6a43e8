package vm

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/rest"
)

// TestSSHRefused: what the API server refuses ends the wait for the ssh server at once, and what passes does not.
func TestSSHRefused(t *testing.T) {
	bin := t.TempDir()
	if err := os.WriteFile(filepath.Join(bin, "ssh"), []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", bin)
	pods := schema.GroupResource{Resource: "pods"}
	for name, tt := range map[string]struct {
		answer *apierrors.StatusError
		ends   bool
		say    []string
	}{
		"forbidden": {apierrors.NewForbidden(pods, "db", errors.New("no")), true, []string{"pods/portforward in namespace team", "Edit and Owner", "an administrator gives them", "spec.accessList"}},
		"gone":      {apierrors.NewNotFound(pods, "db"), true, []string{`"db" not found`}},
		"busy":      {apierrors.NewTooManyRequests("busy", 1), false, nil},
		"failing":   {apierrors.NewInternalError(errors.New("no")), false, nil},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			var asked atomic.Int32
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				// Both ways to forward are tried in each look, unless it ends.
				if asked.Add(1) > 2 {
					cancel()
				}
				w.Header().Set("Content-Type", "application/json")
				w.WriteHeader(int(tt.answer.ErrStatus.Code))
				_ = json.NewEncoder(w).Encode(tt.answer.ErrStatus)
			}))
			defer server.Close()
			w := newWorld(t, objects()...)
			w.must("ls")
			s := &session{WithWatch: w.WithWatch, namespace: "team", config: &rest.Config{Host: server.URL}}
			err := w.c.ssh(ctx, s, "db", login{port: 22}, waiting{timeout: time.Hour})
			if err == nil || (asked.Load() == 1) != tt.ends {
				t.Fatalf("%d requests: %v", asked.Load(), err)
			}
			for _, want := range tt.say {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%v: without %q", err, want)
				}
			}
		})
	}
}
