package library

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha1" // what older tools write into manifests
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"maps"
	"path"
	"slices"
	"strings"

	"atoll.dev/atoll/internal/storage/diskimage"
	"atoll.dev/atoll/internal/storage/diskimage/ovf"
)

// Bounds of an archive.
const (
	maxEntries  = 1000
	maxManifest = 1 << 20
)

// appliance reads an OVA: a tar archive with a descriptor, perhaps a manifest, and disks.
func (l *Library) appliance(ctx context.Context, i *Item, file string, progress func(Progress)) error {
	entries, err := l.entries(i.ID, file)
	if err != nil {
		return err
	}
	d, err := l.descriptor(i.ID, entries)
	if err != nil {
		return err
	}
	if err := l.checkManifest(ctx, i.ID, entries, progress); err != nil {
		return err
	}
	i.Kind, i.OVF = KindOVF, &d
	for n, disk := range d.Disks {
		if disk.File == "" {
			return fmt.Errorf("%w: disk %q of the OVF is empty; remove it from the appliance, and give virtual machines an empty disk by a claim", ErrContent, disk.ID)
		}
		where, ok := entries[disk.File]
		if !ok {
			return fmt.Errorf("%w: the OVF names the disk file %q, which the archive does not have", ErrContent, disk.File)
		}
		if disk.Gzip {
			to := fmt.Sprintf("disk-%d", n+1) // disk-0 may be the archive itself
			if err := l.decompress(ctx, i.ID, where, diskimage.Gzip, to, progress); err != nil {
				return err
			}
			where = span{file: to}
		}
		found, err := l.detect(i.ID, where, disk.File)
		if err != nil {
			return fmt.Errorf("disk file %q: %w", disk.File, err)
		}
		found.Name, found.Size = disk.ID, max(found.Info.Size, disk.Capacity)
		if found.Size > diskimage.MaxSize {
			return fmt.Errorf("%w: disk %q has a capacity of %d bytes", ErrContent, disk.ID, found.Size)
		}
		found.Controller, found.Bus, found.Unit = disk.Controller, disk.Bus, disk.Unit
		i.Disks = append(i.Disks, found)
	}
	if len(i.Disks) == 0 {
		return fmt.Errorf("%w: the OVF has no disk", ErrContent)
	}
	return nil
}

// entries are the files of an archive.
func (l *Library) entries(id, file string) (map[string]span, error) {
	f, all, err := l.open(id, span{file: file})
	if err != nil {
		return nil, err
	}
	defer f.Close()
	archive := tar.NewReader(f) // seeks over what is not read
	out := map[string]span{}
	for {
		h, err := archive.Next()
		if errors.Is(err, io.EOF) {
			return out, nil
		}
		if err != nil {
			return nil, fmt.Errorf("%w: the archive is damaged: %w", ErrContent, err)
		}
		if h.Typeflag != tar.TypeReg {
			continue
		}
		name := path.Clean(h.Name)
		at, err := f.Seek(0, io.SeekCurrent)
		switch _, twice := out[name]; {
		case err != nil:
			return nil, fmt.Errorf("reading image %s: %w", id, err)
		case twice:
			return nil, fmt.Errorf("%w: the archive has %.100q twice", ErrContent, name)
		case len(out) >= maxEntries:
			return nil, fmt.Errorf("%w: the archive has more than %d files", ErrContent, maxEntries)
		case h.PAXRecords["GNU.sparse.major"] != "" || h.PAXRecords["GNU.sparse.map"] != "":
			return nil, fmt.Errorf("%w: %.100q is stored with holes; make the archive without --sparse", ErrContent, name)
		case h.Size < 0 || at+h.Size > all.Size():
			return nil, fmt.Errorf("%w: the archive ends within %.100q; was the transfer interrupted?", ErrContent, name)
		case h.Size == 0:
			continue
		}
		out[name] = span{file: file, offset: at, length: h.Size}
	}
}

// small reads a small file of an archive.
func (l *Library) small(id string, s span, limit int64) ([]byte, error) {
	if s.length > limit {
		return nil, fmt.Errorf("%w: a descriptor of %d bytes", ErrContent, s.length)
	}
	f, r, err := l.open(id, s)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(r)
	if err != nil {
		return nil, fmt.Errorf("reading image %s: %w", id, err)
	}
	return b, nil
}

// named returns the one file with an extension.
func named(entries map[string]span, ext string) (string, bool) {
	for _, name := range slices.Sorted(maps.Keys(entries)) {
		if strings.EqualFold(path.Ext(name), ext) && !strings.HasPrefix(path.Base(name), ".") {
			return name, true
		}
	}
	return "", false
}

// descriptor reads the OVF of an archive.
func (l *Library) descriptor(id string, entries map[string]span) (ovf.Descriptor, error) {
	name, ok := named(entries, ".ovf")
	if !ok {
		return ovf.Descriptor{}, fmt.Errorf("%w: a tar archive without an .ovf file is no OVA", ErrContent)
	}
	b, err := l.small(id, entries[name], ovf.MaxBytes)
	if err != nil {
		return ovf.Descriptor{}, err
	}
	d, err := ovf.Read(bytes.NewReader(b))
	if err != nil {
		return ovf.Descriptor{}, fmt.Errorf("%w: %s: %w", ErrContent, name, err)
	}
	return d, nil
}

// checkManifest compares every checksum that the archive says.
func (l *Library) checkManifest(ctx context.Context, id string, entries map[string]span, progress func(Progress)) error {
	name, ok := named(entries, ".mf")
	if !ok {
		return nil
	}
	b, err := l.small(id, entries[name], maxManifest)
	if err != nil {
		return err
	}
	m, err := ovf.ReadManifest(bytes.NewReader(b))
	if err != nil {
		return fmt.Errorf("%w: %s: %w", ErrContent, name, err)
	}
	for _, file := range slices.Sorted(maps.Keys(m)) {
		where, ok := entries[file]
		if !ok {
			return fmt.Errorf("%w: the manifest names %q, which the archive does not have", ErrContent, file)
		}
		h := map[string]func() hash.Hash{"SHA1": sha1.New, "SHA256": sha256.New, "SHA512": sha512.New}[m[file].Algorithm]()
		f, r, err := l.open(id, where)
		if err != nil {
			return err
		}
		watched := &counter{Writer: h, tell: func(n int64) { progress(Progress{PhaseVerify, n, r.Size()}) }}
		_, err = io.CopyBuffer(watched, ctxReader{ctx, r}, make([]byte, 1<<20))
		if err = errors.Join(err, f.Close()); err != nil {
			return fmt.Errorf("verifying image %s: %w", id, err)
		}
		if got := hex.EncodeToString(h.Sum(nil)); got != m[file].Hex {
			err := fmt.Errorf("%w: the file %q of the archive has the %s checksum %s, and its manifest says %s; the archive was deleted",
				ErrChecksum, file, m[file].Algorithm, got, m[file].Hex)
			return errors.Join(err, l.discard(id))
		}
	}
	return nil
}
