// Package datastore keeps volumes: disks for pods and virtual machines, on a directory of the host.
//
// A volume is a chain of image files (layers), bottom to top. Only the top one is ever written. A snapshot
// is the chain as it is now, and the volume goes on in a new empty layer on top; a clone or a restored
// volume is a new empty layer over somebody else's chain. All of that takes the same time whatever the size.
// Which layer is still needed follows from the records (one JSON file per volume and snapshot), and is never
// stored. docs/decisions/0010-volume-layers.md says why.
//
// Every call is idempotent and survives kill -9 at any moment: a record names a file before the file exists
// and until it is gone, so that the next call, or Tidy, finishes what was begun. Files that no record names
// are reported and never removed.
//
// It is not a CSI driver and knows nothing of Kubernetes: internal/storage/csi calls it, from the agent. It
// does not open volumes: internal/shim does, with the Disk that Attach returns.
//
// What can go wrong is told by the sentinels below. No call hangs longer than its timeout when the directory
// does (a dead network file system).
package datastore

import (
	"context"
	"errors"
	"fmt"
	"time"

	"atoll.dev/atoll/internal/datadir/handover"
)

// Errors to tell apart with errors.Is. Their texts are for people; wrapped errors name what it is about.
var (
	// ErrInvalid: the request makes no sense: a bad id, a size of zero or beyond MaxSize, contradicting
	// settings. Asking again does not help.
	ErrInvalid = errors.New("invalid request")
	// ErrNotFound: no such volume or snapshot. Delete and DeleteSnapshot never return it.
	ErrNotFound = errors.New("not found")
	// ErrExists: the id is taken by something else than what was asked for.
	ErrExists = errors.New("exists with other settings")
	// ErrAttached: the volume is in use; the text names the holder.
	ErrAttached = errors.New("volume is attached")
	// ErrShrink: a volume cannot become smaller, nor a copy be smaller than its source.
	ErrShrink = errors.New("volumes cannot shrink")
	// ErrFull: the datastore has no room, or has reached the threshold at which it takes nothing more.
	ErrFull = errors.New("datastore is full")
	// ErrUnavailable: the datastore cannot be reached, in time. Asking again may help.
	ErrUnavailable = errors.New("datastore is not available")
	// ErrCorrupt: a record or an image is not what it should be. Nothing was changed.
	ErrCorrupt = errors.New("damaged")
	// ErrKey: the key of an encrypted volume is missing, or is not the right one.
	ErrKey = errors.New("encryption key is missing or wrong")
	// ErrBusy: another operation on the same volume is under way. Asking again helps.
	ErrBusy = errors.New("busy with another operation")
	// ErrNotOpen: nobody has the volume open at this moment, though it is attached. Live returns it, and the
	// engine then changes the files itself; it keeps others from attaching meanwhile.
	ErrNotOpen = errors.New("volume is not open")
	// ErrUnsupported: this cannot be done with such a volume.
	ErrUnsupported = errors.New("not supported")
)

// Sizes, in bytes. Sizes that are asked for are rounded up to a multiple of SizeUnit.
const (
	SizeUnit = 1 << 20
	MinSize  = SizeUnit
	MaxSize  = 64 << 40
)

// Provisioning says when a volume takes its room.
type Provisioning string

const (
	// Thin takes room as it is written. The default.
	Thin Provisioning = "thin"
	// Thick reserves its room at once.
	Thick Provisioning = "thick"
	// EagerZeroed reserves its room and writes all of it with zeros, which takes time.
	EagerZeroed Provisioning = "eager-zeroed"
)

