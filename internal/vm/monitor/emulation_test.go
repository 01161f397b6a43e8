package monitor

import "testing"

func TestTranslations(t *testing.T) {
	for _, test := range []struct {
		used              int64
		limit, present, n int
		want              bool
	}{
		{0, 4, 1, 4, true},
		{12 << 20, 4, 1, 4, true},
		{19 << 20, 4, 1, 2, false},
		{0, 200, 1, 200, true},
		{10 << 20, 200, 100, 200, false},
	} {
		tr := translations{used: test.used, size: 20 << 20}
		if got := tr.fits(Emulated{BufferMiB: 20, Limit: test.limit}, test.present, test.n); got != test.want {
			t.Errorf("%+v: %v", test, got)
		}
	}
	if (translations{}).fits(Emulated{BufferMiB: 20, Limit: 4}, 1, 2) {
		t.Error("nothing fits into nothing")
	}
}
