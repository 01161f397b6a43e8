package namespacebounds

import (
	"fmt"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	resourcehelper "k8s.io/component-helpers/resource"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
)

// assumedFor is how long a pod counts that was admitted and has not been seen since.
const assumedFor = 5 * time.Second

// amount is an amount of CPU, in thousandths, and of memory, in bytes.
type amount struct{ cpu, memory int64 }

func (a amount) plus(b amount) amount { return amount{a.cpu + b.cpu, a.memory + b.memory} }

func (a amount) minus(b amount) amount { return amount{a.cpu - b.cpu, a.memory - b.memory} }

// atLeast raises what is below.
func (a amount) atLeast(b amount) amount { return amount{max(a.cpu, b.cpu), max(a.memory, b.memory)} }

// within tells whether there is room for it.
func (a amount) within(b amount) bool { return a.cpu <= b.cpu && a.memory <= b.memory }

// request is what one pod requests.
type request struct {
	amount
	namespace string
	placed    bool      // on a node
	until     time.Time // of a pod that has not been seen
}

// ledger knows what the nodes have, what is requested of it, and what is reserved.
type ledger struct {
	now func() time.Time

	mu       sync.Mutex
	nodes    map[string]amount
	total    amount
	pods     map[types.UID]request
	used     map[string]amount // by namespace, without what no node can run
	all      amount            // sum of used
	assumed  map[types.UID]request
	reserved map[string]amount // by namespace
}

func newLedger() *ledger {
	return &ledger{
		now: time.Now, nodes: map[string]amount{}, pods: map[types.UID]request{}, used: map[string]amount{},
		assumed: map[types.UID]request{}, reserved: map[string]amount{},
	}
}

func amountOf(list corev1.ResourceList) amount {
	return amount{list.Cpu().MilliValue(), list.Memory().Value()}
}

// requests is what a pod requests, its overhead included.
func requests(pod *corev1.Pod) amount {
	return amountOf(resourcehelper.PodRequests(pod, resourcehelper.PodResourcesOptions{}))
}

// node takes on what a node has.
func (l *ledger) node(obj any) {
	node, ok := obj.(*corev1.Node)
	if !ok {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.setNode(node.Name, amountOf(node.Status.Allocatable))
}

func (l *ledger) nodeGone(obj any) {
	node, ok := obj.(*corev1.Node)
	if !ok {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.setNode(node.Name, amount{})
	delete(l.nodes, node.Name)
}

func (l *ledger) setNode(name string, has amount) {
	if l.nodes[name] == has {
		return
	}
	l.total = l.total.minus(l.nodes[name]).plus(has)
	l.nodes[name] = has
	l.used, l.all = map[string]amount{}, amount{}
	for _, r := range l.pods {
		l.count(r, true)
	}
}

// counts tells whether a request takes something from others: what is larger than every node can wait for ever, and
// keeps nobody from anything.
func (l *ledger) counts(r request) bool {
	if r.placed {
		return true
	}
	for _, has := range l.nodes {
		if r.within(has) {
			return true
		}
	}
	return false
}

// counted is counts for others.
func (l *ledger) counted(r request) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.counts(r)
}

// pod takes on what a pod requests, which is nothing once it has ended.
func (l *ledger) pod(obj any) {
	pod, ok := obj.(*corev1.Pod)
	if !ok {
		return
	}
	if pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed {
		l.podGone(obj)
		return
	}
	r := request{amount: requests(pod), namespace: pod.Namespace, placed: pod.Spec.NodeName != ""}
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.assumed, pod.UID)
	l.count(l.pods[pod.UID], false)
	l.count(r, true)
	l.pods[pod.UID] = r
}

func (l *ledger) podGone(obj any) {
	pod, ok := obj.(*corev1.Pod)
	if !ok {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.assumed, pod.UID)
	l.count(l.pods[pod.UID], false)
	delete(l.pods, pod.UID)
}

func (l *ledger) count(r request, more bool) {
	if r.namespace == "" || !l.counts(r) {
		return
	}
	sum := l.used[r.namespace].minus(r.amount)
	if more {
		sum = l.used[r.namespace].plus(r.amount)
		l.all = l.all.plus(r.amount)
	} else {
		l.all = l.all.minus(r.amount)
	}
	if sum == (amount{}) {
		delete(l.used, r.namespace)
		return
	}
	l.used[r.namespace] = sum
}

// reserve takes on the reservation of a namespace.
func (l *ledger) reserve(obj any) {
	b, ok := obj.(*atoll.SupervisorNamespace)
	if !ok {
		return
	}
	var r amount
	if q := b.Spec.Resources.CPUReservation; q != nil {
		r.cpu = q.MilliValue()
	}
	if q := b.Spec.Resources.MemoryReservation; q != nil {
		r.memory = q.Value()
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if r == (amount{}) {
		delete(l.reserved, b.Name)
		return
	}
	l.reserved[b.Name] = r
}

func (l *ledger) reserveGone(obj any) {
	if b, ok := obj.(*atoll.SupervisorNamespace); ok {
		l.mu.Lock()
		defer l.mu.Unlock()
		delete(l.reserved, b.Name)
	}
}

// any tells whether anybody but the namespace has reserved something.
func (l *ledger) others(namespace string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	_, own := l.reserved[namespace]
	return len(l.reserved) > 1 || len(l.reserved) == 1 && !own
}

// fit tells whether a namespace may request more without taking what is reserved for others. A pod that may and is
// named counts from then on.
func (l *ledger) fit(namespace string, more amount, uid types.UID, name string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	used, all := map[string]amount{}, l.all // what is assumed, by namespace
	now := l.now()
	for id, r := range l.assumed {
		if now.After(r.until) {
			delete(l.assumed, id)
			continue
		}
		used[r.namespace] = used[r.namespace].plus(r.amount)
		all = all.plus(r.amount)
	}
	var kept amount
	for ns, reserved := range l.reserved {
		if ns != namespace {
			kept = kept.plus(reserved.minus(l.used[ns].plus(used[ns])).atLeast(amount{}))
		}
	}
	own := l.reserved[namespace]
	mine := l.used[namespace].plus(used[namespace]).plus(more)
	free := l.total.minus(all).minus(kept)
	if more.cpu > 0 && mine.cpu > own.cpu && more.cpu > free.cpu && kept.cpu > 0 {
		return l.beyond("cpu", "cpuReservation", milli(l.total.cpu), milli(all.cpu), milli(kept.cpu), milli(max(free.cpu, 0)), milli(more.cpu), name)
	}
	if more.memory > 0 && mine.memory > own.memory && more.memory > free.memory && kept.memory > 0 {
		return l.beyond("memory", "memoryReservation", binary(l.total.memory), binary(all.memory), binary(kept.memory), binary(max(free.memory, 0)), binary(more.memory), name)
	}
	if r := (request{amount: more, namespace: namespace, until: now.Add(assumedFor)}); uid != "" && l.counts(r) {
		l.assumed[uid] = r
	}
	return nil
}

func (l *ledger) beyond(what, field, total, all, kept, free, asked, name string) error {
	return fmt.Errorf("limit spec.resources.%s of other namespaces: of the %s %s of all hosts, used: %s, kept for others: %s, free: %s; asked: %s for %s",
		field, total, what, all, kept, free, asked, name)
}

func milli(n int64) string { return resource.NewMilliQuantity(n, resource.DecimalSI).String() }

func binary(n int64) string { return resource.NewQuantity(n, resource.BinarySI).String() }

// exempt are the namespaces of the system, which reservations do not bind.
func exempt(namespace string) bool {
	return namespace == metav1.NamespaceSystem || namespace == "atoll-system"
}
