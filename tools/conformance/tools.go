//go:build tools

// Package tools pins the conformance suite of the distribution specification, which is a program of its own.
package tools

import _ "github.com/opencontainers/distribution-spec/conformance"
