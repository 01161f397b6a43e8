// Package layers keeps container images as EROFS block images for micro-VMs.
//
// It is a containerd snapshotter and a containerd differ, both named "atoll".
// The differ turns the tar stream of one layer straight into
// snapshots/<id>/layer.erofs: one pass, no mount, no privilege. When a
// container is about to use a chain of layers for the first time the
// snapshotter merges the chain into snapshots/<id>/image.erofs, <id> being the
// top layer's, so that the guest mounts one image whatever the layer count. An
// image of one layer needs no second file. Both files live and die with the
// committed snapshot, so containerd's garbage collection is the only
// bookkeeping.
//
//	snapshots/<id>/layer.erofs   committed layer: what the layer adds and deletes
//	snapshots/<id>/image.erofs   committed layer: the whole chain up to it, if used
//	snapshots/<id>/etc/          committed layer: passwd and group of the chain, if used
//	snapshots/<id>/meta/etc/     container: the same two files
//	snapshots/<id>/usage.json    container: writable layer use, written by the shim
//
// Hard links are the reason why package erofs writes the images and not
// go-erofs, which cannot express them.
//
// It never mounts anything and knows nothing of virtual machines: what a
// container's Mounts returns is a bind of the meta directory, enough for
// containerd to look up users, with the image's path in an option for the shim
// (package handover). A View and the snapshot of an image volume return
// an ordinary EROFS loop mount, whose backing file is the image.
//
// Package kube/containerd calls [Register] before it starts containerd;
// nothing else does. What can go wrong: a full disk, a corrupt layer
// (changeset.ErrInvalid, erofs.ErrCorrupt); a crash at any moment leaves at
// worst files that Cleanup removes, since every file appears complete by a
// rename after a sync.
package layers

import (
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/platforms"
	"github.com/containerd/plugin"
	"github.com/containerd/plugin/registry"
)

const (
	// Name is the name of the snapshotter and of the differ.
	Name = "atoll"

	// layerMount is the type of the mount that stands for a layer being
	// unpacked. No kernel file system has this name, so only our differ can
	// take it.
	layerMount = "atoll-layer"

	layerFile = "layer.erofs"
	imageFile = "image.erofs"
	etcDir    = "etc"
	metaDir   = "meta"
	newSuffix = ".new"
)

// Register adds the snapshotter and the differ to containerd's plugin
// registry, which is global to the process. Call it once.
func Register() {
	registry.Register(&plugin.Registration{
		Type: plugins.SnapshotPlugin,
		ID:   Name,
		InitFn: func(ic *plugin.InitContext) (any, error) {
			root := ic.Properties[plugins.PropertyRootDir]
			ic.Meta.Platforms = append(ic.Meta.Platforms, platforms.DefaultSpec())
			// Layers are unpacked without looking at those below, and user
			// namespaces are the guest's business.
			ic.Meta.Capabilities = append(ic.Meta.Capabilities, "rebase", "remap-ids")
			ic.Meta.Exports[plugins.SnapshotterRootDir] = root
			return New(Config{Root: root})
		},
	})
	registry.Register(&plugin.Registration{
		Type:     plugins.DiffPlugin,
		ID:       Name,
		Requires: []plugin.Type{plugins.MetadataPlugin},
		InitFn: func(ic *plugin.InitContext) (any, error) {
			md, err := ic.GetSingle(plugins.MetadataPlugin)
			if err != nil {
				return nil, err
			}
			ic.Meta.Platforms = append(ic.Meta.Platforms, platforms.DefaultSpec())
			return NewDiffer(contentOf(md)), nil
		},
	})
}

func contentOf(md any) content.Provider { return md.(*metadata.DB).ContentStore() }

// isUnpack says whether a snapshot key is that of a layer being unpacked.
// containerd's metadata store puts the namespace and a number before it.
func isUnpack(key string) bool {
	return strings.HasPrefix(key[strings.LastIndexByte(key, '/')+1:], snapshots.UnpackKeyPrefix+"-")
}

// wantsLoop says whether a container snapshot key is that of an image volume
// (a pod volume that is an image), which the CRI plugin mounts on the host.
func wantsLoop(key string) bool { return strings.Contains(key, "/image-volumes/") }

// layerMounts is what the differ is given for the snapshot in dir.
func layerMounts(dir string) []mount.Mount {
	return []mount.Mount{{Type: layerMount, Source: dir}}
}

// replaceFile makes path the file that write fills, or leaves it alone: the
// content is on disk before the name is.
func replaceFile(path string, write func(*os.File) error) (err error) {
	f, err := os.OpenFile(path+newSuffix, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		f.Close()
		if err != nil {
			os.Remove(path + newSuffix)
		}
	}()
	if err := write(f); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := os.Rename(path+newSuffix, path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// lowestFirst returns a chain, which storage keeps topmost first, reversed.
func lowestFirst(ids []string) []string {
	out := slices.Clone(ids)
	slices.Reverse(out)
	return out
}
