package apiserver

import (
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"atoll.dev/atoll/internal/datadir/atomicfile"
	"atoll.dev/atoll/internal/datadir/pki"
)

// AuthenticationConfig is what AuthenticationFile has without any issuer. It allows anonymous requests for the health endpoints and the web consoles of virtual machines
// only, which need a ticket; everything else needs a certificate or a token.
const AuthenticationConfig = `apiVersion: apiserver.config.k8s.io/v1
kind: AuthenticationConfiguration
anonymous:
  enabled: true
  conditions:
  - path: /livez
  - path: /readyz
  - path: /healthz
  - path: /vm/web-console/proxy
  - path: /vm/web-console/stream
`

// webhookConfig says where to ask whose a token is that nobody else knows.
const webhookConfig = `apiVersion: v1
kind: Config
clusters:
- name: identity
  cluster:
    certificate-authority: %q
    server: https://127.0.0.1:%d/authenticate
contexts:
- name: identity
  context: {cluster: identity}
current-context: identity
`

// auditPolicy records who did what, without bodies, and leaves out what the
// system reads and its heartbeats.
const auditPolicy = `apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
omitManagedFields: true
rules:
- level: None
  verbs: [get, list, watch]
  users:
  - system:apiserver
  - system:kube-controller-manager
  - system:kube-scheduler
  - system:kube-proxy
  - system:coredns
- level: None
  verbs: [get, list, watch]
  userGroups: ["system:nodes", "system:serviceaccounts:kube-system"]
- level: None
  verbs: [update, patch]
  userGroups: ["system:nodes"]
  resources:
  - group: ""
    resources: [nodes/status, pods/status]
- level: None
  resources:
  - group: ""
    resources: [events]
  - group: events.k8s.io
    resources: [events]
  - group: coordination.k8s.io
    resources: [leases]
- level: None
  nonResourceURLs:
  - /healthz*
  - /livez*
  - /readyz*
  - /version
  - /metrics
  - /vm/web-console/*
  - /openapi*
  - /api
  - /api/*
  - /apis
  - /apis/*
- level: Metadata
`

// encryptionConfig is the form of the encryption configuration. The first
// provider encrypts; identity reads what was written before there was a key.
const encryptionConfig = `apiVersion: apiserver.config.k8s.io/v1
kind: EncryptionConfiguration
resources:
- resources: [secrets]
  providers:
  - secretbox:
      keys:
      - name: key1
        secret: %s
  - identity: {}
`

// ErrNoEncryptionKey says that etcd holds data but the key of its secrets is
// gone. The way out is to restore the file from a backup.
var ErrNoEncryptionKey = errors.New("the encryption key of stored secrets is missing; restore it from a backup")

// writeFiles writes the configuration files the flags name.
func (s *APIServer) writeFiles() error {
	for _, dir := range []string{s.cfg.StateDir, filepath.Dir(s.cfg.AuditLog)} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return err
		}
	}
	if _, err := atomicfile.WriteIfChanged(s.authenticationFile(), []byte(AuthenticationConfig), 0o600); err != nil {
		return err
	}
	if _, err := atomicfile.WriteIfChanged(s.webhookFile(), []byte(fmt.Sprintf(webhookConfig, s.cfg.Files.CACert(pki.ClusterCA), s.cfg.Identity)), 0o600); err != nil {
		return err
	}
	if _, err := atomicfile.WriteIfChanged(s.auditPolicyFile(), []byte(auditPolicy), 0o600); err != nil {
		return err
	}
	return s.ensureEncryptionKey()
}

// ensureEncryptionKey makes the key of stored secrets once.
func (s *APIServer) ensureEncryptionKey() error {
	path := s.encryptionFile()
	info, err := os.Stat(path)
	switch {
	case err == nil && info.Size() > 0:
		return os.Chmod(path, 0o600)
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return err
	case s.cfg.HasData:
		return fmt.Errorf("%w: %s", ErrNoEncryptionKey, path)
	}
	var key [32]byte
	if _, err := rand.Read(key[:]); err != nil {
		return fmt.Errorf("generating encryption key: %w", err)
	}
	text := fmt.Sprintf(encryptionConfig, base64.StdEncoding.EncodeToString(key[:]))
	return atomicfile.Write(path, []byte(text), 0o600)
}
