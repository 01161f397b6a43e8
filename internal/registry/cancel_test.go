package registry

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
)

// TestCancelWhileWritten: the bytes of an upload that is cancelled count for as long as a request has it open, and that
// one cannot go on. Nobody else can write it, or make a blob of what another one still writes.
func TestCancelWhileWritten(t *testing.T) {
	h := start(t)
	h.change(func() { h.settings["shop"] = atoll.NamespaceRegistry{Quota: quantity(8 << 20)} })
	_, token := h.token("olga", passwords()["olga"], "repository:shop/web:pull,push")
	status, header, text := h.do(http.MethodPost, "/v2/shop/web/blobs/uploads/", token, nil, nil)
	if status != http.StatusAccepted {
		t.Fatal(status, text)
	}
	at := header.Get("Location")
	at = at[strings.Index(at, "/v2/"):]
	const part = 1 << 20
	body, send := io.Pipe()
	ended := make(chan int, 1)
	go func() {
		status, _, _, err := h.try(http.MethodPatch, at, token, body, nil)
		if err != nil {
			t.Error(err)
			body.CloseWithError(err)
		}
		ended <- status
	}()
	if _, err := send.Write(make([]byte, part)); err != nil {
		t.Fatal(err)
	}
	used := func() int64 {
		n, err := h.reg.Usage(t.Context(), "shop")
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	for used() < part {
		time.Sleep(time.Millisecond)
	}
	if status, _, text := h.do(http.MethodGet, at, token, nil, nil); status != http.StatusNoContent {
		t.Errorf("asking how far it is: %d %s", status, text)
	}
	digest := fmt.Sprintf("sha256:%x", sha256.Sum256(make([]byte, part)))
	for method, to := range map[string]string{http.MethodPatch: at, http.MethodPut: at + "&digest=" + digest} {
		if status, _, text := h.do(method, to, token, bytes.NewReader(nil), nil); status != http.StatusConflict || !strings.Contains(text, "another request") {
			t.Errorf("another %s: %d %s", method, status, text)
		}
	}
	if status, _, text := h.do(http.MethodDelete, at, token, nil, nil); status != http.StatusNoContent {
		t.Fatal(status, text)
	}
	if got := used(); got != part {
		t.Errorf("%d bytes are used while the cancelled upload is open", got)
	}
	for { // the server takes no more
		if _, err := send.Write(make([]byte, part)); err != nil {
			break
		}
		select {
		case status := <-ended:
			ended <- status
			_ = send.Close()
		default:
		}
	}
	if status := <-ended; status < http.StatusBadRequest {
		t.Errorf("going on with it: %d", status)
	}
	left, err := filepath.Glob(filepath.Join(h.dir, "docker/registry/v2/repositories/shop/web/_uploads/*"))
	if err != nil || len(left) > 0 {
		t.Errorf("on disk are %v, %v", left, err)
	}
	if got := used(); got != 0 {
		t.Errorf("%d bytes are used in the end", got)
	}
	if status, _, _ := h.do(http.MethodPatch, at, token, bytes.NewReader(nil), nil); status != http.StatusNotFound {
		t.Errorf("a cancelled upload: %d", status)
	}
}
