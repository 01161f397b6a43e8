package machines

import (
	"context"
	"encoding/json"
	"errors"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/datadir/attach"
	"atoll.dev/atoll/internal/datadir/handover"
)

func volume(name, handle, namespace string) *corev1.PersistentVolume {
	return &corev1.PersistentVolume{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.PersistentVolumeSpec{
		ClaimRef:               &corev1.ObjectReference{Namespace: namespace, Name: name},
		PersistentVolumeSource: corev1.PersistentVolumeSource{CSI: &corev1.CSIPersistentVolumeSource{Driver: handover.Driver, VolumeHandle: handle}},
	}}
}

func attachment(volume, node string) *storagev1.VolumeAttachment {
	return &storagev1.VolumeAttachment{ObjectMeta: metav1.ObjectMeta{Name: volume + node}, Spec: storagev1.VolumeAttachmentSpec{
		Attacher: handover.Driver, NodeName: node, Source: storagev1.VolumeAttachmentSource{PersistentVolumeName: &volume},
	}}
}

func TestMayUse(t *testing.T) {
	disk := func(name, handle string) machinev1.Disk {
		return machinev1.Disk{Name: name, Volume: handle, Bus: machinev1.SCSI, Unit: len(name), UUID: "00000000-0000-4000-8000-00000000000" + string(rune('0'+len(name)))}
	}
	text, err := json.Marshal(machinev1.Machine{
		Name: "db", Namespace: "team", UID: "u", BIOSUUID: "4c4c4544-0051-3010-8052-b4c04f4e3132",
		CPU: machinev1.CPU{Count: 1}, Memory: machinev1.Memory{Bytes: 64 << 20}, Firmware: machinev1.Firmware{Type: machinev1.BIOS},
		Stop:    machinev1.Stop{Mode: machinev1.Hard},
		Disks:   []machinev1.Disk{disk("a", "s/data"), disk("ab", "s/far"), disk("abc", "s/foreign"), disk("abcd", "s/missing")},
		Restore: &machinev1.MemoryState{Volume: "s/memory"},
	})
	if err != nil {
		t.Fatal(err)
	}
	m := &Machines{node: "here", client: fake.NewClientset(
		&corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Name: "db", Namespace: "team", UID: "p", Annotations: map[string]string{machinev1.Annotation: string(text)}},
			Spec:       corev1.PodSpec{NodeName: "here"},
		},
		&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "away", Namespace: "team", UID: "q"}, Spec: corev1.PodSpec{NodeName: "there"}},
		volume("data", "s/data", "team"), volume("far", "s/far", "team"), volume("foreign", "s/foreign", "other"), volume("memory", "s/memory", "team"),
		volume("unnamed", "s/unnamed", "team"),
		attachment("data", "here"), attachment("far", "there"), attachment("foreign", "here"), attachment("unnamed", "here"),
	)}
	for _, c := range []struct {
		volume, pod, uid string
		memory           bool
		refused          string
	}{
		{"s/data", "db", "p", false, ""},
		{"s/memory", "db", "p", true, ""},
		{"s/memory", "db", "p", false, "does not name it"},
		{"s/data", "db", "p", true, "does not name it"},
		{"s/far", "db", "p", false, "not attached to node here"},
		{"s/foreign", "db", "p", false, "not bound to a claim in namespace team"},
		{"s/missing", "db", "p", false, "no PersistentVolume"},
		{"s/unnamed", "db", "p", false, "does not name it"},
		{"s/data", "db", "other", false, "does not run on this node"},
		{"s/data", "away", "q", false, "does not run on this node"},
		{"s/data", "none", "p", false, "does not run on this node"},
	} {
		err := m.MayUse(t.Context(), attach.OpenRequest{Volume: c.volume, Pod: c.uid, Machine: &attach.MachineUse{Namespace: "team", Name: c.pod, Memory: c.memory}})
		if c.refused == "" && err != nil || c.refused != "" && (!errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), c.refused)) {
			t.Errorf("%+v: %v", c, err)
		}
	}
	if err := m.MayUse(t.Context(), attach.OpenRequest{Volume: "s/data", Pod: "p"}); !errors.Is(err, ErrRefused) {
		t.Errorf("not a machine: %v", err)
	}
}

func TestAll(t *testing.T) {
	m := &Machines{list: func(_ context.Context, o metav1.ListOptions) (*metav1.PartialObjectMetadataList, error) {
		page := &metav1.PartialObjectMetadataList{Items: []metav1.PartialObjectMetadata{{ObjectMeta: metav1.ObjectMeta{UID: "a"}}}}
		if o.Continue != "" {
			page.Items[0].UID = "b"
			return page, nil
		}
		page.Continue = "next"
		return page, nil
	}}
	all, err := m.All(t.Context())
	if err != nil || len(all) != 2 || !all["a"] || !all["b"] {
		t.Errorf("%v, %v", all, err)
	}
	away := errors.New("away")
	m.list = func(context.Context, metav1.ListOptions) (*metav1.PartialObjectMetadataList, error) { return nil, away }
	if _, err := m.All(t.Context()); !errors.Is(err, away) {
		t.Errorf("without an API server: %v", err)
	}
}
