package layers

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"atoll.dev/atoll/internal/storage/layers/changeset"
	"atoll.dev/atoll/internal/storage/layers/erofs"
)

// maxUserFile is the largest /etc/passwd or /etc/group read from an image.
const maxUserFile = 8 << 20

// userFiles are the files containerd reads to look up users.
var userFiles = [...]string{"passwd", "group"}

// chain is a committed snapshot with all below it.
type chain struct {
	ids  []string // topmost first
	name string   // of the top
}

// imagePath returns the image of the chain whose top is id.
func (s *Snapshotter) imagePath(id string) string {
	if p := s.path(id, imageFile); exists(p) {
		return p
	}
	return s.path(id, layerFile)
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// ensureImage makes sure that the image of a chain and its etc directory are
// there. Callers that come while it is being made wait for the same work,
// which goes on when they give up: the next attempt finds it done.
func (s *Snapshotter) ensureImage(ctx context.Context, c chain) error {
	top := c.ids[0]
	if exists(s.path(top, etcDir)) {
		return nil
	}
	done := s.building.DoChan(top, func() (any, error) {
		if exists(s.path(top, etcDir)) {
			return nil, nil
		}
		return nil, s.buildImage(context.WithoutCancel(ctx), c)
	})
	select {
	case r := <-done:
		if r.Err != nil {
			return fmt.Errorf("merging the layers of %s: %w", chainID(c.name), r.Err)
		}
		return nil
	case <-ctx.Done():
		return fmt.Errorf("waiting for the layers of %s to be merged: %w", chainID(c.name), context.Cause(ctx))
	}
}

// chainID is the part of a committed snapshot's name that says what is in it.
func chainID(name string) string { return name[strings.LastIndexByte(name, '/')+1:] }

func (s *Snapshotter) buildImage(ctx context.Context, c chain) error {
	start := time.Now()
	top := c.ids[0]
	files, err := s.openLayers(c.ids)
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	if err != nil {
		return err
	}
	trees := make([]*erofs.Node, len(files))
	for i, f := range files {
		if trees[i], err = loadTree(f); err != nil {
			return err
		}
	}
	root := trees[0]
	whole := len(trees) == 1 && changeset.Final(root)
	if !whole {
		if root, err = changeset.Merge(trees); err != nil {
			return err
		}
	}
	users, err := readUserFiles(root)
	if err != nil {
		return err
	}
	if !whole {
		if err := s.writeImage(ctx, c, root); err != nil {
			return err
		}
		log.G(ctx).WithFields(log.Fields{"chain": chainID(c.name), "layers": len(c.ids), "duration": time.Since(start)}).Info("merged image layers")
	}
	return s.writeUserFiles(top, users)
}

// openLayers opens the images to merge, lowest first. Where a chain below has
// been merged already, its image stands for its layers.
func (s *Snapshotter) openLayers(ids []string) ([]*os.File, error) {
	var paths []string
	for i, id := range ids {
		if p := s.path(id, imageFile); i > 0 && exists(p) {
			paths = append(paths, p)
			break
		}
		paths = append(paths, s.path(id, layerFile))
	}
	var files []*os.File
	for _, p := range lowestFirst(paths) {
		f, err := os.Open(p)
		if err != nil {
			if errors.Is(err, fs.ErrNotExist) {
				err = fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
			}
			return files, err
		}
		files = append(files, f)
	}
	return files, nil
}

func loadTree(f *os.File) (*erofs.Node, error) {
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	root, err := erofs.Load(f, st.Size())
	if err != nil {
		return nil, fmt.Errorf("%s: %w", f.Name(), err)
	}
	return root, nil
}

func (s *Snapshotter) writeImage(ctx context.Context, c chain, root *erofs.Node) error {
	id := sha256.Sum256([]byte(chainID(c.name)))
	path := s.path(c.ids[0], imageFile)
	return replaceFile(path, func(f *os.File) error {
		w, err := erofs.NewWriter(f, filepath.Dir(path), [16]byte(id[:16]))
		if err != nil {
			return err
		}
		defer w.Close()
		if err := changeset.CopyContent(ctx, w, root); err != nil {
			return err
		}
		return w.Finish(root)
	})
}

// readUserFiles returns the content of the user files that exist, following
// symbolic links inside the image.
func readUserFiles(root *erofs.Node) (map[string][]byte, error) {
	out := map[string][]byte{}
	for _, name := range userFiles {
		n := erofs.Lookup(root, "/etc/"+name, true)
		if n == nil || !n.IsRegular() {
			continue
		}
		b, err := n.ReadAll(maxUserFile)
		if err != nil {
			return nil, fmt.Errorf("reading /etc/%s of the image: %w", name, err)
		}
		out[name] = b
	}
	return out, nil
}

// writeUserFiles makes the etc directory of a committed snapshot. Its presence
// says that the image is complete, so it comes last.
func (s *Snapshotter) writeUserFiles(id string, users map[string][]byte) error {
	dir, tmp := s.path(id, etcDir), s.path(id, etcDir+newSuffix)
	if err := os.RemoveAll(tmp); err != nil {
		return err
	}
	if err := os.Mkdir(tmp, 0o755); err != nil {
		return err
	}
	for name, b := range users {
		if err := os.WriteFile(filepath.Join(tmp, name), b, 0o644); err != nil {
			return err
		}
		if err := syncDir(filepath.Join(tmp, name)); err != nil {
			return err
		}
	}
	if err := syncDir(tmp); err != nil {
		return err
	}
	return os.Rename(tmp, dir)
}

// emptyImage returns an image without files, for containers of images without
// layers.
func (s *Snapshotter) emptyImage() (string, error) {
	path := filepath.Join(s.root, "empty.erofs")
	if exists(path) {
		return path, nil
	}
	s.emptyLock.Lock()
	defer s.emptyLock.Unlock()
	return path, replaceFile(path, func(f *os.File) error {
		w, err := erofs.NewWriter(f, s.root, [16]byte{1})
		if err != nil {
			return err
		}
		defer w.Close()
		return w.Finish(erofs.NewDir(0o755))
	})
}
