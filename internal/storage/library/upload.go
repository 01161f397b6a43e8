package library

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"atoll.dev/atoll/internal/datadir/atomicfile"
)

// ErrOffset is returned when bytes were sent for another place than the next one.
var ErrOffset = errors.New("the upload goes on elsewhere")

// Received tells how many bytes of an upload are here, and of how many, which is 0 before the first.
func (l *Library) Received(id string) (done, total int64, err error) {
	if !validID(id) {
		return 0, 0, fmt.Errorf("%w: item id %.80q", ErrSource, id)
	}
	b, err := os.ReadFile(l.path(id, partInfo))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return 0, 0, fmt.Errorf("looking at the upload of image %s: %w", id, err)
	}
	total = decodePart(b).Total
	info, err := os.Stat(l.path(id, originalFile))
	if err == nil {
		return info.Size(), max(total, info.Size()), nil
	}
	if info, err = os.Stat(l.path(id, partFile)); err == nil {
		return min(info.Size(), total), total, nil
	}
	if errors.Is(err, fs.ErrNotExist) {
		return 0, total, nil
	}
	return 0, 0, fmt.Errorf("looking at the upload of image %s: %w", id, err)
}

// Receive takes the bytes of an upload of total bytes that begin at an offset, which must be the number of those
// that are here already (ErrOffset), or 0 to begin anew. When the last one is here Fetch goes on. It returns how
// many are here then, also when it fails.
func (l *Library) Receive(ctx context.Context, id, fileName string, offset, total int64, body io.Reader) (int64, error) {
	if _, err := l.Item(id); err == nil {
		return 0, fmt.Errorf("%w: image %s is complete", ErrOffset, id)
	}
	if total <= 0 || offset < 0 || offset > total {
		return 0, fmt.Errorf("%w: bytes from %d of %d", ErrSource, offset, total)
	}
	if err := l.dir(id); err != nil {
		return 0, err
	}
	unlock, err := l.lockSoon(ctx, id)
	if err != nil {
		return 0, err
	}
	defer unlock()
	done, known, err := l.Received(id)
	if err != nil {
		return done, err
	}
	if offset > 0 && (offset != done || known != total) {
		return done, fmt.Errorf("%w: %d of %d bytes are here, go on there", ErrOffset, done, known)
	}
	if offset == 0 {
		if err := l.discard(id); err != nil {
			return done, err
		}
		b, err := json.Marshal(part{FileName: fileName, Total: total})
		if err == nil {
			err = atomicfile.Write(l.path(id, partInfo), b, 0o600)
		}
		if err != nil {
			return 0, fmt.Errorf("receiving image %s: %w", id, full(err))
		}
	}
	if err := l.room(total - offset); err != nil {
		return offset, err
	}
	return l.append(ctx, id, offset, total, body)
}

// append writes to the end of part.
func (l *Library) append(ctx context.Context, id string, offset, total int64, body io.Reader) (int64, error) {
	f, err := os.OpenFile(l.path(id, partFile), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return offset, fmt.Errorf("receiving image %s: %w", id, full(err))
	}
	defer f.Close()
	if _, err := f.Seek(offset, io.SeekStart); err != nil {
		return offset, fmt.Errorf("receiving image %s: %w", id, err)
	}
	n, err := io.CopyBuffer(struct{ io.Writer }{f}, io.LimitReader(ctxReader{ctx, body}, total-offset+1), make([]byte, 1<<20))
	done := offset + n
	if done > total {
		return total, errors.Join(fmt.Errorf("%w: more than the %d bytes that were announced; begin anew", ErrSource, total), l.discard(id))
	}
	if err = errors.Join(err, f.Sync()); err != nil {
		return done, fmt.Errorf("receiving image %s: %w", id, full(err))
	}
	if done < total {
		return done, nil
	}
	return done, l.finish(id)
}
