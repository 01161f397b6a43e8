package projectlibrary

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/util/workqueue"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	api "atoll.dev/atoll/api/imageregistry/v1alpha1"
)

// world is a registry and an API server.
type world struct {
	*testing.T
	client.Client
	disks  map[string][]Disk
	unseen int
	err    error
	room   int // for items, if not 0
	tried  int // to make one
}

func (w *world) Disks(_ context.Context, project string) ([]Disk, int, error) {
	return slices.Clone(w.disks[project]), w.unseen, w.err
}

func newWorld(t *testing.T, objects ...client.Object) *world {
	t.Helper()
	s := runtime.NewScheme()
	if err := errors.Join(api.AddToScheme(s), vmopv1.AddToScheme(s)); err != nil {
		t.Fatal(err)
	}
	w := &world{T: t, disks: map[string][]Disk{}}
	w.Client = fake.NewClientBuilder().WithScheme(s).WithObjects(objects...).
		WithStatusSubresource(&api.ContentLibrary{}, &api.ClusterContentLibrary{}, &api.ContentLibraryItem{}).WithInterceptorFuncs(interceptor.Funcs{Create: w.create}).Build()
	return w
}

// create has a quota as the API server does.
func (w *world) create(ctx context.Context, c client.WithWatch, obj client.Object, opts ...client.CreateOption) error {
	if w.tried++; w.room > 0 && len(w.items(obj.GetNamespace())) >= w.room {
		return apierrors.NewForbidden(schema.GroupResource{Resource: "contentlibraryitems"}, obj.GetName(), errors.New("exceeded quota: atoll"))
	}
	return c.Create(ctx, obj, opts...)
}

func backed(namespace, name, project string) *api.ContentLibrary {
	return &api.ContentLibrary{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name},
		Spec:       api.ContentLibrarySpec{Registry: &api.RegistryBacking{Project: project}},
	}
}

// run looks at a project and returns what its namespace has, as NAME=SOURCE.
func (w *world) run(project string) []string {
	w.Helper()
	r := &reconciler{client: w.Client, registry: w}
	if _, err := r.Reconcile(w.Context(), request(project)); err != nil {
		w.Fatal(err)
	}
	return w.items(project)
}

func (w *world) items(namespace string) []string {
	w.Helper()
	var list api.ContentLibraryItemList
	if err := w.List(w.Context(), &list, client.InNamespace(namespace)); err != nil {
		w.Fatal(err)
	}
	out := []string{}
	for _, i := range list.Items {
		from := "pushed"
		if i.Spec.Source != nil && i.Spec.Source.OCI != nil {
			from = i.Spec.Source.OCI.Reference
		}
		out = append(out, i.Spec.Name+"="+from)
	}
	slices.Sort(out)
	return out
}

func (w *world) same(got []string, want ...string) {
	w.Helper()
	if !slices.Equal(got, want) && len(got)+len(want) > 0 {
		w.Errorf("items are %v, want %v", got, want)
	}
}

// ready is what a library says of itself.
func (w *world) ready(namespace, name string) string {
	w.Helper()
	var l api.ContentLibrary
	if err := w.Get(w.Context(), client.ObjectKey{Namespace: namespace, Name: name}, &l); err != nil {
		w.Fatal(err)
	}
	c := meta.FindStatusCondition(l.Status.Conditions, api.ReadyCondition)
	if c == nil {
		return ""
	}
	return fmt.Sprintf("%s %s", c.Reason, c.Message)
}

