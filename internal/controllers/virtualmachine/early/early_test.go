package early

import (
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/component-helpers/storage/volume"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
)

func node(name string, ready corev1.ConditionStatus, cordoned bool) client.Object {
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.NodeSpec{Unschedulable: cordoned}}
	if ready != "" {
		n.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: ready}}
	}
	return n
}

func TestPlace(t *testing.T) {
	for name, c := range map[string]struct {
		nodes []client.Object
		want  string
	}{
		"one":       {[]client.Object{node("a", corev1.ConditionTrue, false)}, "a"},
		"none":      {nil, ""},
		"two":       {[]client.Object{node("a", corev1.ConditionTrue, false), node("b", corev1.ConditionFalse, false)}, ""},
		"cordoned":  {[]client.Object{node("a", corev1.ConditionTrue, true)}, ""},
		"not ready": {[]client.Object{node("a", corev1.ConditionUnknown, false)}, ""},
		"new":       {[]client.Object{node("a", "", false)}, ""},
	} {
		claim := &corev1.PersistentVolumeClaim{}
		if err := Place(t.Context(), fake.NewClientBuilder().WithObjects(c.nodes...).Build(), claim); err != nil {
			t.Fatal(err)
		}
		if got := claim.Annotations[volume.AnnSelectedNode]; got != c.want {
			t.Errorf("%s: placed on %q, want %q", name, got, c.want)
		}
	}
}

func TestWait(t *testing.T) {
	made := time.Unix(1000, 0)
	claim := func(node string, phase corev1.PersistentVolumeClaimPhase) *corev1.PersistentVolumeClaim {
		c := &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{CreationTimestamp: metav1.NewTime(made)}}
		c.Status.Phase = phase
		if node != "" {
			c.Annotations = map[string]string{volume.AnnSelectedNode: node}
		}
		return c
	}
	for name, c := range map[string]struct {
		claim *corev1.PersistentVolumeClaim
		after time.Duration
		want  time.Duration
	}{
		"at once":     {claim("a", corev1.ClaimPending), 0, most},
		"a bit later": {claim("a", ""), time.Second, most - time.Second},
		"too long":    {claim("a", corev1.ClaimPending), most + time.Hour, 0},
		"there":       {claim("a", corev1.ClaimBound), 0, 0},
		"not placed":  {claim("", corev1.ClaimPending), 0, 0},
	} {
		if got := Wait(c.claim, made.Add(c.after)); got != c.want {
			t.Errorf("%s: waits %v, want %v", name, got, c.want)
		}
	}
}
