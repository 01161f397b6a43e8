// Package cripb decodes the few fields of the CRI's pod sandbox configuration that the shim needs.
//
// It holds generated message types only, wire-compatible with k8s.io/cri-api, which the shim must not
// link: sandbox.proto says what is taken. internal/shim/sandbox is its only user. The bytes come from
// containerd, a trusted peer.
package cripb

//go:generate ./generate.sh
