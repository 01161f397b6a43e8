package library

import (
	"context"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"strings"
	"time"

	"atoll.dev/atoll/internal/storage/convert"
)

// Phase is what is being done.
type Phase string

// The phases, in order.
const (
	PhaseTransfer Phase = "Transferring"
	PhaseVerify   Phase = "Verifying"
	PhaseUnpack   Phase = "Unpacking"
)

// Progress is how far a phase is, in bytes; Total 0 is unknown.
type Progress struct {
	Phase       Phase
	Done, Total int64
}

// Source is where an item comes from: exactly one of the pointers, or Make.
type Source struct {
	HTTP   *HTTP
	OCI    *OCI
	Upload *Upload
	// Make writes the file, beginning anew each time; FileName is its name.
	Make     func(ctx context.Context, path string, progress func(done, total int64)) error
	FileName string
	// Checksum, if set, is of the file.
	Checksum Checksum
	// Guarded items may not reach addresses of this host and its link: they are of people who may not.
	Guarded bool
}

// Checksum is what a file must have: the algorithm (SHA256, SHA512) and the sum in hexadecimal.
type Checksum struct{ Algorithm, Value string }

// check makes sense of a checksum.
func (c Checksum) check() error {
	want := map[string]int{"SHA256": 64, "SHA512": 128}[strings.ToUpper(c.Algorithm)]
	_, err := hex.DecodeString(c.Value)
	switch {
	case c.Algorithm == "" && c.Value == "":
		return nil
	case want == 0:
		return fmt.Errorf("%w: checksum algorithm %.40q; use SHA256 or SHA512", ErrSource, c.Algorithm)
	case err != nil || len(c.Value) != want:
		return fmt.Errorf("%w: checksum %.140q is not one of %s, which has %d hexadecimal digits", ErrSource, c.Value, strings.ToUpper(c.Algorithm), want)
	}
	return nil
}

// Upload is an item whose bytes somebody sends (Receive).
type Upload struct{}

// Fetch brings an item in: it goes on with what an earlier call has left, and does nothing when the item is
// complete. The id is the item's uid.
func (l *Library) Fetch(ctx context.Context, id string, s Source, progress func(Progress)) (Item, error) {
	if i, err := l.Item(id); err == nil || !errors.Is(err, ErrNotFound) {
		return i, err
	}
	if err := s.Checksum.check(); err != nil {
		return Item{}, err
	}
	if err := l.dir(id); err != nil {
		return Item{}, err
	}
	if progress == nil {
		progress = func(Progress) {}
	}
	unlock, err := l.lock(id)
	if errors.Is(err, errBusy) && s.Upload != nil { // it is just being sent
		return Item{}, l.waiting(id, progress)
	}
	if err != nil {
		return Item{}, err
	}
	defer unlock()
	i := Item{Format: itemFormat, ID: id, Created: time.Now().UTC()}
	if i.FileName, err = l.original(ctx, id, s, progress); err != nil {
		return Item{}, err
	}
	sum, err := l.verify(ctx, id, s.Checksum, progress)
	if err != nil {
		return Item{}, err
	}
	i.SHA256, i.SourceBytes = sum.sha256, sum.bytes
	if err := l.unpack(ctx, &i, progress); err != nil {
		return Item{}, err
	}
	for n := range i.Disks {
		progress(Progress{PhaseVerify, int64(n), int64(len(i.Disks))})
		if err := l.sound(ctx, id, i.Disks[n]); err != nil {
			return Item{}, err
		}
	}
	if err := l.tidy(&i); err != nil {
		return Item{}, err
	}
	return i, l.save(i)
}

// original sees to it that the file is there as it came, and returns its name.
func (l *Library) original(ctx context.Context, id string, s Source, progress func(Progress)) (string, error) {
	report := func(done, total int64) { progress(Progress{PhaseTransfer, done, total}) }
	switch name, err := os.ReadFile(l.path(id, partInfo)); {
	case exists(l.path(id, originalFile)) && err == nil:
		return decodePart(name).FileName, nil
	case exists(l.path(id, originalFile)):
		return s.FileName, nil
	}
	switch {
	case s.HTTP != nil:
		return l.fetchHTTP(ctx, id, s, report)
	case s.OCI != nil:
		return l.fetchOCI(ctx, id, s, report)
	case s.Upload != nil:
		return "", l.waiting(id, progress)
	case s.Make != nil:
		if err := s.Make(ctx, l.path(id, partFile), report); err != nil {
			return "", err
		}
		return s.FileName, l.finish(id)
	}
	return "", fmt.Errorf("%w: it says neither http, oci, upload nor volume", ErrSource)
}

