package supervisornamespace

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/api/resource"
	"sigs.k8s.io/controller-runtime/pkg/client"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
)

const (
	// recountAfter is how long a quota may take to be counted.
	recountAfter = 10 * time.Second
	// recountEvery is how often it is made to be counted again.
	recountEvery = 15 * time.Second
	// recountKey bounds objects of a kind that does not exist.
	recountKey = corev1.ResourceName("count/recounts.atoll.dev")
)

// counted says whether the ResourceQuota is in effect: it refuses everything until its use has been counted. On a server
// that has just started, objects of a kind that a definition brings are counted some seconds later than the others, but
// for a quota that was there before only after minutes, or when its limits change: such a quota gets a limit that bounds
// nothing, which goes again when the quota is next looked at. All its limits hold meanwhile.
func (r *Reconciler) counted(ctx context.Context, sn *atoll.SupervisorNamespace, want *corev1.ResourceQuota) string {
	have := &corev1.ResourceQuota{}
	if err := r.Shared.Get(ctx, client.ObjectKeyFromObject(want), have); err != nil || !equality.Semantic.DeepEqual(have.Status.Hard, want.Spec.Hard) {
		return fmt.Sprintf("what ResourceQuota %s bounds is being counted", want.Name)
	}
	var missing []string
	for name := range want.Spec.Hard {
		if _, ok := have.Status.Used[name]; !ok {
			missing = append(missing, string(name))
		}
	}
	if len(missing) == 0 {
		return ""
	}
	c := meta.FindStatusCondition(sn.Status.Conditions, atoll.NamespaceReady)
	if c != nil && c.Reason == atoll.ReasonNotExpanded && time.Since(c.LastTransitionTime.Time) > recountAfter && r.recounts.due(sn.Name+"/"+want.Name, time.Now()) {
		more := have.DeepCopy()
		more.Spec.Hard[recountKey] = *resource.NewQuantity(0, resource.DecimalSI)
		_ = r.Patch(ctx, more, client.MergeFrom(have)) // tried again
	}
	return fmt.Sprintf("what ResourceQuota %s bounds is being counted: %s", want.Name, slices.Min(missing))
}

// recounts remembers which quotas have been made to be counted again within recountEvery, and nothing older.
type recounts struct {
	mu sync.Mutex
	at map[string]time.Time
}

// due tells whether a quota may be made to be counted again, and takes it for done then.
func (r *recounts) due(quota string, now time.Time) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	for name, at := range r.at {
		if now.Sub(at) >= recountEvery {
			delete(r.at, name)
		}
	}
	if _, done := r.at[quota]; done {
		return false
	}
	if r.at == nil {
		r.at = map[string]time.Time{}
	}
	r.at[quota] = now
	return true
}
