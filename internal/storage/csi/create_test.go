package csi

import (
	"context"
	"errors"
	"fmt"
	"math"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
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

// maker notes what it is asked to make.
type maker struct {
	stores.Backend
	made datastore.Volume
	spec datastore.Spec
}

func (m *maker) Volume(context.Context, string) (datastore.Volume, error) {
	if m.made.ID == "" {
		return datastore.Volume{}, datastore.ErrNotFound
	}
	return m.made, nil
}

func (m *maker) Create(_ context.Context, spec datastore.Spec) (datastore.Volume, error) {
	m.spec = spec
	if m.made.ID != "" && m.made.Encryption != spec.Encryption {
		return datastore.Volume{}, datastore.ErrExists
	}
	return datastore.Volume{ID: spec.ID, Size: spec.Size}, nil
}

// TestEncryption: the claim has the last word on the class, except for a volume that was made already.
func TestEncryption(t *testing.T) {
	class := func(_ context.Context, namespace, claim, fallback string) (string, error) {
		switch claim {
		case "named":
			return namespace + "/gold", nil
		case "bad":
			return "", errors.New("there is no EncryptionClass")
		case "silent":
			return "", fmt.Errorf("reading the claim: %w", datastore.ErrUnavailable)
		}
		return fallback, nil
	}
	ready := func(class string) datastore.Volume {
		return datastore.Volume{ID: "pvc-1", Encryption: class, State: datastore.StateReady}
	}
	for _, c := range []struct {
		claim, param string
		made         datastore.Volume
		want         string
		code         codes.Code
	}{
		{claim: "plain"},
		{claim: "plain", param: "corp", want: "corp"},
		{claim: "named", want: "team/gold"},
		{claim: "named", param: "corp", want: "team/gold"},
		{claim: "named", made: ready("team/silver"), want: "team/silver"},
		{claim: "named", made: ready("")},                             // the annotation is younger than the volume
		{claim: "plain", made: ready("team/gold"), want: "team/gold"}, // it was removed
		{claim: "bad", made: ready("team/gold"), want: "team/gold"},
		{claim: "silent", made: ready("team/gold"), want: "team/gold"},
		{claim: "plain", param: "corp", made: ready(""), want: "corp", code: codes.AlreadyExists}, // another StorageClass
		{claim: "named", made: datastore.Volume{}, want: "team/gold"},
		{claim: "silent", code: codes.Unavailable},
		{claim: "bad", param: "corp", code: codes.FailedPrecondition},
		{claim: "", param: "corp", want: "corp"}, // no claim at all
	} {
		m, set := &maker{made: c.made}, &stores.Set{}
		set.Put(stores.Store{Name: stores.Default, Backend: m})
		params := map[string]string{"csi.storage.k8s.io/pvc/name": c.claim, "csi.storage.k8s.io/pvc/namespace": "team"}
		if c.param != "" {
			params[ParamEncryption] = c.param
		}
		s := &controller{cfg: Config{Node: "n", Stores: set, Encryption: class, Open: nothingOpen{}}, calls: &calls{}}
		_, err := s.CreateVolume(t.Context(), &csi.CreateVolumeRequest{
			Name: "pvc-1", Parameters: params,
			VolumeCapabilities: []*csi.VolumeCapability{{
				AccessType: &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}},
				AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
			}},
		})
		if status.Code(Status(err)) != c.code || m.spec.Encryption != c.want {
			t.Errorf("%+v: %+v, %v", c, m.spec, err)
		}
	}
}

func (m *maker) Status(context.Context) datastore.Status { return datastore.Status{Creatable: 7} }

// TestCapacity: a claim that asks whether there is room is not turned away without a reason.
func TestCapacity(t *testing.T) {
	set := &stores.Set{}
	set.Put(stores.Store{Name: stores.Default, Backend: &maker{}})
	set.Close("far", stores.ErrElsewhere)
	s := &controller{cfg: Config{Node: "n", Stores: set, Open: nothingOpen{}}, calls: &calls{}}
	for name, c := range map[string]struct {
		params map[string]string
		want   int64
	}{
		"a class":                 {nil, 7},
		"a claim":                 {map[string]string{"csi.storage.k8s.io/pvc/name": "c"}, math.MaxInt64},
		"a claim of another host": {map[string]string{"csi.storage.k8s.io/pvc/name": "c", ParamDatastore: "far"}, 0},
		"nonsense":                {map[string]string{"speed": "high"}, datastore.MaxSize},
	} {
		got, err := s.GetCapacity(t.Context(), &csi.GetCapacityRequest{Parameters: c.params})
		if err != nil || got.AvailableCapacity != c.want {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
}
