package machine

import (
	"context"
	"io"
	"net"
	"os"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/vm"
	"atoll.dev/atoll/internal/vm/guestagent"
	"atoll.dev/atoll/internal/vm/hardware"
	"atoll.dev/atoll/internal/vm/swtpm"
)

// Engine starts machines.
type Engine interface {
	Start(ctx context.Context, cfg hardware.Config) (Hardware, error)
	StartTPM(ctx context.Context, cfg swtpm.Config) (TPM, error)
}

// TPM is a running TPM.
type TPM interface {
	Socket() *os.File
	Close() error
}

// Hardware is a running machine, see package hardware.
type Hardware interface {
	power
	diskSlots
	expansion
	consoles
	PID() int
	Done() <-chan struct{}
	Exit() vm.Exit
	Close() error
	Accelerator() vm.Accel
	Stalled() bool
	SaveMemory(ctx context.Context, file *os.File, o hardware.SaveOptions) (hardware.Saved, error)
}

type power interface {
	Kill() error
	PowerOff(ctx context.Context) error
	Pause(ctx context.Context) error
	Resume(ctx context.Context) error
	Reset(ctx context.Context) error
	PowerDown(ctx context.Context) error
}

type diskSlots interface {
	AddDisk(ctx context.Context, d machinev1.Disk, v vm.Volume) error
	RemoveDisk(ctx context.Context, name string) error
	ChangeDisc(ctx context.Context, name string, v vm.Volume) error
	EjectDisc(ctx context.Context, name string) error
	SnapshotDisk(ctx context.Context, name string, frozen, overlay vm.Layer) error
	ResizeDisk(ctx context.Context, name string, bytes int64) error
	LimitDisk(ctx context.Context, name string, l vm.Limits) error
}

type expansion interface {
	Size() hardware.Size
	AddMemory(ctx context.Context, bytes int64) (int64, error)
	SetCPUs(ctx context.Context, n int) (int, error)
	AddNIC(ctx context.Context, n machinev1.NIC, tap *os.File) error
	RemoveNIC(ctx context.Context, name string) error
}

type consoles interface {
	VNC(ctx context.Context) (net.Conn, error)
	Serial() io.ReadWriteCloser
	Console() []byte
	Agent() *guestagent.Client
}
