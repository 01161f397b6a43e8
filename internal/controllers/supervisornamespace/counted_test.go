package supervisornamespace

import (
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
)

func TestRecountsAreRare(t *testing.T) {
	var r recounts
	now := time.Date(2026, 11, 28, 12, 0, 0, 0, time.UTC)
	for _, c := range []struct {
		after time.Duration
		quota string
		due   bool
	}{{0, "a", true}, {time.Second, "a", false}, {time.Second, "b", true}, {recountEvery - 2*time.Second, "a", true}, {0, "a", false}, {2 * time.Second, "c", true}} {
		now = now.Add(c.after)
		if got := r.due(c.quota, now); got != c.due {
			t.Errorf("%+v: %v", c, got)
		}
	}
	if len(r.at) != 2 { // b has been forgotten
		t.Errorf("%v", r.at)
	}
}

// A quota that is not counted is changed once, keeps all its limits, and gets back what it had.
func TestRecountKeepsLimits(t *testing.T) {
	sn := shop(full())
	sn.Spec.Resources.Counts.VirtualMachines = new(int64(2))
	r := newReconciler(t, sn)
	sn = look(t, r)
	wantReady(t, sn, atoll.ReasonReady, "")
	const key = corev1.ResourceName("count/virtualmachines.vmoperator.vmware.com")
	uncounted := func() *corev1.ResourceQuota {
		q := get(t, r, &corev1.ResourceQuota{ObjectMeta: in("shop-quota")})
		delete(q.Status.Used, key)
		q.Status.Hard = q.Spec.Hard
		if err := r.Status().Update(t.Context(), q); err != nil {
			t.Fatal(err)
		}
		return q
	}
	want := uncounted().DeepCopy()
	want.TypeMeta = metav1.TypeMeta{APIVersion: "v1", Kind: "ResourceQuota"}
	want.ResourceVersion, want.ManagedFields = "", nil
	meta.SetStatusCondition(&sn.Status.Conditions, metav1.Condition{
		Type: atoll.NamespaceReady, Status: metav1.ConditionFalse, Reason: atoll.ReasonNotExpanded, LastTransitionTime: metav1.NewTime(time.Unix(0, 0)),
	})
	if got := r.counted(t.Context(), sn, want); !strings.HasSuffix(got, "is being counted: "+string(key)) {
		t.Error(got)
	}
	changed := get(t, r, &corev1.ResourceQuota{ObjectMeta: in("shop-quota")})
	for name, limit := range want.Spec.Hard {
		if now, ok := changed.Spec.Hard[name]; !ok || now.Cmp(limit) != 0 {
			t.Errorf("limit %s was %v and is %v", name, limit, now)
		}
	}
	if limit, ok := changed.Spec.Hard[recountKey]; !ok || limit.Cmp(resource.Quantity{}) != 0 {
		t.Errorf("nothing makes the quota be counted: %v", changed.Spec.Hard)
	}
	if err := r.ensure(t.Context(), want); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		uncounted()
		if got := r.counted(t.Context(), sn, want); got == "" {
			t.Error("it is taken for counted")
		}
		if q := get(t, r, &corev1.ResourceQuota{ObjectMeta: in("shop-quota")}); len(q.Spec.Hard) != len(want.Spec.Hard) {
			t.Fatalf("changed again at once: %v", q.Spec.Hard)
		}
	}
}
