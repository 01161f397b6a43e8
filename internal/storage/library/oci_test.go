package library

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"testing"
)

func TestParse(t *testing.T) {
	for reference, want := range map[string]string{
		"oci://registry.example/shop/db:1": "registry.example/shop/db",
		"registry.example/shop/a/b@sha256:0000000000000000000000000000000000000000000000000000000000000000": "registry.example/shop/a/b",
		"registry.example/shop/../bank/vault:1": "",
		"registry.example/./bank/vault:1":       "",
		"registry.example/shop//vault:1":        "",
		"registry.example/../bank:1":            "",
		"UPPER":                                 "",
	} {
		got, err := OCI{Reference: reference}.Parse()
		if want == "" {
			if !errors.Is(err, ErrSource) {
				t.Errorf("%s: %v, %v", reference, got, err)
			}
			continue
		}
		if err != nil || got.Context().Name() != want {
			t.Errorf("%s: %v, %v", reference, got, err)
		}
	}
}

// TestOnly: credentials that are good for much are used for one repository only, wherever the server leads.
func TestOnly(t *testing.T) {
	var asked []string
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked = append(asked, r.URL.String())
		if r.URL.Path == "/v2/shop/db/manifests/moved" {
			http.Redirect(w, r, "/v2/bank/vault/manifests/1", http.StatusTemporaryRedirect)
		}
	}))
	defer server.Close()
	ref, err := OCI{Reference: server.Listener.Addr().String() + "/shop/db:1"}.Parse()
	if err != nil {
		t.Fatal(err)
	}
	client := &http.Client{Transport: Only{Next: server.Client().Transport, Repository: ref.Context(), Refused: ErrSource}}
	for path, ok := range map[string]bool{
		"/v2/": true, "/v2/shop/db/manifests/1": true, "/v2/shop/db/blobs/sha256:00": true,
		"/registry/token?scope=repository%3Ashop%2Fdb%3Apull&service=x":                              true,
		"/registry/token?scope=repository%3Ashop%2Fdb%3Apull&scope=repository%3Abank%2Fvault%3Apull": false,
		"/registry/token?scope=repository%3Abank%2Fvault%3Apull":                                     false,
		"/v2/bank/vault/manifests/1":                                                                 false,
		"/v2/shop/db/../../bank/vault/tags":                                                          false,
		"/v2/shop/db/%2e%2e/%2e%2e/bank/tags":                                                        false,
		"/v2/shop/dbs/tags/list":                                                                     false,
		"/v2/_catalog":                                                                               false,
		"/v2/shop/db/manifests/moved":                                                                false,
	} {
		resp, err := client.Get(server.URL + path)
		if err == nil {
			resp.Body.Close()
		}
		if ok != (err == nil) || err != nil && !errors.Is(err, ErrSource) {
			t.Errorf("%s: %v", path, err)
		}
	}
	for _, path := range asked {
		if path == "/v2/bank/vault/manifests/1" {
			t.Errorf("asked for %s", path)
		}
	}
	if _, err := client.Get("https://registry.example/v2/shop/db/manifests/1"); !errors.Is(err, ErrSource) {
		t.Errorf("another registry: %v", err)
	}
}
