//go:build integration

package library

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"

	"atoll.dev/atoll/internal/storage/convert"
	"atoll.dev/atoll/internal/storage/diskimage"
	"atoll.dev/atoll/internal/storage/diskimage/ovf"
)

func run(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
}

// source makes a qcow2 image of 64 MiB with a partition table and some data.
func source(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "source.qcow2")
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", path, "64M")
	run(t, "qemu-io", "-f", "qcow2", "-c", "write -P 85 510 1", "-c", "write -P 170 511 1", "-c", "write -P 7 10M 3M", path)
	return path
}

func convertTo(t *testing.T, from string, args ...string) string {
	t.Helper()
	to := filepath.Join(t.TempDir(), "image")
	run(t, "qemu-img", append(append([]string{"convert"}, args...), from, to)...)
	return to
}

func newLibrary(t *testing.T) *Library {
	t.Helper()
	l, err := New(Config{Dir: filepath.Join(t.TempDir(), "content"), AllowLocal: true})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func content(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func sha(b []byte) Checksum {
	sum := sha256.Sum256(b)
	return Checksum{"SHA256", hex.EncodeToString(sum[:])}
}

// serve serves one file, with ranges.
func serve(t *testing.T, name string, b []byte) string {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("ETag", `"v1"`)
		http.ServeContent(w, r, name, time.Time{}, bytes.NewReader(b))
	}))
	t.Cleanup(s.Close)
	return s.URL + "/" + name
}

// holds exports a disk as raw and compares it with the source.
func holds(t *testing.T, l *Library, id string, disk int) {
	t.Helper()
	raw := filepath.Join(t.TempDir(), "raw")
	if err := l.Export(t.Context(), id, ExportOptions{Format: convert.FormatRaw, Disk: disk}, raw, nil); err != nil {
		t.Fatal(err)
	}
	b := content(t, raw)
	if len(b) != 64<<20 || b[510] != 85 || b[511] != 170 || b[10<<20] != 7 || b[13<<20-1] != 7 || b[13<<20] != 0 || b[0] != 0 {
		t.Errorf("%d bytes of something else", len(b))
	}
}

func pack(t *testing.T, b []byte, how string) []byte {
	t.Helper()
	var out bytes.Buffer
	var w io.WriteCloser
	var err error
	switch how {
	case "gz":
		w = gzip.NewWriter(&out)
	case "xz":
		cmd := exec.Command("xz", "-c")
		cmd.Stdin = bytes.NewReader(b)
		packed, err := cmd.Output()
		if err != nil {
			t.Fatal(err)
		}
		return packed
	case "zst":
		w, err = zstd.NewWriter(&out)
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// TestFormats: every format comes in, is what it was, and goes out again.
func TestFormats(t *testing.T) {
	from := source(t)
	raw := content(t, convertTo(t, from, "-O", "raw"))
	for _, c := range []struct {
		name   string
		b      []byte
		format diskimage.Format
	}{
		{"a.qcow2", content(t, from), diskimage.QCOW2},
		{"b.qcow2", content(t, convertTo(t, from, "-c", "-O", "qcow2")), diskimage.QCOW2},
		{"c.img", raw, diskimage.Raw},
		{"d.vmdk", content(t, convertTo(t, from, "-O", "vmdk", "-o", "subformat=streamOptimized")), diskimage.VMDK},
		{"e.vmdk", content(t, convertTo(t, from, "-O", "vmdk")), diskimage.VMDK},
		{"f.vhd", content(t, convertTo(t, from, "-O", "vpc", "-o", "force_size=on")), diskimage.VHD},
		{"g.vhd", content(t, convertTo(t, from, "-O", "vpc", "-o", "force_size=on,subformat=fixed")), diskimage.VHD},
		{"h.vhdx", content(t, convertTo(t, from, "-O", "vhdx")), diskimage.VHDX},
		{"i.raw.gz", pack(t, raw, "gz"), diskimage.Raw},
		{"j.raw.xz", pack(t, raw, "xz"), diskimage.Raw},
		{"k.qcow2.zst", pack(t, content(t, from), "zst"), diskimage.QCOW2},
		{"l.iso", iso(t), diskimage.ISO},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := newLibrary(t)
			i, err := l.Fetch(t.Context(), "item", Source{HTTP: &HTTP{URL: serve(t, c.name, c.b)}, Checksum: sha(c.b)}, nil)
			if err != nil {
				t.Fatal(err)
			}
			if len(i.Disks) != 1 || i.Disks[0].Info.Format != c.format || i.FileName != c.name || i.SHA256 != sha(c.b).Value || i.SourceBytes != int64(len(c.b)) || i.Bytes == 0 {
				t.Errorf("%+v", i)
			}
			if c.format == diskimage.ISO {
				if i.Kind != KindISO {
					t.Errorf("kind %s", i.Kind)
				}
				return
			}
			holds(t, l, "item", 0)
			if again, err := l.Fetch(t.Context(), "item", Source{}, nil); err != nil || again.SHA256 != i.SHA256 {
				t.Errorf("again: %v", err)
			}
			if err := l.Remove("item"); err != nil {
				t.Fatal(err)
			}
			if ids, err := l.Items(); err != nil || len(ids) != 0 {
				t.Errorf("left: %v, %v", ids, err)
			}
		})
	}
}

