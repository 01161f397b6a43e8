package convert

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"time"

	"atoll.dev/atoll/internal/storage/diskimage/ovf"
	"atoll.dev/atoll/internal/storage/qemuimg"
)

// Formats that Export knows.
const (
	FormatQCOW2 = "qcow2"
	FormatRaw   = "raw"
	FormatVMDK  = "vmdk"
	FormatOVA   = "ova"
)

// Formats are all of them.
func Formats() []string { return []string{FormatQCOW2, FormatRaw, FormatVMDK, FormatOVA} }

// Disk reads a disk: it calls use with a block graph and the secrets that it needs.
type Disk struct {
	Read func(ctx context.Context, use func(ctx context.Context, disk map[string]any, secrets qemuimg.Secrets) error) error
	// Size in bytes.
	Size int64
}

// Of is the disk in an image.
func Of(i Image) Disk {
	return Disk{Size: i.Info.Size, Read: func(ctx context.Context, use func(context.Context, map[string]any, qemuimg.Secrets) error) error {
		return Serve(ctx, i, func(ctx context.Context, disk map[string]any) error { return use(ctx, disk, nil) })
	}}
}

// ErrFormat is wrapped for no format that Export knows, or one that cannot hold it.
var ErrFormat = errors.New("cannot be exported in this format")

// Export writes disks into a file of a format. Only an OVA can hold several, and only it needs the machine, whose Disks
// are filled in. Temporary files are beside the file.
func Export(ctx context.Context, disks []Disk, format string, m ovf.Machine, path string, progress func(done, total int64)) error {
	switch format {
	case FormatQCOW2, FormatRaw, FormatVMDK:
		if len(disks) != 1 {
			return fmt.Errorf("%w: %s holds one disk, and there are %d; choose one, or export as %s", ErrFormat, format, len(disks), FormatOVA)
		}
		return single(ctx, disks[0], format, path, progress)
	case FormatOVA:
		return appliance(ctx, disks, m, path, progress)
	}
	return fmt.Errorf("%w: %.40q; use qcow2, raw, vmdk or ova", ErrFormat, format)
}

// single writes one disk.
func single(ctx context.Context, d Disk, format, path string, progress func(done, total int64)) error {
	to := qemuimg.Target{File: path, Format: format}
	switch format {
	case FormatQCOW2:
		to.Compress, to.Options = true, "compression_type=zstd"
	case FormatVMDK:
		to.Options = "subformat=streamOptimized"
	}
	return d.Read(ctx, func(ctx context.Context, disk map[string]any, secrets qemuimg.Secrets) error {
		to.Secrets = secrets
		return (&qemuimg.Tool{}).Convert(ctx, disk, to, progress)
	})
}

// fileName makes a name of a file of any name.
func fileName(name string) string {
	name = regexp.MustCompile(`[^A-Za-z0-9._-]+`).ReplaceAllString(name, "-")
	if name == "" || name[0] == '.' {
		name = "machine"
	}
	return name[:min(len(name), 100)]
}

// appliance writes an OVA: the descriptor, the manifest, the disks.
func appliance(ctx context.Context, disks []Disk, m ovf.Machine, path string, progress func(done, total int64)) (err error) {
	dir, err := os.MkdirTemp(filepath.Dir(path), ".export-")
	if err != nil {
		return fmt.Errorf("exporting: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	base := fileName(m.Name)
	m.Disks = nil
	for n, d := range disks {
		name := fmt.Sprintf("%s-disk%d.vmdk", base, n+1)
		err := single(ctx, d, FormatVMDK, filepath.Join(dir, name), func(done, total int64) {
			if progress != nil {
				progress(int64(n)*total+done, total*int64(len(disks)))
			}
		})
		if err != nil {
			return err
		}
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil {
			return fmt.Errorf("exporting: %w", err)
		}
		m.Disks = append(m.Disks, ovf.MachineDisk{File: name, Bytes: info.Size(), Capacity: d.Size})
	}
	var descriptor bytes.Buffer
	if err := ovf.Write(&descriptor, m); err != nil {
		return err
	}
	sum := sha256.Sum256(descriptor.Bytes())
	var manifest bytes.Buffer
	fmt.Fprintf(&manifest, "SHA256(%s.ovf)= %s\n", base, hex.EncodeToString(sum[:]))
	for _, d := range m.Disks {
		sum, err := sumOf(ctx, filepath.Join(dir, d.File))
		if err != nil {
			return err
		}
		fmt.Fprintf(&manifest, "SHA256(%s)= %s\n", d.File, sum)
	}
	return pack(ctx, path, dir, base, descriptor.Bytes(), manifest.Bytes(), m.Disks)
}

// pack makes the archive.
func pack(ctx context.Context, path, dir, base string, descriptor, manifest []byte, disks []ovf.MachineDisk) error {
	out, err := os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("exporting: %w", err)
	}
	archive := tar.NewWriter(out)
	write := func(name string, size int64, from io.Reader) error {
		h := &tar.Header{Name: name, Mode: 0o644, Size: size, ModTime: time.Unix(0, 0), Format: tar.FormatUSTAR}
		if size >= 8<<30 { // what the format can say
			h.Format = tar.FormatGNU
		}
		if err := archive.WriteHeader(h); err != nil {
			return err
		}
		_, err := io.CopyBuffer(struct{ io.Writer }{archive}, from, make([]byte, 1<<20))
		return err
	}
	err = errors.Join(write(base+".ovf", int64(len(descriptor)), bytes.NewReader(descriptor)), write(base+".mf", int64(len(manifest)), bytes.NewReader(manifest)))
	for _, d := range disks {
		if err != nil || ctx.Err() != nil {
			break
		}
		var f *os.File
		if f, err = os.Open(filepath.Join(dir, d.File)); err == nil {
			err = errors.Join(write(d.File, d.Bytes, f), f.Close(), os.Remove(f.Name()))
		}
	}
	if err = errors.Join(err, ctx.Err(), archive.Close(), out.Sync(), out.Close()); err != nil {
		return fmt.Errorf("exporting: %w", err)
	}
	return nil
}

func sumOf(ctx context.Context, path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", fmt.Errorf("exporting: %w", err)
	}
	defer f.Close()
	h := sha256.New()
	buf := make([]byte, 1<<20)
	for {
		n, err := f.Read(buf)
		h.Write(buf[:n])
		if errors.Is(err, io.EOF) {
			return hex.EncodeToString(h.Sum(nil)), nil
		}
		if err = errors.Join(err, ctx.Err()); err != nil {
			return "", fmt.Errorf("exporting: %w", err)
		}
	}
}
