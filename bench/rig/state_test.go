package rig

import "testing"

func TestVerdict(t *testing.T) {
	before := map[string]int{"loops": 2, "mounts": 30, memory: 9000}
	for _, c := range []struct {
		after     map[string]int
		note, err string
	}{
		{map[string]int{"loops": 2, "mounts": 30, memory: 8000}, "nothing left; available memory -1000 MiB; ", ""},
		{map[string]int{"loops": 2, "mounts": 29, memory: 9500}, "nothing left; available memory +500 MiB; mounts -1; ", ""},
		{
			map[string]int{"loops": 5, "mounts": 31, "netns": 1, memory: 9000},
			"LEAK: loops +3; available memory +0 MiB; mounts +1; netns +1; ", "left on the host: loops +3, mounts +1, netns +1",
		},
	} {
		row, err := Verdict(Row{Measure: "cycles"}, before, c.after)
		got := ""
		if err != nil {
			got = err.Error()
		}
		if row.Measure != "cycles" || row.Note != c.note || got != c.err {
			t.Errorf("%v: %+v, %v", c.after, row, err)
		}
	}
}

// TestAtRest: what goes away slowly is waited for, what was there for one look is not.
func TestAtRest(t *testing.T) {
	var states []map[string]int
	for i, files := range []int{9, 8, 7, 12, 7, 7} {
		states = append(states, map[string]int{"files": files, memory: i})
		if got, want := atRest(states, 3), i == 5; got != want {
			t.Errorf("at rest after %d looks: %v", i+1, got)
		}
	}
}
