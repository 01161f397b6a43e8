package machinev1

// Phase is where a machine is in its life.
type Phase string

// The phases.
const (
	Starting Phase = "Starting" // QEMU is not running yet
	Running  Phase = "Running"
	Paused   Phase = "Paused" // stands still: an operation is under way, or a datastore is full
	Ended    Phase = "Ended"  // see State.End
)

// EndReason is why a machine has ended.
type EndReason string

// The reasons.
const (
	EndStopped   EndReason = "Stopped"   // as asked, by the guest or by force
	EndShutdown  EndReason = "Shutdown"  // the guest powered itself off
	EndSuspended EndReason = "Suspended" // its memory is saved
	EndCrashed   EndReason = "Crashed"   // QEMU failed or was killed
	EndPanicked  EndReason = "Panicked"  // the kernel of the guest has crashed, and it did not go on by itself
	EndFailed    EndReason = "Failed"    // it could not be started
)

// State is how a machine is.
type State struct {
	// Revision grows with every change of the state.
	Revision int64 `json:"revision"`
	// Applied is the Machine.Revision that was taken up last.
	Applied int64 `json:"applied"`
	Phase   Phase `json:"phase"`
	// Reason and Message say more about the phase, for people: why it does not start, why it stands still.
	Reason  string `json:"reason,omitempty"`
	Message string `json:"message,omitempty"`
	End     End    `json:"end,omitzero"`
	// Trouble is what is wrong with a running guest, nil as far as is known.
	Trouble *Trouble `json:"trouble,omitempty"`
	// Started is when the guest was started or restarted last; Resets counts restarts of the guest.
	Started string `json:"started,omitempty"`
	Resets  int64  `json:"resets,omitempty"`
	// Accelerator is "kvm" or "tcg".
	Accelerator string `json:"accelerator,omitempty"`

	// CPUs and Memory are what the machine has now. Pending are changes that need it powered off and on, in
	// words: "memory cannot shrink while the machine runs".
	CPUs    int      `json:"cpus,omitempty"`
	Memory  int64    `json:"memory,omitempty"`
	Pending []string `json:"pending,omitempty"`

	Disks      []DiskState      `json:"disks,omitempty"`
	NICs       []NICState       `json:"nics,omitempty"`
	Guest      *Guest           `json:"guest,omitempty"` // nil until the guest agent has answered
	Operations []OperationState `json:"operations,omitempty"`
}

// End is how a machine has ended.
type End struct {
	Reason  EndReason `json:"reason,omitempty"`
	Message string    `json:"message,omitempty"`
	At      string    `json:"at,omitempty"`
}

// TroubleReason is what is wrong with a guest.
type TroubleReason string

// The reasons, the worst first.
const (
	GuestPanicked TroubleReason = "GuestPanicked" // its kernel has crashed
	DatastoreFull TroubleReason = "DatastoreFull" // it stands still until there is room for Disk
	DiskError     TroubleReason = "DiskError"     // a request to Disk has failed, of which the guest was told
)

// Trouble is something wrong with a guest, since At.
type Trouble struct {
	Reason TroubleReason `json:"reason"`
	Disk   string        `json:"disk,omitempty"` // by name
	At     string        `json:"at"`
}

// DiskState is how a disk is. A disk that is being taken away stays in the list until it is gone.
type DiskState struct {
	Name     string `json:"name"`
	Volume   string `json:"volume,omitempty"`
	Attached bool   `json:"attached"`
	Bytes    int64  `json:"bytes,omitempty"`
	Error    string `json:"error,omitempty"`
}

// NICState is how a network interface is, on the host's side. Addresses are with prefix length.
type NICState struct {
	Name      string   `json:"name"`
	MAC       string   `json:"mac"`
	Addresses []string `json:"addresses,omitempty"`
	Gateway4  string   `json:"gateway4,omitempty"`
	Error     string   `json:"error,omitempty"`
}

// Guest is what the guest agent says. None of it can be relied on.
type Guest struct {
	// Agent tells whether the guest agent answers now; the rest is what it said last.
	Agent      bool             `json:"agent"`
	Hostname   string           `json:"hostname,omitempty"`
	OSID       string           `json:"osID,omitempty"` // debian
	OSName     string           `json:"osName,omitempty"`
	Kernel     string           `json:"kernel,omitempty"`
	Interfaces []GuestInterface `json:"interfaces,omitempty"`
	// CloudInit is "running", "done", "error" or empty, Detail its first error.
	CloudInit string `json:"cloudInit,omitempty"`
	Detail    string `json:"detail,omitempty"`
}

// GuestInterface is a network interface as the guest has it.
type GuestInterface struct {
	Name      string   `json:"name"`
	MAC       string   `json:"mac,omitempty"`
	Addresses []string `json:"addresses,omitempty"` // with prefix length
}

// OperationState is how far an operation is. It is kept until the Machine does not name the operation any more.
type OperationState struct {
	ID      string `json:"id"`
	Done    bool   `json:"done"`
	Error   string `json:"error,omitempty"`
	Percent int    `json:"percent,omitempty"`
	// Quiesced tells that the file systems were frozen; Bytes is the size of the saved memory.
	Quiesced bool  `json:"quiesced,omitempty"`
	Bytes    int64 `json:"bytes,omitempty"`
	// PauseMillis is how long the guest stood still.
	PauseMillis int64 `json:"pauseMillis,omitempty"`
}
