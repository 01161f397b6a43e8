package csi

import (
	"context"
	"errors"
	"fmt"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"atoll.dev/atoll/internal/storage/datastore"
	"atoll.dev/atoll/internal/storage/diskimage"
	"atoll.dev/atoll/internal/storage/stores"
)

// Status turns an error of the engine into a gRPC status. An error that is one already stays as it is. The
// node service uses it as well.
func Status(err error) error {
	if err == nil {
		return nil
	}
	if _, ok := status.FromError(err); ok {
		return err
	}
	return status.Error(code(err), err.Error())
}

func code(err error) codes.Code {
	for _, t := range []struct {
		is   error
		code codes.Code
	}{
		{context.Canceled, codes.Canceled},
		{context.DeadlineExceeded, codes.DeadlineExceeded},
		// Not NotFound: a volume is not gone because its datastore cannot be seen from here.
		{stores.ErrUnknown, codes.Unavailable},
		{stores.ErrElsewhere, codes.Unavailable},
		{stores.ErrNone, codes.Unavailable},
		{stores.ErrHandle, codes.NotFound},
		{datastore.ErrNotFound, codes.NotFound},
		{datastore.ErrInvalid, codes.InvalidArgument},
		{datastore.ErrUnsupported, codes.InvalidArgument},
		{datastore.ErrExists, codes.AlreadyExists},
		{datastore.ErrAttached, codes.FailedPrecondition},
		{datastore.ErrShrink, codes.OutOfRange},
		{datastore.ErrFull, codes.ResourceExhausted},
		{datastore.ErrUnavailable, codes.Unavailable},
		{datastore.ErrBusy, codes.Aborted},
		{datastore.ErrKey, codes.FailedPrecondition},
		{datastore.ErrCorrupt, codes.DataLoss},
		{diskimage.ErrDamaged, codes.FailedPrecondition},
	} {
		if errors.Is(err, t.is) {
			return t.code
		}
	}
	return codes.Internal
}

// invalid is a request that must be changed before it is made again.
func invalid(format string, args ...any) error {
	return status.Error(codes.InvalidArgument, fmt.Sprintf(format, args...))
}