// Spec is what Create makes.
type Spec struct {
	// ID names the volume: 1 to 63 characters of a-z, 0-9, '-' and '.', first and last one of a-z, 0-9.
	ID string
	// Size in bytes; 0 with a Source means the size of the source.
	Size int64
	// Limit is the most that Size may become by rounding up; 0 is no limit.
	Limit int64
	// Provisioning is Thin when empty.
	Provisioning Provisioning
	// Format is handover.FormatQCOW2 or FormatRaw for a volume without Source; empty takes qcow2 for thin
	// and for encrypted volumes, raw else. Raw is faster, and takes more room once snapshots exist.
	Format string
	// Encryption names the class of the key-encryption key; empty is not encrypted. A copy of an encrypted
	// volume must be encrypted, but may have another class.
	Encryption string
	// Source is what the volume is a copy of; nil is a blank volume.
	Source *Source
	// Labels are kept with the volume and returned; the engine does not read them.
	Labels map[string]string
	// Progress, if set, is told now and then how much of a long copy is done.
	Progress func(done, total int64)
	// Fill, if set, writes what a new volume without Source holds from the beginning. Nobody sees the volume before
	// Fill has returned; when it fails, or this process ends, nothing is left and the next call begins anew. It is
	// not called for a volume that is there. It must keep to its context.
	Fill func(ctx context.Context, to Target) error
}

// Target is the image of a volume that is being filled.
type Target struct {
	// Layer is where to write: an empty image of Layer.Size bytes, that reads as zeros.
	Layer handover.Layer
	// Secrets are LUKS passphrases by the name of the key (Layer.Key).
	Secrets map[string][]byte
}

// Source is what a new volume is a copy of: a snapshot or a volume.
type Source struct {
	Snapshot string
	Volume   string
	// Live is needed when Volume is attached for writing.
	Live Live
}

// Volume is what is known about a volume.
type Volume struct {
	ID           string
	Size         int64
	Provisioning Provisioning
	Encryption   string // class of the key-encryption key, or ""
	KEKs         []KEK  // what wraps its keys now
	Labels       map[string]string
	Created      time.Time
	// FromSnapshot or FromVolume is what it was copied from, which may be gone by now.
	FromSnapshot, FromVolume string
	Attachments              []Attachment
	// Used is what the layers take that no other volume or snapshot shares, in bytes on disk. Only List and
	// Upkeep.Volume know it.
	Used int64
	// Layers is the length of the chain.
	Layers int
	// State is StateReady, or what is not finished: Create or Delete has to be called again.
	State State
}

// Snapshot is what is known about a snapshot.
type Snapshot struct {
	ID      string
	Volume  string // the volume it was taken of, which may be gone by now
	Size    int64  // of a volume made from it, at least
	Created time.Time
	// Encryption is the class of the key-encryption key of the volume, or "".
	Encryption string
	KEKs       []KEK // what wraps its keys now
	Used       int64
}

// KEK names a key-encryption key: who keeps it, what it is called there, and its fingerprint, which tells
// nothing about it.
type KEK struct {
	Provider    string `json:"provider"`
	ID          string `json:"keyID,omitempty"`
	Fingerprint string `json:"fingerprint"`
}

// Same tells whether both are one key; it may have been renamed.
func (k KEK) Same(other KEK) bool {
	return k.Provider == other.Provider && k.Fingerprint == other.Fingerprint
}

// String is how messages name it.
func (k KEK) String() string {
	if k.ID == "" {
		return fmt.Sprintf("key %s of provider %q", k.Fingerprint, k.Provider)
	}
	return fmt.Sprintf("key %q (%s) of provider %q", k.ID, k.Fingerprint, k.Provider)
}

// State of a volume or snapshot.
type State string

// All states.
const (
	StateCreating State = "creating"
	StateReady    State = "ready"
	StateDeleting State = "deleting"
)

// Mode is how a volume is attached.
type Mode string

const (
	// ReadWrite is for one writer: nobody else may have it.
	ReadWrite Mode = "rw"
	// ReadOnly is for any number of readers.
	ReadOnly Mode = "ro"
	// ReadWriteMany is for several writers; only raw volumes without snapshots, and only as a block
	// device (the caller sees to the latter).
	ReadWriteMany Mode = "rwx"
)

// Attachment is one holder of a volume.
type Attachment struct {
	// Holder is any non-empty text that names who has the volume open (a node, a pod): the key of Detach.
	Holder string    `json:"holder"`
	Mode   Mode      `json:"mode"`
	Since  time.Time `json:"since"`
}