func half(b []byte) []byte { return b[:len(b)/2] }

// iso is a file system of 100 blocks, as far as it is looked at.
func iso(t *testing.T) []byte {
	t.Helper()
	b := make([]byte, 100*2048)
	copy(b[32768:], "\x01CD001\x01")
	b[32768+80], b[32768+128], b[32768+129] = 100, 0, 8
	return b
}

// ova makes an archive.
func ova(t *testing.T, files ...any) []byte {
	t.Helper()
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for n := 0; n < len(files); n += 2 {
		b := files[n+1].([]byte)
		if err := w.WriteHeader(&tar.Header{Name: files[n].(string), Mode: 0o644, Size: int64(len(b))}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(b); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// TestAppliance: an OVA of two disks comes in and goes out as one that comes in again.
func TestAppliance(t *testing.T) {
	vmdk := content(t, convertTo(t, source(t), "-O", "vmdk", "-o", "subformat=streamOptimized"))
	var descriptor bytes.Buffer
	m := ovf.Machine{
		Name: "app", CPUs: 3, Memory: 1 << 30, Firmware: "efi", OSID: "96", OSType: "debian12_64Guest", NICs: 1,
		Disks:      []ovf.MachineDisk{{File: "one.vmdk", Bytes: int64(len(vmdk)), Capacity: 64 << 20}, {File: "two.vmdk", Bytes: int64(len(vmdk)), Capacity: 128 << 20}},
		Properties: []ovf.Property{{Key: "hostname", Type: "string", UserConfigurable: true}},
	}
	if err := ovf.Write(&descriptor, m); err != nil {
		t.Fatal(err)
	}
	manifest := fmt.Sprintf("SHA256(app.ovf)= %s\nSHA256(one.vmdk)= %s\n", sha(descriptor.Bytes()).Value, sha(vmdk).Value)
	good := ova(t, "app.ovf", descriptor.Bytes(), "app.mf", []byte(manifest), "one.vmdk", vmdk, "two.vmdk", vmdk)
	l := newLibrary(t)
	i, err := l.Fetch(t.Context(), "item", Source{HTTP: &HTTP{URL: serve(t, "app.ova", good)}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if i.Kind != KindOVF || len(i.Disks) != 2 || i.Disks[0].Size != 64<<20 || i.Disks[1].Size != 128<<20 || i.Disks[1].Controller != "SCSI" || i.Disks[1].Unit != 1 || i.OVF.CPUs != 3 {
		t.Errorf("%+v", i)
	}
	holds(t, l, "item", 0)
	holds(t, l, "item", 1)
	out := filepath.Join(t.TempDir(), "out.ova")
	if err := l.Export(t.Context(), "item", ExportOptions{Format: convert.FormatOVA, Disk: -1, Name: "my app"}, out, nil); err != nil {
		t.Fatal(err)
	}
	again, err := l.Fetch(t.Context(), "again", Source{HTTP: &HTTP{URL: serve(t, "again.ova", content(t, out))}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if again.OVF.Name != "my app" || again.OVF.CPUs != 3 || again.OVF.Firmware != "efi" || len(again.OVF.Properties) != 1 || len(again.Disks) != 2 {
		t.Errorf("%+v", again.OVF)
	}
	holds(t, l, "again", 1)

	bad := strings.Replace(manifest, sha(vmdk).Value, strings.Repeat("0", 64), 1)
	for name, c := range map[string]struct {
		b    []byte
		want error
		text string
	}{
		"manifest": {ova(t, "app.ovf", descriptor.Bytes(), "app.mf", []byte(bad), "one.vmdk", vmdk, "two.vmdk", vmdk), ErrChecksum, "one.vmdk"},
		"missing":  {ova(t, "app.ovf", descriptor.Bytes(), "one.vmdk", vmdk), ErrContent, "two.vmdk"},
		"no ovf":   {ova(t, "one.vmdk", vmdk), ErrContent, "no OVA"},
		"cut":      {good[:len(good)/2], ErrContent, "interrupted"},
	} {
		_, err := l.Fetch(t.Context(), "bad", Source{HTTP: &HTTP{URL: serve(t, "bad.ova", c.b)}}, nil)
		if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: %v", name, err)
		}
		if err := l.Remove("bad"); err != nil {
			t.Fatal(err)
		}
	}
}

// TestBadContent: what is no image, or a malicious one, is refused, and nothing is complete.
func TestBadContent(t *testing.T) {
	from := source(t)
	good := content(t, from)
	dir := t.TempDir()
	backing, data := filepath.Join(dir, "backing"), filepath.Join(dir, "data.qcow2")
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", "/etc/passwd", "-F", "raw", backing)
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "data_file="+filepath.Join(dir, "d")+",data_file_raw=on", data, "10M")
	corrupt := bytes.Clone(good)
	for n := 3 << 16; n < 4<<16; n++ { // the L1 table, where it is in a new image
		corrupt[n] ^= 0x5a
	}
	bomb := pack(t, make([]byte, 64<<20), "gz")
	for name, c := range map[string]struct {
		b    []byte
		want error
		text string
	}{
		"backing":    {content(t, backing), diskimage.ErrReference, "backing file"},
		"data file":  {content(t, data), diskimage.ErrReference, "another file"},
		"truncated":  {good[:len(good)-2<<20], diskimage.ErrDamaged, "interrupted"},
		"corrupt":    {corrupt, diskimage.ErrDamaged, ""},
		"text":       {[]byte("hello"), diskimage.ErrUnknown, "raw"},
		"cut gzip":   {half(pack(t, good, "gz")), ErrContent, "interrupted"},
		"cut xz":     {half(pack(t, good, "xz")), ErrContent, "interrupted"},
		"xz bomb":    {pack(t, make([]byte, 64<<20), "xz"), ErrContent, "larger than"},
		"twice":      {pack(t, pack(t, good, "gz"), "gz"), ErrContent, "twice"},
		"bomb":       {bomb, ErrContent, "larger than"},
		"cut stream": {content(t, convertTo(t, from, "-O", "vmdk", "-o", "subformat=streamOptimized"))[:66<<10], diskimage.ErrDamaged, ""},
	} {
		l := newLibrary(t)
		l.cfg.MaxUnpacked = 32 << 20
		_, err := l.Fetch(t.Context(), "item", Source{HTTP: &HTTP{URL: serve(t, "image", c.b)}}, nil)
		if !errors.Is(err, c.want) || !errors.Is(err, ErrContent) || !strings.Contains(err.Error(), c.text) || !Permanent(err) {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := l.Item("item"); !errors.Is(err, ErrNotFound) {
			t.Errorf("%s: it is there: %v", name, err)
		}
	}
	l := newLibrary(t)
	_, err := l.Fetch(t.Context(), "item", Source{HTTP: &HTTP{URL: serve(t, "image", good)}, Checksum: sha([]byte("other"))}, nil)
	if !errors.Is(err, ErrChecksum) || !strings.Contains(err.Error(), sha(good).Value) || exists(l.path("item", originalFile)) {
		t.Errorf("checksum: %v", err)
	}
}

// TestResume: a transfer that breaks goes on where it was, unless the file has changed.
func TestResume(t *testing.T) {
	good := content(t, source(t))
	var version, requests, sent atomic.Int64
	version.Store(1)
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("ETag", fmt.Sprintf(`"v%d"`, version.Load()))
		limit := 1 << 20
		if requests.Add(1) > 4 {
			limit = len(good)
		}
		counted := &cutting{ResponseWriter: w, left: limit, sent: &sent}
		http.ServeContent(counted, r, "x.qcow2", time.Time{}, bytes.NewReader(good))
	}))
	t.Cleanup(s.Close)
	l := newLibrary(t)
	from := Source{HTTP: &HTTP{URL: s.URL + "/x.qcow2"}, Checksum: sha(good)}
	tries := 0
	for {
		tries++
		_, err := l.Fetch(t.Context(), "item", from, nil)
		if err == nil {
			break
		}
		if Permanent(err) || tries > 10 {
			t.Fatal(err)
		}
		if tries == 2 {
			version.Store(2) // begins anew
		}
	}
	if n := sent.Load(); tries < 4 || n < int64(len(good)) || n > int64(len(good))+3<<20 {
		t.Errorf("%d tries, %d bytes sent of %d", tries, n, len(good))
	}
	holds(t, l, "item", 0)
}

// cutting breaks the connection after some bytes.
type cutting struct {
	http.ResponseWriter
	left int
	sent *atomic.Int64
}

func (c *cutting) Write(p []byte) (int, error) {
	if c.left == 0 {
		panic(http.ErrAbortHandler)
	}
	n, err := c.ResponseWriter.Write(p[:min(len(p), c.left)])
	c.left -= n
	c.sent.Add(int64(n))
	if f, ok := c.ResponseWriter.(http.Flusher); ok {
		f.Flush()
	}
	if err == nil && n < len(p) {
		return n, io.ErrShortWrite
	}
	return n, err
}

// TestUpload: bytes come in pieces, out of order ones are refused, and the item is complete when the last one is here.
func TestUpload(t *testing.T) {
	good := content(t, source(t))
	l := newLibrary(t)
	total := int64(len(good))
	from := Source{Upload: &Upload{}, FileName: "u.qcow2", Checksum: sha(good)}
	if _, err := l.Fetch(t.Context(), "item", from, nil); !errors.Is(err, ErrWaiting) {
		t.Fatal(err)
	}
	put := func(offset, end int64) (int64, error) {
		return l.Receive(t.Context(), "item", "u.qcow2", offset, total, bytes.NewReader(good[offset:end]))
	}
	if n, err := put(0, 1<<20); err != nil || n != 1<<20 {
		t.Fatal(n, err)
	}
	if n, err := put(2<<20, 3<<20); !errors.Is(err, ErrOffset) || n != 1<<20 {
		t.Fatal(n, err)
	}
	if _, err := l.Fetch(t.Context(), "item", from, nil); !errors.Is(err, ErrWaiting) || !strings.Contains(err.Error(), "1048576 of") {
		t.Fatal(err)
	}
	if n, err := put(1<<20, total); err != nil || n != total {
		t.Fatal(n, err)
	}
	if _, err := l.Fetch(t.Context(), "item", from, nil); err != nil {
		t.Fatal(err)
	}
	holds(t, l, "item", 0)
	if _, err := put(0, total); !errors.Is(err, ErrOffset) {
		t.Errorf("a complete one: %v", err)
	}
}

// TestGuard: an item of a namespace does not reach this host.
func TestGuard(t *testing.T) {
	l := newLibrary(t)
	l.cfg.AllowLocal = false
	from := Source{HTTP: &HTTP{URL: serve(t, "x", []byte("x"))}, Guarded: true}
	if _, err := l.Fetch(t.Context(), "item", from, nil); !errors.Is(err, ErrSource) || !strings.Contains(err.Error(), "--cluster") {
		t.Error(err)
	}
	// Nor what is in a network of the cluster, which is not asked at all.
	l.cfg.Guarded = []netip.Prefix{netip.MustParsePrefix("192.0.2.0/28"), netip.MustParsePrefix("192.0.2.64/28")}
	from.HTTP.URL = "http://192.0.2.65/disk.qcow2"
	if _, err := l.Fetch(t.Context(), "item", from, nil); !errors.Is(err, ErrSource) || !strings.Contains(err.Error(), "192.0.2.65:80 is an address of") {
		t.Error(err)
	}
}

// TestCancel: an import that is given up leaves nothing running.
func TestCancel(t *testing.T) {
	block := make(chan struct{})
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", "1000000")
		_, _ = w.Write(make([]byte, 1000))
		w.(http.Flusher).Flush()
		select {
		case <-block:
		case <-r.Context().Done():
		}
	}))
	t.Cleanup(s.Close)
	t.Cleanup(func() { close(block) })
	l := newLibrary(t)
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if _, err := l.Fetch(ctx, "item", Source{HTTP: &HTTP{URL: s.URL}}, nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
}
