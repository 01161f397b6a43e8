// Package credentials is the kubelet's image credential provider: a role of atoll-pod that the kubelet executes when it
// pulls from the registry.
//
// It hands the token that the kubelet has made for the pod's service account on as the password. The token is for the
// registry alone (its audience), and lives for minutes; the registry asks the API server whose it is. It holds no state,
// reads no network and links no Kubernetes code. What can go wrong: what it is given is not the kubelet's request, which
// ends it with status 1, or the cluster uses an external registry, to which the token would mean nothing: it answers
// with no credentials then.
package credentials

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
)

// Role is the name the kubelet executes.
const Role = "atoll-registry-credentials"

// ExternalMark is the file beside the executable that exists while an external registry is used.
const ExternalMark = "external-registry"

// User is the name that a service account's token is sent with; the token says who it is.
const User = "serviceaccount"

// maxRequest is how much the kubelet may say.
const maxRequest = 1 << 20

const (
	apiVersion   = "credentialprovider.kubelet.k8s.io/v1"
	kindRequest  = "CredentialProviderRequest"
	kindResponse = "CredentialProviderResponse"
)

type request struct {
	APIVersion          string `json:"apiVersion"`
	Kind                string `json:"kind"`
	Image               string `json:"image"`
	ServiceAccountToken string `json:"serviceAccountToken"`
}

type auth struct {
	Username string `json:"username"`
	Password string `json:"password"`
}

type response struct {
	APIVersion    string          `json:"apiVersion"`
	Kind          string          `json:"kind"`
	CacheKeyType  string          `json:"cacheKeyType"`
	CacheDuration string          `json:"cacheDuration"`
	Auth          map[string]auth `json:"auth"`
}

// Main answers one request on standard input.
func Main([]string) int {
	_, err := os.Stat(filepath.Join(filepath.Dir(os.Args[0]), ExternalMark))
	if err := Answer(os.Stdin, os.Stdout, err == nil); err != nil {
		fmt.Fprintln(os.Stderr, Role+":", err)
		return 1
	}
	return 0
}

// Answer writes the answer to one request. The kubelet keeps nothing: the token is made for each pull.
func Answer(in io.Reader, out io.Writer, external bool) error {
	var req request
	if err := json.NewDecoder(io.LimitReader(in, maxRequest)).Decode(&req); err != nil {
		return fmt.Errorf("reading the request: %w", err)
	}
	if req.APIVersion != apiVersion || req.Kind != kindRequest {
		return fmt.Errorf("the request is %s %s, not %s %s", req.APIVersion, req.Kind, apiVersion, kindRequest)
	}
	host, _, ok := strings.Cut(req.Image, "/")
	if !ok || host == "" {
		return errors.New("the image names no registry")
	}
	resp := response{APIVersion: apiVersion, Kind: kindResponse, CacheKeyType: "Registry", CacheDuration: "0s", Auth: map[string]auth{}}
	if req.ServiceAccountToken != "" && !external {
		resp.Auth[host] = auth{Username: User, Password: req.ServiceAccountToken}
	}
	return json.NewEncoder(out).Encode(resp)
}