// TestTags: items come, move and go with their tags.
func TestTags(t *testing.T) {
	w := newWorld(t, backed("shop", "registry", ""))
	w.same(w.run("shop"))
	one, two := Disk{Repository: "web", Tag: "latest", Digest: "sha256:1", Firmware: "efi", OS: api.OSInfo{Type: "x"}}, Disk{Repository: "a/db", Tag: "1.0", Digest: "sha256:2"}
	w.disks["shop"] = []Disk{one, two}
	w.disks["bank"] = []Disk{two}
	for range 2 {
		w.same(w.run("shop"), "a/db:1.0=registry.atoll.local/shop/a/db@sha256:2", "web=registry.atoll.local/shop/web@sha256:1")
	}
	var list api.ContentLibraryItemList
	if err := w.List(t.Context(), &list); err != nil || len(list.Items) != 2 {
		t.Fatalf("%v, %v", list.Items, err)
	}
	for _, i := range list.Items {
		if i.Spec.Library != "registry" || (i.Spec.Name == "web") != (i.Spec.Firmware == "efi" && i.Spec.OS.Type == "x") {
			t.Errorf("%+v", i.Spec)
		}
	}
	one.Digest = "sha256:3"
	w.disks["shop"] = []Disk{one}
	w.same(w.run("shop"), "web=registry.atoll.local/shop/web@sha256:3")
	if got := w.ready("shop", "registry"); got != "True " {
		t.Error(got)
	}
	w.err = ErrExternal
	w.same(w.run("shop"), "web=registry.atoll.local/shop/web@sha256:3")
	if got := w.ready("shop", "registry"); !strings.HasPrefix(got, api.LibraryExternal) {
		t.Error(got)
	}
	w.err = errors.New("no disk")
	if _, err := (&reconciler{client: w.Client, registry: w}).Reconcile(t.Context(), request("shop")); err == nil {
		t.Error("it was read")
	}
	w.same(w.items("shop"), "web=registry.atoll.local/shop/web@sha256:3")
	w.err = nil
	if err := w.Delete(t.Context(), backed("shop", "registry", "")); err != nil {
		t.Fatal(err)
	}
	w.same(w.run("shop"))
}

// TestPushed: an item that is being pushed is left alone, and then is the one of its tag.
func TestPushed(t *testing.T) {
	push := &api.ContentLibraryItem{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "publish-1"}, Spec: api.ContentLibraryItemSpec{
		Library: "registry", Name: "web", Push: &api.PushTarget{Repository: "web", Tag: "latest"}, Source: &api.ItemSource{Volume: &api.VolumeSource{Snapshot: "s"}},
	}}
	other := &api.ContentLibraryItem{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "mine"}, Spec: api.ContentLibraryItemSpec{Library: "registry", Name: "mine"}}
	w := newWorld(t, backed("shop", "registry", "shop"), push, other)
	w.same(w.run("shop"), "mine=pushed", "web=pushed")
	w.disks["shop"] = []Disk{{Repository: "web", Tag: "latest", Digest: "sha256:1"}} // the tag is there before the item says so
	w.same(w.run("shop"), "mine=pushed", "web=pushed")
	push.Status.Digest = "sha256:1"
	if err := w.Status().Update(t.Context(), push); err != nil {
		t.Fatal(err)
	}
	w.same(w.run("shop"), "mine=pushed", "web=pushed")
	w.disks["shop"][0].Digest = "sha256:2" // somebody pushes the tag again
	w.same(w.run("shop"), "mine=pushed", "web=registry.atoll.local/shop/web@sha256:2")

	// A push that was refused holds nobody up, and what is there stays.
	refused := push.DeepCopy()
	refused.ResourceVersion, refused.Name, refused.Status = "", "publish-2", api.ContentLibraryItemStatus{}
	if err := w.Create(t.Context(), refused); err != nil {
		t.Fatal(err)
	}
	w.same(w.run("shop"), "mine=pushed", "web=pushed", "web=registry.atoll.local/shop/web@sha256:2")
	meta.SetStatusCondition(&refused.Status.Conditions, metav1.Condition{Type: api.ReadyCondition, Status: metav1.ConditionFalse, Reason: api.ItemPushRefused})
	if err := w.Status().Update(t.Context(), refused); err != nil {
		t.Fatal(err)
	}
	w.disks["shop"][0].Digest = "sha256:3"
	w.same(w.run("shop"), "mine=pushed", "web=pushed", "web=registry.atoll.local/shop/web@sha256:3")
}

