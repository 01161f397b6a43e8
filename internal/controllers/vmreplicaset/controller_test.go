package vmreplicaset

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	"github.com/vmware-tanzu/vm-operator/api/v1alpha5/common"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/tools/events"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	"atoll.dev/atoll/internal/controllers/condition"
)

type world struct {
	*testing.T
	Reconciler
	// refuse makes machines impossible to create.
	refuse error
}

func newWorld(t *testing.T, objects ...client.Object) *world {
	t.Helper()
	scheme := runtime.NewScheme()
	if err := errors.Join(vmopv1.AddToScheme(scheme), corev1.AddToScheme(scheme)); err != nil {
		t.Fatal(err)
	}
	w := &world{T: t}
	names := 0
	w.Client = fake.NewClientBuilder().WithScheme(scheme).WithObjects(objects...).
		WithStatusSubresource(&vmopv1.VirtualMachineReplicaSet{}, &vmopv1.VirtualMachine{}).
		WithInterceptorFuncs(interceptor.Funcs{Create: func(ctx context.Context, c client.WithWatch, o client.Object, opts ...client.CreateOption) error {
			if w.refuse != nil {
				return w.refuse
			}
			names++
			o.SetName(fmt.Sprintf("%s%05d", o.GetGenerateName(), names))
			return c.Create(ctx, o, opts...)
		}}).Build()
	w.Reader, w.Events = w.Client, events.NewFakeRecorder(1000)
	return w
}

func set(replicas int32) *vmopv1.VirtualMachineReplicaSet {
	return &vmopv1.VirtualMachineReplicaSet{
		ObjectMeta: metav1.ObjectMeta{Namespace: "team", Name: "web", UID: "set-uid", Generation: 3},
		Spec: vmopv1.VirtualMachineReplicaSetSpec{
			Replicas: &replicas,
			Selector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "web"}},
			Template: vmopv1.VirtualMachineTemplateSpec{
				ObjectMeta: common.ObjectMeta{Labels: map[string]string{"app": "web", "tier": "front"}, Annotations: map[string]string{"a": "b"}},
				Spec:       vmopv1.VirtualMachineSpec{ClassName: "best-effort-small"},
			},
		},
	}
}

// settle reconciles until nothing is left to do at once.
func (w *world) settle() (*vmopv1.VirtualMachineReplicaSet, error) {
	w.Helper()
	key := client.ObjectKey{Namespace: "team", Name: "web"}
	var result ctrl.Result
	var err error
	for range 10 {
		result, err = w.Reconcile(w.Context(), ctrl.Request{NamespacedName: key})
		if err != nil || result.RequeueAfter == 0 {
			break
		}
	}
	if err == nil { // what a watch would have caused
		_, err = w.Reconcile(w.Context(), ctrl.Request{NamespacedName: key})
	}
	rs := &vmopv1.VirtualMachineReplicaSet{}
	if getErr := w.Get(w.Context(), key, rs); getErr != nil {
		w.Fatal(getErr)
	}
	return rs, err
}

func (w *world) machines() []vmopv1.VirtualMachine {
	w.Helper()
	var list vmopv1.VirtualMachineList
	if err := w.List(w.Context(), &list, client.InNamespace("team")); err != nil {
		w.Fatal(err)
	}
	return list.Items
}

func (w *world) resize(replicas int32) {
	w.Helper()
	rs := &vmopv1.VirtualMachineReplicaSet{}
	if err := w.Get(w.Context(), client.ObjectKey{Namespace: "team", Name: "web"}, rs); err != nil {
		w.Fatal(err)
	}
	rs.Spec.Replicas = &replicas
	if err := w.Update(w.Context(), rs); err != nil {
		w.Fatal(err)
	}
}

func TestScale(t *testing.T) {
	w := newWorld(t, set(45)) // more than two batches
	rs, err := w.settle()
	if err != nil || rs.Status.Replicas != 45 || rs.Status.FullyLabeledReplicas != 45 || rs.Status.ReadyReplicas != 0 || rs.Status.ObservedGeneration != 3 {
		t.Fatalf("%+v, %v", rs.Status, err)
	}
	if !condition.IsTrue(rs.Status.Conditions, vmopv1.ResizedCondition) || !condition.IsTrue(rs.Status.Conditions, vmopv1.VirtualMachinesCreatedCondition) {
		t.Errorf("conditions %+v", rs.Status.Conditions)
	}
	if c := condition.Get(rs.Status.Conditions, vmopv1.VirtualMachinesReadyCondition); c.Status != metav1.ConditionFalse || !strings.Contains(c.Message, "0 of 45") {
		t.Errorf("%+v", c)
	}
	vm := w.machines()[0]
	if vm.Labels[vmopv1.VirtualMachineReplicaSetNameLabel] != "web" || vm.Labels["tier"] != "front" || vm.Annotations["a"] != "b" ||
		vm.Spec.ClassName != "best-effort-small" || !metav1.IsControlledBy(&vm, rs) {
		t.Errorf("%+v", vm)
	}
	w.resize(0)
	if rs, err = w.settle(); err != nil || rs.Status.Replicas != 0 || len(w.machines()) != 0 {
		t.Errorf("%+v, %v, %d machines", rs.Status, err, len(w.machines()))
	}
	if !condition.IsTrue(rs.Status.Conditions, vmopv1.VirtualMachinesReadyCondition) {
		t.Errorf("conditions %+v", rs.Status.Conditions)
	}
}

