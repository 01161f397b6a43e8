package sandbox

import (
	"maps"
	"os"
	"testing"

	"atoll.dev/atoll/internal/shim/cripb"
)

func TestClassScore(t *testing.T) {
	for parent, want := range map[string]int{
		"/kubepods/besteffort/pod3f1c6f6e-0c0e-4c0d":                         scoreBestEffort,
		"/atoll-0123abcd/kubepods/burstable/pod3f1c6f6e":                     scoreBurstable,
		"/kubepods/pod3f1c6f6e-0c0e-4c0d":                                    scoreGuaranteed,
		"kubepods-besteffort-pod3f1c6f6e_0c0e.slice":                         scoreBestEffort,
		"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podx.y": scoreBurstable,
		"kubepods-pod3f1c6f6e_0c0e.slice":                                    scoreGuaranteed,
	} {
		if got, ok := classScore(parent); got != want || !ok {
			t.Errorf("%s: %d, %v; want %d", parent, got, ok, want)
		}
	}
	for _, parent := range []string{"", "/k8s.io", "/notkubepods/pod"} {
		if got, ok := classScore(parent); ok {
			t.Errorf("%q has score %d", parent, got)
		}
	}
}

// TestScores: QEMU starts with the score of the pod's class and takes over the lowest of its containers.
func TestScores(t *testing.T) {
	for parent, want := range map[string][]int{
		"/kubepods/burstable/podx":  {scoreBurstable, 960, 900},
		"/kubepods/besteffort/podx": {scoreBestEffort, 960, 900},
		"/kubepods/podx":            {scoreGuaranteed, scoreGuaranteed, scoreGuaranteed},
		"/other":                    {0, 960, 900},
	} {
		w := newWorld()
		s := service(t, w)
		if _, err := start(t, s, request(t, func(c *cripb.PodSandboxConfig) { c.Linux.CgroupParent = parent })); err != nil {
			t.Fatal(err)
		}
		for i, container := range []int{0, 960, 900, 999} {
			if i > 0 {
				w.attached.Protect(container)
			}
			w.mu.Lock()
			got := maps.Clone(w.scores)
			w.mu.Unlock()
			if got[os.Getpid()] != scoreShim || got[4711] != want[min(i, 2)] {
				t.Errorf("%s, after container %d: %v", parent, i, got)
			}
		}
	}
}