// Engine holds volumes. internal/storage/datastore/enginetest is what every engine has to pass.
// Methods may be called at the same time, from several processes and, on a shared datastore, hosts.
type Engine interface {
	// Create makes a volume. When a volume with this id and the same settings exists it is returned.
	// ErrInvalid, ErrExists, ErrNotFound (source), ErrAttached (source, without Live), ErrShrink, ErrFull,
	// ErrKey.
	Create(ctx context.Context, spec Spec) (Volume, error)
	// Delete removes a volume. Snapshots and copies of it stay. No volume is no error. ErrAttached.
	Delete(ctx context.Context, id string) error
	// Expand makes a volume at least this large. live is needed when it is attached for writing. A volume
	// that is as large already is no error. ErrNotFound, ErrShrink, ErrInvalid, ErrFull, ErrAttached.
	Expand(ctx context.Context, id string, bytes int64, live Live) (Volume, error)
	// Snapshot keeps what is in a volume now. live is needed when it is attached for writing. The same
	// snapshot of the same volume again is no error. ErrNotFound, ErrExists, ErrAttached, ErrFull.
	Snapshot(ctx context.Context, id, volume string, live Live) (Snapshot, error)
	// DeleteSnapshot removes a snapshot. Volumes made from it stay. No snapshot is no error.
	DeleteSnapshot(ctx context.Context, id string) error
	// Rollback makes a volume hold again what it held when one of its snapshots was taken. Its id, size, labels and
	// encryption stay, and so do all snapshots. What was written since and no snapshot or copy holds is gone. A
	// volume that nobody has written to since is no error. ErrNotFound, ErrInvalid (a snapshot of another volume),
	// ErrAttached, ErrFull, ErrKey.
	Rollback(ctx context.Context, id, snapshot string) (Volume, error)
	// Attach records that holder has the volume from now on, and returns how to open it. Again by the same
	// holder with the same mode it returns the disk as it is now. Call it before every start of a QEMU that
	// opens the volume: layers may have been added. ErrNotFound, ErrAttached, ErrCorrupt, ErrUnsupported.
	Attach(ctx context.Context, id, holder string, mode Mode) (handover.Disk, error)
	// Admit is called by whoever is about to open a disk that Attach has returned, and by nobody who has it open.
	// It cuts off any other process that has the image of a volume for one writer open still: one on a host
	// that does not know that it was detached, or one that a crash has left. The result is nil where paths are
	// enough. ErrUnavailable.
	Admit(ctx context.Context, disk handover.Disk) (*handover.Ceph, error)
	// Detach forgets a holder, who must have closed all files of the volume. No volume or holder is no error.
	Detach(ctx context.Context, id, holder string) error
	// List returns all volumes and snapshots, sorted by id.
	List(ctx context.Context) (Contents, error)
}

// Upkeep is what looks after a datastore.
type Upkeep interface {
	// Volume and SnapshotByID return one entry of List. ErrNotFound.
	Volume(ctx context.Context, id string) (Volume, error)
	SnapshotByID(ctx context.Context, id string) (Snapshot, error)
	// SetLabels replaces the labels of a volume, attached or not. ErrNotFound.
	SetLabels(ctx context.Context, id string, labels map[string]string) error
	// Status tells room and health. It never fails and never takes longer than its timeout.
	Status(ctx context.Context) Status
	// Check reads every record and image and reports what is wrong. It changes nothing.
	Check(ctx context.Context, progress func(done, total int)) (Report, error)
	// Tidy finishes what a crash left unfinished and merges layers that nothing tells apart any more, in
	// volumes that are not attached. Call it at start and now and then.
	Tidy(ctx context.Context) error
	// Unlock returns the LUKS passphrases of a disk by the name of the key (Layer.Key). ErrKey.
	Unlock(ctx context.Context, disk handover.Disk) (map[string][]byte, error)
	// Rewrap encrypts the keys of a volume or snapshot with the current key-encryption key of a class. The
	// data and the layers are not touched; it may be attached. ErrNotFound, ErrKey.
	Rewrap(ctx context.Context, of Source, class string) error
	// Rekey gives the layers that only this volume uses a new key (a new LUKS passphrase; the data are not
	// encrypted again). It returns how many layers keep their old key, since others share them.
	Rekey(ctx context.Context, id string) (kept int, err error)
}

// Contents is everything on a datastore.
type Contents struct {
	Volumes   []Volume
	Snapshots []Snapshot
}