// TestPushedByNobody: an item whose request is gone before it has a digest holds no tag and goes; a finished one stays.
func TestPushedByNobody(t *testing.T) {
	request := &vmopv1.VirtualMachinePublishRequest{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "web", UID: "uid-1"}}
	push := &api.ContentLibraryItem{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "publish-1", Labels: map[string]string{api.PublishRequestLabel: "uid-1"}}, Spec: api.ContentLibraryItemSpec{
		Library: "registry", Name: "web", Push: &api.PushTarget{Repository: "web", Tag: "latest"}, Source: &api.ItemSource{Volume: &api.VolumeSource{Snapshot: "s"}},
	}}
	w := newWorld(t, backed("shop", "registry", "shop"), push, request)
	w.disks["shop"] = []Disk{{Repository: "web", Tag: "latest", Digest: "sha256:1"}}
	w.same(w.run("shop"), "web=pushed")
	if err := w.Delete(t.Context(), request); err != nil {
		t.Fatal(err)
	}
	w.same(w.run("shop"), "web=registry.atoll.local/shop/web@sha256:1")
	done := push.DeepCopy()
	done.ResourceVersion, done.Name = "", "publish-2"
	if err := w.Create(t.Context(), done); err != nil {
		t.Fatal(err)
	}
	done.Status.Digest = "sha256:1"
	if err := w.Status().Update(t.Context(), done); err != nil {
		t.Fatal(err)
	}
	w.same(w.run("shop"), "web=pushed")
}

// TestTooMany: a library has the newest disks, and says that there are more.
func TestTooMany(t *testing.T) {
	w := newWorld(t, backed("shop", "registry", ""))
	for i := range maxItems + 3 {
		w.disks["shop"] = append(w.disks["shop"], Disk{Repository: "web", Tag: fmt.Sprint(i), Digest: fmt.Sprintf("sha256:%d", i), Pushed: time.Unix(int64(i), 0)})
	}
	complete := func() string {
		var l api.ContentLibrary
		if err := w.Get(t.Context(), client.ObjectKey{Namespace: "shop", Name: "registry"}, &l); err != nil {
			t.Fatal(err)
		}
		if c := meta.FindStatusCondition(l.Status.Conditions, api.CompleteCondition); c != nil {
			return c.Reason + " " + c.Message
		}
		return ""
	}
	w.unseen = 7
	got := w.run("shop")
	if len(got) != maxItems || slices.ContainsFunc(got, func(i string) bool { return strings.HasPrefix(i, "web:2=") }) || !slices.ContainsFunc(got, func(i string) bool { return strings.HasPrefix(i, "web:3=") }) {
		t.Errorf("%d items: %v", len(got), got)
	}
	if got := complete(); !strings.HasPrefix(got, "TooManyTags 3 older tags") || !strings.Contains(got, "7 older tags were not looked at") || !strings.Contains(got, "atoll registry rm") {
		t.Error(got)
	}
	if got := w.ready("shop", "registry"); got != "True " {
		t.Error(got)
	}
	w.disks["shop"], w.unseen = w.disks["shop"][:2], 0
	if got := w.run("shop"); len(got) != 2 || complete() != "" {
		t.Errorf("%v, %s", got, complete())
	}
}

// TestQuota: items that are refused are no error to repeat at once, and the library says so.
func TestQuota(t *testing.T) {
	w := newWorld(t, backed("shop", "registry", ""))
	for i := range 5 {
		w.disks["shop"] = append(w.disks["shop"], Disk{Repository: "web", Tag: fmt.Sprint(i), Digest: fmt.Sprintf("sha256:%d", i)})
	}
	w.room = 2
	r := &reconciler{client: w.Client, registry: w}
	again, err := r.Reconcile(t.Context(), request("shop"))
	if err != nil || again.RequeueAfter != retryEvery || w.tried != 3 {
		t.Errorf("%v, %v, tried %d times", again, err, w.tried)
	}
	if got := w.ready("shop", "registry"); !strings.HasPrefix(got, "ItemsRefused 3 tags") || !strings.Contains(got, "exceeded quota") || !strings.Contains(got, "contentLibraryItemCount") {
		t.Error(got)
	}
	w.room = 0
	if got := w.run("shop"); len(got) != 5 || w.ready("shop", "registry") != "True " {
		t.Errorf("%v, %s", got, w.ready("shop", "registry"))
	}
}

