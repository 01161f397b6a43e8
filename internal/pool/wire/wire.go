// Package wire is what the pool, its members and its clients say to each other: one JSON object per
// line over unix sockets.
//
// The pool listens on a socket of its own for clients: "take" (a shim start wants a micro-VM) and
// "status". With each member, a shim daemon that it has spawned, it shares an unnamed socket. Both are
// between processes of the same administrator. The package holds types and the client; the pool is
// package pool, members are internal/shim/daemon.
package wire

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"atoll.dev/atoll/internal/vm"
)

// Operations of clients.
const (
	OpTake   = "take"
	OpStatus = "status"
)

// maxMessage bounds an answer.
const maxMessage = 1 << 20

// Descriptors that a member inherits.
const (
	FDControl  = 3 // the socket it shares with the pool
	FDRAM      = 4 // memory of the template
	FDState    = 5 // device state of the template
	FDScratch  = 6 // master of the scratch disk
	FDWarm     = 7 // image to warm up with
	ExtraFiles = 5 // how many there are
)

// Request is what a client asks for.
type Request struct {
	Op string `json:"op"`
	// Assignment belongs to OpTake.
	Assignment *Assignment `json:"assignment,omitempty"`
}

// Assignment makes a member a pod's shim.
type Assignment struct {
	Sandbox   string    `json:"sandbox"`   // id
	Namespace string    `json:"namespace"` // containerd's
	TTRPC     string    `json:"ttrpc"`     // address of containerd's events service
	Bundle    string    `json:"bundle"`
	Debug     bool      `json:"debug,omitempty"`
	Since     time.Time `json:"since"` // when the shim was asked for
}

// Taken is the answer to OpTake.
type Taken struct {
	Address string `json:"address,omitempty"` // of the shim's ttrpc socket
	PID     int    `json:"pid,omitempty"`
	Warm    bool   `json:"warm,omitempty"` // it was ready
	Error   string `json:"error,omitempty"`
}

// Status is the answer to OpStatus.
type Status struct {
	Accelerator    string `json:"accelerator"`
	Reason         string `json:"acceleratorReason,omitempty"`
	QEMU           string `json:"qemu"`
	Kernel         string `json:"kernel"` // release that pods run
	MemoryMiB      int    `json:"memoryMiB"`
	Wanted         int    `json:"wanted"`         // clones to keep ready
	Ready          int    `json:"ready"`          // clones that are
	Preparing      int    `json:"preparing"`      // clones that will be
	Waiting        int    `json:"waiting"`        // requests without a clone
	Taken          uint64 `json:"taken"`          // requests served
	TakenWarm      uint64 `json:"takenWarm"`      // of them with a ready clone
	Failed         uint64 `json:"failed"`         // members that did not come up, or broke while they waited
	TemplateBuilds int    `json:"templateBuilds"` // more than 1: it had to be rebuilt
	TemplateMillis int64  `json:"templateMillis"` // boot of the template
	// Error is what is wrong now, "" when the last attempt succeeded.
	Error string `json:"error,omitempty"`
	// FailuresInARow counts attempts since a success; RetryAt is when the next one is, if there is a pause.
	FailuresInARow int       `json:"failuresInARow"`
	RetryAt        time.Time `json:"retryAt,omitzero"`
	// LastFailure stays after a success.
	LastFailure   string    `json:"lastFailure,omitempty"`
	LastFailureAt time.Time `json:"lastFailureAt,omitzero"`
}

// Init is the first thing the pool tells a member.
type Init struct {
	Member     string  `json:"member"` // id
	RunDir     string  `json:"runDir"`
	UID        uint32  `json:"uid"`
	ScratchDir string  `json:"scratchDir"`
	PoolNetns  string  `json:"poolNetns"`
	Tap        string  `json:"tap"` // name of the tap to make there
	Kubelet    string  `json:"kubelet"`
	Containerd string  `json:"containerd"`
	Template   vm.Meta `json:"template"`
}

// Order is what the pool tells a member later.
type Order struct {
	Assign *Assignment `json:"assign,omitempty"`
	// Aside, true: leave the processors to pods that start, while the micro-VM is being prepared; false: no more.
	Aside *bool `json:"aside,omitempty"`
}

// Report is what a member tells the pool.
type Report struct {
	// Ready says that the clone waits; Assigned that it serves a pod at Address.
	Ready    bool   `json:"ready,omitempty"`
	Assigned bool   `json:"assigned,omitempty"`
	Address  string `json:"address,omitempty"`
	// Error says why the clone did not come up. Template: the template is to blame.
	Error    string `json:"error,omitempty"`
	Template bool   `json:"template,omitempty"`
}

// ErrPool is wrapped by errors that the pool answered.
var ErrPool = errors.New("warm pool")

// retry is how long to wait between attempts to reach a pool that is restarting.
const retry = 50 * time.Millisecond

// Take asks the pool at socket for a micro-VM. While the pool does not answer, for example since it is
// being restarted, Take tries again until ctx ends.
func Take(ctx context.Context, socket string, a Assignment) (Taken, error) {
	for {
		var t Taken
		err := ask(ctx, socket, Request{Op: OpTake, Assignment: &a}, &t)
		switch {
		case err == nil && t.Error != "":
			return Taken{}, fmt.Errorf("%w: %s", ErrPool, t.Error)
		case err == nil:
			return t, nil
		}
		select {
		case <-ctx.Done():
			return Taken{}, fmt.Errorf("asking the warm pool for a micro-VM: %w", err)
		case <-time.After(retry):
		}
	}
}

// GetStatus asks the pool how it is.
func GetStatus(ctx context.Context, socket string) (Status, error) {
	var s Status
	if err := ask(ctx, socket, Request{Op: OpStatus}, &s); err != nil {
		return Status{}, fmt.Errorf("asking the warm pool for its status: %w", err)
	}
	return s, nil
}

func ask(ctx context.Context, socket string, r Request, answer any) error {
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", socket)
	if err != nil {
		return err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if err := json.NewEncoder(conn).Encode(r); err != nil {
		return err
	}
	return json.NewDecoder(io.LimitReader(conn, maxMessage)).Decode(answer)
}