// Live changes a volume that somebody has open for writing. internal/shim implements it by QMP. Both methods
// are idempotent, since the engine calls them again after a crash. Both return ErrNotOpen when nobody has the
// volume open after all.
type Live interface {
	// Snapshot makes overlay, an empty image that exists, the top layer of the open disk. Before it tells
	// QEMU, it adds the layer to whatever the disk would be opened from again after a crash of QEMU (the
	// handover file): reading through an empty layer is always right, writing below one is not. When
	// overlay is the top layer already it does nothing. key is the wrapped key of an encrypted overlay.
	Snapshot(ctx context.Context, overlay handover.Layer, key *handover.WrappedKey) error
	// Resize makes the open disk this large. A disk of that size is no error.
	Resize(ctx context.Context, bytes int64) error
}

// Keys wraps keys of volumes with key-encryption keys. Package keys has one over plain bytes.
// The additional data bind a wrapped key to its volume; unwrapping with others must fail.
type Keys interface {
	// Current names the key-encryption key of class that Wrap uses. ErrKey when there is none.
	Current(ctx context.Context, class string) (KEK, error)
	// Wrap encrypts with the current key-encryption key of class. ErrKey when there is none.
	Wrap(ctx context.Context, class string, key, additional []byte) (handover.WrappedKey, error)
	// Unwrap decrypts. ErrKey when the key-encryption key is missing or is not the one.
	Unwrap(ctx context.Context, wrapped handover.WrappedKey, additional []byte) ([]byte, error)
}

// Status is the state of a datastore.
type Status struct {
	// Capacity and Free are of the file system, in bytes; Used is what volumes and snapshots take;
	// Provisioned is the sum of the sizes of all volumes, and Volumes and Snapshots are their numbers.
	Capacity, Free, Used, Provisioned int64
	Volumes, Snapshots                int
	// Creatable is the size of the largest thin volume that would be accepted, 0 when none is.
	Creatable int64
	// Warning: the fill level has reached the first threshold; Full: the second one, nothing is accepted.
	Warning, Full bool
	// Err is nil when the datastore works: ErrUnavailable, ErrCorrupt. Numbers are zero when it is set.
	Err error
}

// Report is the result of Check.
type Report struct {
	// Images is how many were checked.
	Images   int
	Problems []Problem
}

// Problem is one thing that is wrong.
type Problem struct {
	// Kind is one of the constants below.
	Kind ProblemKind
	// Volumes and Snapshots are concerned; empty for an orphan.
	Volumes, Snapshots []string
	// Path is the file or image.
	Path string
	// Text says what is wrong.
	Text string
	// Bytes on disk, of orphans.
	Bytes int64
}

// ProblemKind says what to do about a problem.
type ProblemKind string

const (
	// ProblemCorrupt is an image that is damaged.
	ProblemCorrupt ProblemKind = "corrupt"
	// ProblemLeak is an image that takes more room than it needs; harmless.
	ProblemLeak ProblemKind = "leak"
	// ProblemMissing is an image that a record names and that is not there.
	ProblemMissing ProblemKind = "missing"
	// ProblemForeign is an image that refers to a file that its record does not know. It is never opened.
	ProblemForeign ProblemKind = "foreign-reference"
	// ProblemRecord is a record that cannot be read.
	ProblemRecord ProblemKind = "record"
	// ProblemOrphan is a file that no record names. The engine never removes it.
	ProblemOrphan ProblemKind = "orphan"
	// ProblemUnfinished is an operation that was interrupted; calling it again, or Tidy, finishes it.
	ProblemUnfinished ProblemKind = "unfinished"
	// ProblemKeyMissing is an encrypted image that cannot be unlocked.
	ProblemKeyMissing ProblemKind = "key"
	// ProblemUnchecked is an image that is open for writing, of which only the header was looked at. It is no
	// error.
	ProblemUnchecked ProblemKind = "in-use"
)

// Limits are fill levels, as a part of the file system's capacity. Zero values take the defaults.
type Limits struct {
	// WarnAt, default 0.8: from here on Status.Warning is set.
	WarnAt float64
	// RefuseAt, default 0.95: from here on nothing is created, grown or snapshotted.
	RefuseAt float64
	// Overcommit is how many times the capacity the sizes of all volumes may add up to; 0 is any.
	Overcommit float64
}
