package agent

import (
	"context"
	"errors"
	"strings"

	controller "atoll.dev/atoll/internal/controllers/encryption"
	"atoll.dev/atoll/internal/storage/datastore"
	"atoll.dev/atoll/internal/storage/rotation"
	"atoll.dev/atoll/internal/storage/stores"
)

// encryption is the Host of the controller of EncryptionClasses. The controller calls it from one goroutine.
type encryption struct {
	set   *stores.Set
	keys  datastore.Keys
	items []rotation.Item
}

// Look implements controller.Host.
func (e *encryption) Look(ctx context.Context) ([]controller.Volume, error) {
	open, unseen := e.set.Known()
	var err error
	e.items, err = rotation.Items(ctx, open)
	err = errors.Join(unseen, err)
	var out []controller.Volume
	for n, i := range e.items {
		v := controller.Volume{Index: n, Name: i.String(), Class: i.Class}
		// A volume that was made for a claim has its uid in its id.
		if uid, ok := strings.CutPrefix(i.Source.Volume, "pvc-"); ok && i.Claim != "" {
			v.Claim, v.ClaimUID = i.Claim, uid
		}
		out = append(out, v)
	}
	return out, err
}

// Move implements controller.Host.
func (e *encryption) Move(ctx context.Context, v controller.Volume, class string) error {
	if err := rotation.Move(ctx, e.items[v.Index], class); err != nil {
		return err
	}
	e.items[v.Index].Class, e.items[v.Index].KEKs = class, nil
	return nil
}

// Rotate implements controller.Host.
func (e *encryption) Rotate(ctx context.Context, class string, told func(controller.State)) controller.State {
	state := func(r rotation.Result) controller.State {
		return controller.State{
			Provider: r.KEK.Provider, KeyID: r.KEK.ID, Fingerprint: r.KEK.Fingerprint, KeyErr: r.KeyErr,
			Volumes: r.Total, Current: r.Current, VolumeErr: r.Err,
		}
	}
	return state(rotation.Rewrap(ctx, e.keys, e.items, class, func(r rotation.Result) { told(state(r)) }))
}
