package csi

import (
	"maps"
	"reflect"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"atoll.dev/atoll/internal/storage/datastore"
)

func TestParsePolicy(t *testing.T) {
	for _, c := range []struct {
		name   string
		params map[string]string
		want   Policy
	}{
		{"nothing", nil, Policy{Provisioning: datastore.Thin, Labels: map[string]string{}}},
		{
			"everything",
			map[string]string{
				"datastoreSelector": "tier=gold, site=a", "provisioning": "eager-zeroed", "fsType": "xfs", "encryption": "default",
				"readIops": "100", "writeBandwidth": "1.5Mi", "csi.storage.k8s.io/pvc/name": "data",
			},
			Policy{
				Selector: map[string]string{"tier": "gold", "site": "a"}, Provisioning: datastore.EagerZeroed, FSType: "xfs", Encryption: "default",
				Limits: Limits{ReadIOPS: 100, WriteBandwidth: 3 << 19}, Labels: map[string]string{"pvc/name": "data"},
			},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := ParsePolicy(c.params)
			if err != nil || !reflect.DeepEqual(got, c.want) {
				t.Fatalf("%+v, %v", got, err)
			}
		})
	}
}

func TestBadParametersAreNamed(t *testing.T) {
	for _, c := range []struct {
		params map[string]string
		want   []string // in the error
	}{
		{map[string]string{"speed": "fast"}, []string{`"speed"`, "remove it", "provisioning"}},
		{map[string]string{"provisioning": "lazy"}, []string{`"provisioning"`, "eager-zeroed"}},
		{map[string]string{"fsType": "btrfs"}, []string{`"fsType"`, "ext4", "xfs"}},
		{map[string]string{"datastore": ""}, []string{`"datastore"`, "empty"}},
		{map[string]string{"datastoreSelector": "gold"}, []string{`"datastoreSelector"`, "label=value"}},
		{map[string]string{"datastore": "a", "datastoreSelector": "b=c"}, []string{`"datastore"`, `"datastoreSelector"`}},
		{map[string]string{"iops": "-1"}, []string{`"iops"`, "500"}},
		{map[string]string{"iops": "1", "readIops": "1"}, []string{`"iops"`, `"readIops"`}},
		{map[string]string{"bandwidth": "fast"}, []string{`"bandwidth"`, "100Mi"}},
		{map[string]string{"bandwidth": "9999999999Ti"}, []string{`"bandwidth"`}},
		{map[string]string{"bandwidth": "1", "writeBandwidth": "1"}, []string{`"bandwidth"`, `"writeBandwidth"`}},
	} {
		_, err := ParsePolicy(c.params)
		if err == nil {
			t.Errorf("%v: no error", c.params)
			continue
		}
		for _, want := range c.want {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%v: %q does not say %s", c.params, err, want)
			}
		}
	}
}

func TestLimitsSurviveTheLabels(t *testing.T) {
	labels := map[string]string{"pvc/name": "data", "limit/readIops": "7"}
	want := Limits{IOPS: 100, Bandwidth: 1 << 20}
	setLimitLabels(labels, want)
	got, err := LimitsOf(datastore.Volume{Labels: labels})
	if err != nil || got != want {
		t.Errorf("%+v, %v", got, err)
	}
	setLimitLabels(labels, Limits{})
	if !maps.Equal(labels, map[string]string{"pvc/name": "data"}) {
		t.Errorf("%v", labels)
	}
}

func TestCapabilities(t *testing.T) {
	capability := func(mode csi.VolumeCapability_AccessMode_Mode, block bool) *csi.VolumeCapability {
		c := &csi.VolumeCapability{
			AccessMode: &csi.VolumeCapability_AccessMode{Mode: mode},
			AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{}},
		}
		if block {
			c.AccessType = &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}}
		}
		return c
	}
	many := csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER
	err := checkCapability(capability(many, false))
	if status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "volumeMode: Block") {
		t.Errorf("a file system for several nodes: %v", err)
	}
	if err := checkCapability(capability(many, true)); err != nil {
		t.Errorf("a block volume for several nodes: %v", err)
	}
	if err := checkCapability(capability(csi.VolumeCapability_AccessMode_MULTI_NODE_SINGLE_WRITER, true)); status.Code(err) != codes.InvalidArgument {
		t.Errorf("an unknown mode: %v", err)
	}
	for _, c := range []struct {
		mode     csi.VolumeCapability_AccessMode_Mode
		readOnly bool
		want     datastore.Mode
	}{
		{csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER, false, datastore.ReadWrite},
		{csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER, true, datastore.ReadOnly},
		{csi.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY, false, datastore.ReadOnly},
		{many, false, datastore.ReadWriteMany},
		{many, true, datastore.ReadOnly},
	} {
		if got := Mode(capability(c.mode, true), c.readOnly); got != c.want {
			t.Errorf("%s, read-only %v: %s, want %s", c.mode, c.readOnly, got, c.want)
		}
	}
}

func TestVolumeSize(t *testing.T) {
	for _, c := range []struct {
		required, limit int64
		fs              string
		copied          bool
		size            int64
		code            codes.Code
	}{
		{0, 0, fsExt4, false, defaultSize, codes.OK},
		{0, 0, fsExt4, true, 0, codes.OK}, // that of the source
		{0, 64 << 20, fsExt4, false, 64 << 20, codes.OK},
		{1, 0, "", false, datastore.MinSize, codes.OK},
		{1, 0, fsExt4, false, minExt4, codes.OK},
		{1, 0, fsXFS, false, minXFS, codes.OK},
		{1, 100 << 20, fsXFS, false, 0, codes.OutOfRange},
		{-1, 0, "", false, 0, codes.InvalidArgument},
		{2, 1, "", false, 0, codes.InvalidArgument},
		{1 << 62, 0, "", false, 0, codes.OutOfRange},
	} {
		size, _, err := volumeSize(&csi.CapacityRange{RequiredBytes: c.required, LimitBytes: c.limit}, c.fs, c.copied)
		if status.Code(err) != c.code || err == nil && size != c.size {
			t.Errorf("%+v: %d, %v", c, size, err)
		}
	}
}

func TestEngineID(t *testing.T) {
	seen := map[string]string{}
	for _, name := range []string{"pvc-1", "PVC-1", strings.Repeat("x", 128), strings.Repeat("x", 127), "a b", "v-" + strings.Repeat("0", 40), "ä"} {
		id := engineID("v", name)
		if len(id) > 63 || !plainName().MatchString(id) {
			t.Errorf("%q: id %q", name, id)
		}
		if id != engineID("v", name) {
			t.Errorf("%q: two ids", name)
		}
		if other, ok := seen[id]; ok {
			t.Errorf("%q and %q have the same id", name, other)
		}
		seen[id] = name
	}
	if engineID("v", "pvc-1") != "pvc-1" {
		t.Error("a plain name was changed")
	}
}

func TestPage(t *testing.T) {
	all := []string{"d/c", "d/a", "d/b"}
	same := func(s string) string { return s }
	part, next, err := page(append([]string{}, all...), same, "", 2)
	if err != nil || !reflect.DeepEqual(part, []string{"d/a", "d/b"}) || next != "d/c" {
		t.Errorf("%v, %q, %v", part, next, err)
	}
	part, next, err = page(append([]string{}, all...), same, next, 2)
	if err != nil || !reflect.DeepEqual(part, []string{"d/c"}) || next != "" {
		t.Errorf("%v, %q, %v", part, next, err)
	}
	if _, _, err := page(all, same, "nonsense", 2); status.Code(err) != codes.Aborted {
		t.Errorf("a wrong token: %v", err)
	}
}
