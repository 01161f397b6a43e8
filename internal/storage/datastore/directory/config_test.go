package directory

import (
	"errors"
	"testing"

	"atoll.dev/atoll/internal/storage/datastore"
)

func TestNew(t *testing.T) {
	for _, c := range []Config{{}, {Path: "relative"}, {Path: "/"}, {Path: "/x", Limits: datastore.Limits{RefuseAt: 2}}, {Path: "/x", Limits: datastore.Limits{WarnAt: -1}}} {
		if _, err := New(c); !errors.Is(err, datastore.ErrInvalid) {
			t.Errorf("%+v: %v", c, err)
		}
	}
}
