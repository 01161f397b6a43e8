//go:build tools

// Package conformance pins the upstream end-to-end suite that `make conformance`
// compiles and runs; it is a module of its own so that the suite's dependencies
// stay out of the product.
package conformance

import _ "k8s.io/kubernetes/test/e2e"
