package handover_test

import (
	"errors"
	"os"
	"reflect"
	"testing"

	"atoll.dev/atoll/internal/datadir/handover"
)

func TestVolumeRecords(t *testing.T) {
	kubelet := t.TempDir()
	if all, err := handover.ReadVolumes(kubelet, "pod"); len(all) != 0 || err != nil {
		t.Errorf("without a directory: %v, %v", all, err)
	}
	group := uint32(0)
	want := map[string]handover.Volume{
		"pvc-1": {ID: "default/a", FSType: "ext4", MountOptions: []string{"noatime"}, FSGroup: &group},
		"pvc-2": {ID: "default/b", ReadOnly: true, Block: &handover.Device{Major: 7, Minor: 300}},
	}
	for name, v := range want {
		if err := v.Write(handover.PublishedVolume(kubelet, "pod", name)); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := handover.ReadVolumes(kubelet, "pod"); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, %v", got, err)
	}
	if _, err := handover.ReadVolume(handover.PublishedVolume(kubelet, "pod", "pvc-3")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("one that is not there: %v", err)
	}
	bad := handover.PublishedVolume(kubelet, "pod", "bad")
	for _, text := range []string{"", "{", "{}", "[]"} {
		if err := os.WriteFile(bad, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if v, err := handover.ReadVolume(bad); err == nil {
			t.Errorf("%q was taken for %+v", text, v)
		}
	}
}
