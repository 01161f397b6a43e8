package changeset

import (
	"context"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"

	"atoll.dev/atoll/internal/storage/layers/erofs"
)

// Merge stacks layers, lowest first, and returns the tree a container sees.
// The layers' trees are used up.
func Merge(layers []*erofs.Node) (*erofs.Node, error) {
	root := erofs.NewDir(0o755)
	for i, layer := range layers {
		if hasMark(layer, xattrOpaque) {
			root.Children = map[string]*erofs.Node{}
		}
		apply(root, layer)
		if err := resolveLinks(root, root, ""); err != nil {
			return nil, fmt.Errorf("layer %d of %d: %w", i+1, len(layers), err)
		}
	}
	return root, nil
}

// apply puts the entries of one layer's directory over those of base.
func apply(base, layer *erofs.Node) {
	for name, n := range layer.Children {
		old := base.Children[name]
		switch {
		case n.IsWhiteout():
			delete(base.Children, name)
		case !n.IsDir():
			base.Children[name] = n
		default:
			base.Children[name] = stackDir(old, n)
			apply(base.Children[name], n)
		}
	}
}

// stackDir returns the directory that n of a layer makes of old, which may be
// nil or no directory: without what n adds, with what of old shows through.
func stackDir(old, n *erofs.Node) *erofs.Node {
	if old != nil && !old.IsDir() {
		old = nil
	}
	meta := n
	if old != nil && hasMark(n, xattrImplicit) {
		meta = old
	}
	made := copyMetadata(meta)
	if old != nil && !hasMark(n, xattrOpaque) {
		made.Children = old.Children
	} else {
		made.Children = map[string]*erofs.Node{}
	}
	return made
}

func hasMark(n *erofs.Node, name string) bool {
	_, ok := n.Xattrs[name]
	return ok
}

// copyMetadata returns a directory like n without its marks and children.
func copyMetadata(n *erofs.Node) *erofs.Node {
	xattrs := maps.Clone(n.Xattrs)
	maps.DeleteFunc(xattrs, func(name, _ string) bool {
		return strings.HasPrefix(name, "trusted.overlay.") || strings.HasPrefix(name, "trusted.atoll.")
	})
	return &erofs.Node{
		Mode: n.Mode, UID: n.UID, GID: n.GID,
		Mtime: n.Mtime, MtimeNsec: n.MtimeNsec, Xattrs: xattrs,
	}
}

// resolveLinks replaces the marks of hard links to lower layers by the files
// they name.
func resolveLinks(root, dir *erofs.Node, at string) error {
	for name, n := range dir.Children {
		if n.IsDir() {
			if err := resolveLinks(root, n, at+"/"+name); err != nil {
				return err
			}
			continue
		}
		target := n
		for range maxLinks {
			to, linked := target.Xattrs[xattrLink]
			if !linked {
				break
			}
			if target = erofs.Lookup(root, to, false); target == nil || target.IsDir() {
				return invalid("hard link %q: no file %q in this or a lower layer", clip(at+"/"+name), clip(to))
			}
		}
		if hasMark(target, xattrLink) {
			return invalid("hard link %q leads nowhere", clip(at+"/"+name))
		}
		dir.Children[name] = target
	}
	return nil
}

// Final says whether a layer that has nothing below it can be mounted as it
// is: it holds no marks.
func Final(n *erofs.Node) bool {
	if hasMark(n, xattrOpaque) || hasMark(n, xattrImplicit) || hasMark(n, xattrLink) || n.IsWhiteout() {
		return false
	}
	for _, child := range n.Children {
		if !Final(child) {
			return false
		}
	}
	return true
}

// CopyContent copies the content of every file of a merged tree, whose
// sources are files of loaded images, into w.
func CopyContent(ctx context.Context, w *erofs.Writer, root *erofs.Node) error {
	return copyContent(ctx, w, root, map[*erofs.Node]bool{})
}

func copyContent(ctx context.Context, w *erofs.Writer, dir *erofs.Node, done map[*erofs.Node]bool) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(dir.Children)) {
		n := dir.Children[name]
		if n.IsDir() {
			if err := copyContent(ctx, w, n, done); err != nil {
				return err
			}
			continue
		}
		if !n.IsRegular() || done[n] {
			continue
		}
		src, ok := n.Source.(*os.File)
		if !ok {
			return fmt.Errorf("file %q has no source", clip(name))
		}
		data, err := w.CopyFile(src, n.Data)
		if err != nil {
			return fmt.Errorf("copying %q: %w", clip(name), err)
		}
		n.Data = data
		done[n] = true
	}
	return nil
}
