package handover

// MaxLayers bounds the layers of a disk. Whatever opens disks takes as many and one more.
const MaxLayers = 128

// Formats of a layer.
const (
	FormatRaw   = "raw"
	FormatQCOW2 = "qcow2"
)

// Disk describes the block graph of one attached volume: everything a process needs that opens it with
// QEMU, and no secret. The storage engine (internal/storage/datastore) writes it, the shim and the
// storage daemon of runc pods read it.
//
// The graph is built from Layers alone, with an explicit backing node for every layer but the first. No
// file name that stands in an image is ever followed, and an image that asks for a data file is refused.
type Disk struct {
	// Volume is the engine's id of the volume.
	Volume string `json:"volume"`
	// Size is what the guest sees, in bytes. The node of the top layer has this size.
	Size int64 `json:"size"`
	// ReadOnly: the device and every layer are read-only.
	ReadOnly bool `json:"readOnly,omitempty"`
	// Shared: others may have the same volume open for writing (raw block volumes only), so that the
	// device needs share-rw=on and the file locking=off.
	Shared bool `json:"shared,omitempty"`
	// Layers from bottom to top; the last one is what the device uses.
	Layers []Layer `json:"layers"`
	// Keys are the keys that Layer.Key names, encrypted with a key-encryption key.
	Keys map[string]WrappedKey `json:"keys,omitempty"`
}

// Layer is one image of a chain.
type Layer struct {
	// ID is unique in the datastore, 17 characters of a-z0-9: part of a QEMU node name.
	ID string `json:"id"`
	// File is the absolute path of the image. Empty when RBD is set.
	File string `json:"file,omitempty"`
	// RBD is the image in Ceph.
	RBD *RBD `json:"rbd,omitempty"`
	// Format is FormatRaw or FormatQCOW2. It is never guessed.
	Format string `json:"format"`
	// Size is the virtual size of this image in bytes; a layer may be smaller than the one above.
	Size int64 `json:"size"`
	// ReadOnly is true for all layers but the top one of a disk that is open for writing.
	ReadOnly bool `json:"readOnly,omitempty"`
	// Key is the key of a LUKS-encrypted layer: a name in Disk.Keys. Empty for a layer in clear.
	Key string `json:"key,omitempty"`
}

// RBD is where an image is in Ceph.
type RBD struct {
	Pool      string `json:"pool"`
	Namespace string `json:"namespace,omitempty"`
	Image     string `json:"image"`
	// Conf is the path of a ceph.conf, User the Ceph user without "client.".
	Conf string `json:"conf,omitempty"`
	User string `json:"user,omitempty"`
}

// Ceph is what a process needs to open images in Ceph besides their names. It is never written to disk or logged.
type Ceph struct {
	// Conf is a ceph.conf for it: that of the host without the names of files.
	Conf []byte `json:"conf"`
	// Key is the cephx key of the user, 40 printable characters; empty where the cluster wants none.
	Key string `json:"key,omitempty"`
}

// WrappedKey is the key of an encrypted layer, encrypted with a key-encryption key. Its plain text is the
// LUKS passphrase, 44 printable characters.
type WrappedKey struct {
	// Class is what the engine's caller gave, and what chose the key-encryption key.
	Class string `json:"class"`
	// Provider keeps the key-encryption key; empty is the one that has the name of the class. KeyID is what
	// the key was called there.
	Provider string `json:"provider,omitempty"`
	KeyID    string `json:"keyID,omitempty"`
	// KEK is a fingerprint of the key-encryption key, so that another one under its name is noticed.
	KEK string `json:"kek"`
	// Data is nonce and ciphertext.
	Data []byte `json:"data"`
}
