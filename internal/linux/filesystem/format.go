package filesystem

import (
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// headBytes is what is written last: the first blocks of a file system, with its superblock.
const headBytes = 4096

// Formatter writes a new file system on a blank disk, part by part.
//
//	mark "unfinished" -> everything but the head -> flush -> head behind the mark -> flush -> over the mark -> flush
//
// Cut short anywhere before the end, the disk still counts as blank.
type Formatter struct {
	f    *os.File
	size int64
	head []byte
}

// StartFormat opens a disk that must be blank.
func StartFormat(device string) (_ *Formatter, err error) {
	c, err := Probe(device)
	if err != nil {
		return nil, err
	}
	if !c.Blank {
		return nil, fmt.Errorf("formatting: %w", ErrForeign)
	}
	// Exclusive: fails when it is mounted.
	f, err := os.OpenFile(device, os.O_RDWR|unix.O_EXCL, 0)
	if err != nil {
		return nil, fmt.Errorf("formatting: %w", err)
	}
	defer func() {
		if err != nil {
			_ = f.Close()
		}
	}()
	if c.Begun {
		// What the last attempt wrote may be in other places than what comes now.
		all := [2]uint64{0, uint64(c.Bytes)}
		if err := ioctl(f, unix.BLKZEROOUT, unsafe.Pointer(&all)); err != nil {
			return nil, fmt.Errorf("formatting: clearing the disk: %w", err)
		}
	}
	w := &Formatter{f: f, size: c.Bytes, head: make([]byte, headBytes)}
	return w, w.flush([]byte(unfinished), 0)
}

// Write writes one part of the file system.
func (w *Formatter) Write(offset uint64, data []byte) error {
	if offset > uint64(w.size) || uint64(len(data)) > uint64(w.size)-offset {
		return fmt.Errorf("formatting: %w: beyond the end of the disk", ErrInvalid)
	}
	if offset < headBytes {
		n := copy(w.head[offset:], data)
		data, offset = data[n:], offset+uint64(n)
	}
	if len(data) == 0 {
		return nil
	}
	if _, err := w.f.WriteAt(data, int64(offset)); err != nil {
		return fmt.Errorf("formatting: %w", err)
	}
	return nil
}

// Finish makes what was written a file system.
func (w *Formatter) Finish() error {
	const sector = 512 // the mark is in the first
	if err := w.f.Sync(); err != nil {
		return fmt.Errorf("formatting: %w", err)
	}
	if err := w.flush(w.head[sector:], sector); err != nil {
		return err
	}
	if err := w.flush(w.head[:sector], 0); err != nil {
		return err
	}
	return w.Close()
}

func (w *Formatter) flush(data []byte, offset int64) error {
	if _, err := w.f.WriteAt(data, offset); err != nil {
		return fmt.Errorf("formatting: %w", err)
	}
	if err := w.f.Sync(); err != nil {
		return fmt.Errorf("formatting: %w", err)
	}
	return nil
}

// Close gives up; what was begun counts as blank.
func (w *Formatter) Close() error { return w.f.Close() }
