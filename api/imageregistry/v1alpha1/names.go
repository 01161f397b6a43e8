package v1alpha1

import (
	"crypto/sha1" // names as VMware makes them; nothing is secured by it
	"encoding/hex"
	"strings"

	"k8s.io/apimachinery/pkg/types"
)

// Names that claims, volumes and items use. Atoll's own.
const (
	// ImageAnnotation of a PersistentVolumeClaim names the image that its volume is a copy of:
	// VirtualMachineImage/NAME of the claim's namespace, or ClusterVirtualMachineImage/NAME. It is read once, when
	// the volume is made.
	ImageAnnotation = "atoll.dev/image"
	// ImageDiskAnnotation is the number of the image's disk, from 0, which is the default.
	ImageDiskAnnotation = "atoll.dev/image-disk"
	// RollbackAnnotation of a PersistentVolume asks for the volume to hold again what it held when one of its
	// snapshots was taken, which it names by CSI handle. Only the controllers of virtual machines may set it, and
	// only on volumes that nothing has open. RolledBackAnnotation has the same value when that is done;
	// RollbackErrorAnnotation says why it is not.
	RollbackAnnotation      = "atoll.dev/rollback"
	RolledBackAnnotation    = "atoll.dev/rolled-back"
	RollbackErrorAnnotation = "atoll.dev/rollback-error"
	// PublishRequestLabel of an item is the uid of the publish request that has made it.
	PublishRequestLabel = "atoll.dev/publish-request"
	// TagAnnotation of an item says which REPOSITORY:TAG of its library's project it was made for.
	TagAnnotation = "atoll.dev/registry-tag"
)

// Annotations of the manifest of a disk that was published: what an image says of the machine it is for.
const (
	ManifestFirmware  = "atoll.dev/vm-firmware"
	ManifestOSID      = "atoll.dev/vm-os-id"
	ManifestOSType    = "atoll.dev/vm-os-type"
	ManifestOSVersion = "atoll.dev/vm-os-version"
	// ManifestDescription is the specification's own.
	ManifestDescription = "org.opencontainers.image.description"
)

// DefaultTag is the tag of a name that has none.
const DefaultTag = "latest"

// TagName is what people call a tag of a project: REPOSITORY, or REPOSITORY:TAG when the tag is not the default one.
func TagName(repository, tag string) string {
	if tag == DefaultTag {
		return repository
	}
	return repository + ":" + tag
}

// SplitTagName takes the name of an image in a project apart. It does not check the parts.
func SplitTagName(name string) (repository, tag string) {
	at := strings.LastIndex(name, ":")
	if at < 0 || strings.Contains(name[at:], "/") {
		return name, DefaultTag
	}
	return name[:at], name[at+1:]
}

// ImageName is the name of the image of an item: what VMware makes of the item's UUID.
func ImageName(uuid types.UID) string {
	sum := sha1.Sum([]byte(strings.ReplaceAll(string(uuid), "-", "")))
	return "vmi-" + hex.EncodeToString(sum[:])[:17]
}
