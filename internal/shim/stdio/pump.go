package stdio

import (
	"io"
	"sync"
)

// A stream that is idle holds a small buffer, one that flows a large one: a pod can have hundreds of
// idle streams.
const (
	idleBuffer = 2 << 10
	flowBuffer = 64 << 10
)

// buffers are the large ones that are not in use.
var buffers = sync.Pool{New: func() any { return new([flowBuffer]byte) }}

// pump copies until the source ends, which is no error, or the destination fails.
func pump(dst io.Writer, src io.Reader) error {
	small := make([]byte, idleBuffer)
	var large *[flowBuffer]byte
	defer func() {
		if large != nil {
			buffers.Put(large)
		}
	}()
	for {
		buf := small
		if large != nil {
			buf = large[:]
		}
		n, err := src.Read(buf)
		if n > 0 {
			if _, werr := dst.Write(buf[:n]); werr != nil {
				return werr
			}
		}
		if err != nil {
			return nil //nolint:nilerr // however the source ends, there is no more to copy
		}
		switch {
		case large == nil && n == len(buf):
			large = buffers.Get().(*[flowBuffer]byte)
		case large != nil && n <= idleBuffer:
			buffers.Put(large)
			large = nil
		}
	}
}