// TestReadyStay: those that are not ready go first.
func TestReadyStay(t *testing.T) {
	w := newWorld(t, set(3))
	if _, err := w.settle(); err != nil {
		t.Fatal(err)
	}
	good := w.machines()[1]
	good.Status.PowerState = vmopv1.VirtualMachinePowerStateOn
	good.Status.Network = &vmopv1.VirtualMachineNetworkStatus{PrimaryIP4: "10.244.0.9"}
	if err := w.Status().Update(t.Context(), &good); err != nil {
		t.Fatal(err)
	}
	w.resize(1)
	rs, err := w.settle()
	if left := w.machines(); err != nil || len(left) != 1 || left[0].Name != good.Name || rs.Status.ReadyReplicas != 1 {
		t.Errorf("%v left, %+v, %v", left, rs.Status, err)
	}
}

func TestAdoptAndRelease(t *testing.T) {
	orphan := &vmopv1.VirtualMachine{ObjectMeta: metav1.ObjectMeta{Namespace: "team", Name: "orphan", Labels: map[string]string{"app": "web"}}}
	foreign := &vmopv1.VirtualMachine{ObjectMeta: metav1.ObjectMeta{
		Namespace: "team", Name: "foreign", Labels: map[string]string{"app": "web"},
		OwnerReferences: []metav1.OwnerReference{{APIVersion: "v1", Kind: "X", Name: "x", UID: "x", Controller: new(true)}},
	}}
	w := newWorld(t, set(2), orphan, foreign)
	rs, err := w.settle()
	if err != nil || len(w.machines()) != 3 || rs.Status.Replicas != 2 || rs.Status.FullyLabeledReplicas != 1 {
		t.Fatalf("%d machines, %+v, %v", len(w.machines()), rs.Status, err)
	}
	adopted := &vmopv1.VirtualMachine{}
	if err := w.Get(t.Context(), client.ObjectKeyFromObject(orphan), adopted); err != nil || !metav1.IsControlledBy(adopted, rs) {
		t.Fatalf("%+v, %v", adopted, err)
	}
	adopted.Labels = map[string]string{"app": "other"}
	if err := w.Update(t.Context(), adopted); err != nil {
		t.Fatal(err)
	}
	if rs, err = w.settle(); err != nil || rs.Status.Replicas != 2 || len(w.machines()) != 4 {
		t.Errorf("%d machines, %+v, %v", len(w.machines()), rs.Status, err)
	}
	if err := w.Get(t.Context(), client.ObjectKeyFromObject(orphan), adopted); err != nil || metav1.GetControllerOf(adopted) != nil {
		t.Errorf("%+v, %v", adopted, err)
	}
}

func TestRefused(t *testing.T) {
	w := newWorld(t, set(2))
	w.refuse = errors.New("exceeded quota: gold")
	rs, err := w.settle()
	if err == nil {
		t.Error("not tried again")
	}
	failure, created := condition.Get(rs.Status.Conditions, vmopv1.VirtualMachineReplicaSetReplicaFailure), condition.Get(rs.Status.Conditions, vmopv1.VirtualMachinesCreatedCondition)
	if failure.Status != metav1.ConditionTrue || !strings.Contains(failure.Message, "exceeded quota") || created.Reason != vmopv1.VirtualMachineCreationFailedReason {
		t.Errorf("%+v, %+v", failure, created)
	}
	w.refuse = nil
	if rs, err = w.settle(); err != nil || condition.Get(rs.Status.Conditions, vmopv1.VirtualMachineReplicaSetReplicaFailure) != nil {
		t.Errorf("%+v, %v", rs.Status.Conditions, err)
	}
}

func TestBadSelector(t *testing.T) {
	for name, change := range map[string]func(*vmopv1.VirtualMachineReplicaSet){
		"spec.selector is empty": func(rs *vmopv1.VirtualMachineReplicaSet) { rs.Spec.Selector = nil },
		"does not match":         func(rs *vmopv1.VirtualMachineReplicaSet) { rs.Spec.Template.Labels = nil },
		"is not a valid":         func(rs *vmopv1.VirtualMachineReplicaSet) { rs.Spec.Selector.MatchLabels["a b"] = "" },
	} {
		bad := set(2)
		change(bad)
		w := newWorld(t, bad)
		rs, err := w.settle()
		c := condition.Get(rs.Status.Conditions, vmopv1.VirtualMachineReplicaSetReplicaFailure)
		if err != nil || c == nil || c.Reason != reasonInvalid || !strings.Contains(c.Message, name) && name != "is not a valid" || len(w.machines()) > 0 {
			t.Errorf("%s: %+v, %v", name, c, err)
		}
	}
}

func TestLabelValue(t *testing.T) {
	long := strings.Repeat("a", 100)
	if labelValue("web") != "web" || len(labelValue(long)) != 63 || labelValue(long) == labelValue(long+"b") {
		t.Errorf("%q", labelValue(long))
	}
}
