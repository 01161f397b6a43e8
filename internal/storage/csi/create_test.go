package csi

import (
	"context"
	"fmt"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"atoll.dev/atoll/internal/storage/datastore"
	"atoll.dev/atoll/internal/storage/stores"
)

// one is a datastore with at most one volume.
type one struct {
	stores.Backend
	state datastore.State
	err   error
}

func (o one) Volume(context.Context, string) (datastore.Volume, error) {
	return datastore.Volume{State: o.state}, o.err
}

// TestMadeBefore: a volume that is there is found wherever it is, and no second one made where one may be.
func TestMadeBefore(t *testing.T) {
	none := one{err: datastore.ErrNotFound}
	down := one{err: fmt.Errorf("%w: no answer", datastore.ErrUnavailable)}
	begun, ready := one{state: datastore.StateCreating}, one{state: datastore.StateReady}
	for _, test := range []struct {
		in   []one
		want string // indices
		code codes.Code
	}{
		{[]one{down}, "[0]", codes.OK}, // the only one tells itself what is wrong
		{[]one{none, none}, "[0 1]", codes.OK},
		{[]one{none, begun, none}, "[1 0 2]", codes.OK},
		{[]one{begun, ready}, "[1]", codes.OK},
		{[]one{down, ready}, "[1]", codes.OK},
		{[]one{none, down}, "", codes.Unavailable},
		{[]one{begun, down}, "", codes.Unavailable},
	} {
		var candidates []stores.Store
		for i, o := range test.in {
			candidates = append(candidates, stores.Store{Name: fmt.Sprint(i), Backend: o})
		}
		out, err := madeBefore(t.Context(), candidates, "v")
		var names []string
		for _, s := range out {
			names = append(names, s.Name)
		}
		if status.Code(err) != test.code || err == nil && fmt.Sprint(names) != test.want {
			t.Errorf("%+v: %v, %v", test.in, names, err)
		}
	}
}