// waiting tells how much of an upload is here.
func (l *Library) waiting(id string, progress func(Progress)) error {
	done, total, err := l.Received(id)
	if err != nil {
		return err
	}
	progress(Progress{PhaseTransfer, done, total})
	if total == 0 {
		return fmt.Errorf("%w: nothing is here yet", ErrWaiting)
	}
	return fmt.Errorf("%w: %d of %d bytes are here", ErrWaiting, done, total)
}

// finish makes a complete part the original.
func (l *Library) finish(id string) error {
	f, err := os.Open(l.path(id, partFile))
	if err != nil {
		return fmt.Errorf("finishing the transfer of image %s: %w", id, err)
	}
	if err := errors.Join(f.Sync(), f.Chmod(0o444), f.Close()); err != nil {
		return fmt.Errorf("finishing the transfer of image %s: %w", id, full(err))
	}
	if err := os.Rename(l.path(id, partFile), l.path(id, originalFile)); err != nil {
		return fmt.Errorf("finishing the transfer of image %s: %w", id, err)
	}
	return syncDir(l.path(id))
}

// sum is what verify has found.
type sum struct {
	sha256 string
	bytes  int64
}

// verify reads the original and compares its checksum. One that does not match deletes it.
func (l *Library) verify(ctx context.Context, id string, want Checksum, progress func(Progress)) (sum, error) {
	f, err := os.Open(l.path(id, originalFile))
	if err != nil {
		return sum{}, fmt.Errorf("verifying image %s: %w", id, err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return sum{}, fmt.Errorf("verifying image %s: %w", id, err)
	}
	sha, other := sha256.New(), hash.Hash(nil)
	out := io.Writer(sha)
	if strings.EqualFold(want.Algorithm, "SHA512") {
		other = sha512.New()
		out = io.MultiWriter(sha, other)
	}
	watched := &counter{Writer: out, tell: func(n int64) { progress(Progress{PhaseVerify, n, info.Size()}) }}
	if _, err := io.CopyBuffer(watched, ctxReader{ctx, f}, make([]byte, 1<<20)); err != nil {
		return sum{}, fmt.Errorf("verifying image %s: %w", id, err)
	}
	found := sum{sha256: hex.EncodeToString(sha.Sum(nil)), bytes: info.Size()}
	got := found.sha256
	if other != nil {
		got = hex.EncodeToString(other.Sum(nil))
	}
	if want.Value != "" && !strings.EqualFold(want.Value, got) {
		err := fmt.Errorf("%w: the file of %d bytes has the %s checksum %s, and %s was expected; it was deleted",
			ErrChecksum, info.Size(), strings.ToUpper(want.Algorithm), got, strings.ToLower(want.Value))
		return sum{}, errors.Join(err, l.discard(id))
	}
	return found, nil
}

// discard removes what has come, so that it comes anew.
func (l *Library) discard(id string) error {
	for _, name := range []string{originalFile, partFile, partInfo} {
		if err := os.Remove(l.path(id, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("removing what has come of image %s: %w", id, err)
		}
	}
	return nil
}

// sound looks at the whole of a disk's metadata.
func (l *Library) sound(ctx context.Context, id string, d Disk) error {
	f, err := os.Open(l.path(id, d.File))
	if err != nil {
		return fmt.Errorf("verifying image %s: %w", id, err)
	}
	defer f.Close()
	err = convert.Verify(ctx, convert.Image{File: f, Offset: d.Offset, Length: d.Length, Info: d.Info})
	if err != nil && ctx.Err() == nil {
		return fmt.Errorf("%w: %s: %w", ErrContent, d.Name, err)
	}
	return err
}

// tidy removes what is not needed any more, and counts what is left.
func (l *Library) tidy(i *Item) error {
	needed := map[string]bool{}
	for _, d := range i.Disks {
		needed[d.File] = true
	}
	found, err := os.ReadDir(l.path(i.ID))
	if err != nil {
		return fmt.Errorf("tidying image %s: %w", i.ID, err)
	}
	i.Bytes = 0
	for _, e := range found {
		if info, err := e.Info(); err == nil && needed[e.Name()] {
			i.Bytes += allocated(info)
		}
	}
	if needed[originalFile] {
		return nil
	}
	// A crash from here on means that the file has to come again. That is seldom, and it is large.
	return l.discard(i.ID)
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// counter tells now and then how much went through it.
type counter struct {
	io.Writer
	tell func(n int64)
	n    int64
	last time.Time
}

// tellEvery is how often progress is told.
const tellEvery = 500 * time.Millisecond

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.Writer.Write(p)
	c.n += int64(n)
	if time.Since(c.last) > tellEvery {
		c.last = time.Now()
		c.tell(c.n)
	}
	return n, err
}
