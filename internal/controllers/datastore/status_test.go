package datastore

import (
	"errors"
	"fmt"
	"testing"

	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	api "atoll.dev/atoll/api/atoll/v1alpha1"
)

func TestStatus(t *testing.T) {
	now := metav1.Now()
	open := State{ID: "i", Capacity: 100 << 30, Free: 50<<30 + 1, Used: 1 << 30, Provisioned: 7 << 30, Volumes: []api.DatastoreVolume{{ID: "v"}}}
	full, nearly, gone := open, open, State{Err: errors.New("no such directory")}
	full.Full, full.NearlyFull, nearly.NearlyFull = true, true, true
	for _, c := range []struct {
		name         string
		state        State
		deleted      *metav1.Time
		ready, space string // reasons
	}{
		{"open", open, nil, reasonOpen, reasonEnough},
		{"nearly full", nearly, nil, reasonOpen, reasonNearlyFull},
		{"full", full, nil, reasonOpen, reasonFull},
		{"gone", gone, nil, reasonFailed, reasonUnknown},
		{"being deleted", open, &now, reasonDeleting, reasonEnough},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := &api.Datastore{Spec: api.DatastoreSpec{Directory: &api.DirectoryDatastore{}, WarnPercent: 80, RefusePercent: 95}}
			d.DeletionTimestamp = c.deleted
			got := statusOf(d, c.state)
			if r := meta.FindStatusCondition(got.Conditions, api.DatastoreReady); r == nil || r.Reason != c.ready {
				t.Errorf("ready: %+v", r)
			}
			if r := meta.FindStatusCondition(got.Conditions, api.DatastoreSpace); r == nil || r.Reason != c.space {
				t.Errorf("space: %+v", r)
			}
		})
	}
}

// TestStatusIsQuiet: what has not changed is not written, nor are numbers that change all the time.
func TestStatusIsQuiet(t *testing.T) {
	d := &api.Datastore{Spec: api.DatastoreSpec{Directory: &api.DirectoryDatastore{}}}
	s := State{ID: "i", Capacity: 100 << 30, Free: 50<<30 + 1}
	d.Status = statusOf(d, s)
	s.Free += 4096
	if next := statusOf(d, s); !equality.Semantic.DeepEqual(d.Status, next) {
		t.Errorf("%+v became %+v", d.Status, next)
	}
	s.Free -= 1 << 30
	if next := statusOf(d, s); equality.Semantic.DeepEqual(d.Status, next) {
		t.Error("a change went unseen")
	}
}

// TestNumbersStay: a datastore that cannot be reached keeps its last numbers.
func TestNumbersStay(t *testing.T) {
	d := &api.Datastore{Spec: api.DatastoreSpec{Directory: &api.DirectoryDatastore{}}}
	d.Status = statusOf(d, State{ID: "i", Capacity: 100 << 30, Volumes: []api.DatastoreVolume{{ID: "v"}}})
	next := statusOf(d, State{Err: errors.New("gone")})
	if next.ID != "i" || next.Capacity.Value() != 100<<30 || len(next.Volumes) != 1 {
		t.Errorf("%+v", next)
	}
}

func TestTheListOfVolumesIsBounded(t *testing.T) {
	var s State
	for i := range maxVolumes + 3 {
		s.Volumes = append(s.Volumes, api.DatastoreVolume{ID: fmt.Sprint(i)})
	}
	got := statusOf(&api.Datastore{}, s)
	if len(got.Volumes) != maxVolumes || got.VolumeCount != maxVolumes+3 {
		t.Errorf("%d in the list, %d counted", len(got.Volumes), got.VolumeCount)
	}
}