// TestMatters: the progress of an item is nothing to look at a project for.
func TestMatters(t *testing.T) {
	was := &api.ContentLibraryItem{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "a", Generation: 1}, Spec: api.ContentLibraryItemSpec{Push: &api.PushTarget{}}}
	for name, tt := range map[string]struct {
		change func(*api.ContentLibraryItem)
		want   bool
	}{
		"progress": {func(i *api.ContentLibraryItem) {
			meta.SetStatusCondition(&i.Status.Conditions, metav1.Condition{Type: api.ReadyCondition, Status: metav1.ConditionFalse, Reason: api.ItemPushing, Message: "5 of 10 bytes"})
		}, false},
		"refused": {func(i *api.ContentLibraryItem) {
			meta.SetStatusCondition(&i.Status.Conditions, metav1.Condition{Type: api.ReadyCondition, Status: metav1.ConditionFalse, Reason: api.ItemPushRefused})
		}, true},
		"pushed":  {func(i *api.ContentLibraryItem) { i.Status.Digest = "sha256:1" }, true},
		"spec":    {func(i *api.ContentLibraryItem) { i.Generation = 2 }, true},
		"deleted": {func(i *api.ContentLibraryItem) { i.DeletionTimestamp = &metav1.Time{} }, true},
		"tag":     {func(i *api.ContentLibraryItem) { i.Annotations = map[string]string{api.TagAnnotation: "web:1"} }, true},
	} {
		is := was.DeepCopy()
		tt.change(is)
		if got := matters(was, is); got != tt.want {
			t.Errorf("%s: %v", name, got)
		}
	}
	library := backed("shop", "registry", "")
	written := library.DeepCopy()
	meta.SetStatusCondition(&written.Status.Conditions, metav1.Condition{Type: api.ReadyCondition, Status: metav1.ConditionTrue, Reason: "True"})
	if matters(library, written) {
		t.Error("what is written into a library has it looked at again")
	}
}

// TestProjects: a library has its own project and no other, and one library has it.
func TestProjects(t *testing.T) {
	w := newWorld(t, backed("shop", "a", "bank"), backed("shop", "b", ""), backed("shop", "c", "shop"), backed("library", "d", ""),
		&api.ClusterContentLibrary{ObjectMeta: metav1.ObjectMeta{Name: "registry"}, Spec: api.ContentLibrarySpec{Registry: &api.RegistryBacking{Project: "library"}}})
	disk := Disk{Repository: "web", Tag: "1", Digest: "sha256:1"}
	w.disks["bank"], w.disks["shop"], w.disks["library"] = []Disk{disk, disk}, []Disk{disk}, []Disk{disk}
	w.same(w.run("shop"), "web:1=registry.atoll.local/shop/web@sha256:1")
	w.same(w.run("library"))
	for name, want := range map[string]string{"a": `ProjectInvalid spec.registry.project "bank"`, "b": "True ", "c": "ProjectTaken project shop is the content of library b"} {
		if got := w.ready("shop", name); !strings.HasPrefix(got, want) {
			t.Errorf("library %s: %s", name, got)
		}
	}
	if got := w.ready("library", "d"); !strings.Contains(got, "ClusterContentLibrary registry") {
		t.Error(got)
	}
	var list api.ClusterContentLibraryItemList
	if err := w.List(t.Context(), &list); err != nil || len(list.Items) != 1 || list.Items[0].Spec.Source.OCI.Reference != "registry.atoll.local/library/web@sha256:1" {
		t.Errorf("%v, %v", list.Items, err)
	}
}

// TestChanges: who is told before the controller runs is no trouble, and after it a project is looked at.
func TestChanges(t *testing.T) {
	var c Changes
	c.Tell("shop")
	q := workqueue.NewTypedRateLimitingQueue(workqueue.DefaultTypedControllerRateLimiter[reconcile.Request]())
	if err := c.start(t.Context(), q); err != nil {
		t.Fatal(err)
	}
	c.Tell("bank")
	if got, _ := q.Get(); got != request("bank") || q.Len() != 0 {
		t.Errorf("%v", got)
	}
	for _, o := range []client.Object{&api.ContentLibrary{}, &api.ContentLibraryItem{}, &api.ClusterContentLibrary{}, &api.ClusterContentLibraryItem{}} {
		if got := projectOf(t.Context(), o); got != nil {
			t.Errorf("%T: %v", o, got)
		}
	}
	if got := projectOf(t.Context(), backed("shop", "x", "")); len(got) != 1 || got[0] != request("shop") {
		t.Errorf("%v", got)
	}
}
