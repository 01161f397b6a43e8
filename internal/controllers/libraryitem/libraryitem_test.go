package libraryitem

import (
	"context"
	"errors"
	"log/slog"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	dynamicfake "k8s.io/client-go/dynamic/fake"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/record"

	api "atoll.dev/atoll/api/imageregistry/v1alpha1"
)

// host brings in what it is told.
type host struct {
	takes   bool
	content Content
	err     error
	guarded bool
	calls   int
}

func (h *host) Takes(*api.ContentLibraryItem) bool { return h.takes }

func (h *host) Bring(_ context.Context, _ *api.ContentLibraryItem, guarded bool, told func(api.ItemProgress)) (Content, error) {
	h.calls++
	h.guarded = guarded
	told(api.ItemProgress{Phase: api.ItemTransferring, BytesDone: 5, BytesTotal: 10})
	return h.content, h.err
}

func (h *host) Forget(context.Context, func(string) bool) error { return nil }

// world is a controller and its one item.
type world struct {
	*testing.T
	c *Controller
	h *host
	k key
}

func newWorld(t *testing.T, namespace string, change func(*api.ContentLibraryItem)) *world {
	t.Helper()
	item := &api.ContentLibraryItem{
		TypeMeta:   metav1.TypeMeta{APIVersion: api.GroupVersion().String(), Kind: "ContentLibraryItem"},
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: "i", UID: "u", Generation: 1, ResourceVersion: "7"},
		Spec:       api.ContentLibraryItemSpec{Library: "default", Source: &api.ItemSource{HTTP: &api.HTTPSource{URL: "https://x/y"}}},
	}
	if namespace == "" {
		item.Kind = "ClusterContentLibraryItem"
	}
	if change != nil {
		change(item)
	}
	content, err := runtime.DefaultUnstructuredConverter.ToUnstructured(item)
	if err != nil {
		t.Fatal(err)
	}
	h := &host{takes: true}
	c, err := New(Config{Client: &rest.Config{Host: "https://127.0.0.1:1"}, Node: "n1", Host: h, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.sink.Shutdown)
	c.events = record.NewFakeRecorder(100)
	c.client = dynamicfake.NewSimpleDynamicClientWithCustomListKinds(runtime.NewScheme(), map[schema.GroupVersionResource]string{
		api.Items(): "ContentLibraryItemList", api.ClusterItems(): "ClusterContentLibraryItemList",
	}, &unstructured.Unstructured{Object: content})
	w := &world{T: t, c: c, h: h, k: key{namespace, "i"}}
	w.refresh()
	return w
}

// refresh brings the informer up to date, and returns the item.
func (w *world) refresh() *api.ContentLibraryItem {
	w.Helper()
	var err error
	var obj *unstructured.Unstructured
	if w.k.namespace == "" {
		obj, err = w.c.client.Resource(w.k.resource()).Get(w.Context(), "i", metav1.GetOptions{})
	} else {
		obj, err = w.c.client.Resource(w.k.resource()).Namespace(w.k.namespace).Get(w.Context(), "i", metav1.GetOptions{})
	}
	if err != nil {
		w.Fatal(err)
	}
	if err := w.c.informers[w.k.resource()].GetStore().Add(obj); err != nil {
		w.Fatal(err)
	}
	item, err := w.c.get(w.k)
	if err != nil {
		w.Fatal(err)
	}
	return item
}

func (w *world) sync() (*api.ContentLibraryItem, time.Duration, error) {
	w.Helper()
	again, err := w.c.sync(w.Context(), w.k)
	return w.refresh(), again, err
}

func reason(item *api.ContentLibraryItem) string {
	if c := meta.FindStatusCondition(item.Status.Conditions, api.ReadyCondition); c != nil {
		return c.Reason
	}
	return ""
}

// TestBring: an item is taken by a host, brought in, and left alone after that.
func TestBring(t *testing.T) {
	for _, namespace := range []string{"", "team"} {
		w := newWorld(t, namespace, nil)
		w.h.content = Content{Type: api.ItemISO, SHA256: "abc", Bytes: 10, FileName: "y", Disks: []api.ItemDisk{{Name: "d", Format: "iso", Capacity: resource.MustParse("1Mi")}}}
		item, _, err := w.sync()
		if err != nil || item.Status.Host != "n1" || item.Status.Ready || w.h.calls != 0 || item.Status.Name != "i" {
			t.Fatalf("%+v, %v", item.Status, err)
		}
		item, _, err = w.sync()
		if err != nil || !item.Status.Ready || item.Status.Type != api.ItemISO || item.Status.Progress != nil || item.Status.SizeInBytes.Value() != 10 || reason(item) != api.ItemReady {
			t.Fatalf("%+v, %v", item.Status, err)
		}
		if w.h.guarded != (namespace != "") {
			t.Errorf("guarded: %t", w.h.guarded)
		}
		if _, again, err := w.sync(); err != nil || again != 0 || w.h.calls != 1 {
			t.Errorf("%d calls, %v, %v", w.h.calls, again, err)
		}
	}
}

// TestFailures: what may go away is tried again, what cannot is not.
func TestFailures(t *testing.T) {
	taken := func(i *api.ContentLibraryItem) { i.Status.Host = "n1" }
	w := newWorld(t, "team", taken)
	w.h.err = errors.New("connection refused")
	if item, _, err := w.sync(); err == nil || reason(item) != api.ItemRetrying {
		t.Errorf("%+v, %v", item.Status, err)
	}
	w.h.err = ErrWaiting
	if item, again, err := w.sync(); err != nil || again != pollUpload || reason(item) != api.ItemUploading || item.Status.Progress == nil || item.Status.Progress.Percent != 50 {
		t.Errorf("%+v, %v", item.Status, err)
	}
	w.h.err = Permanent{Reason: api.ItemChecksum, Err: errors.New("other bytes")}
	if item, again, err := w.sync(); err != nil || again != 0 || reason(item) != api.ItemChecksum || item.Status.Progress != nil {
		t.Errorf("%+v, %v", item.Status, err)
	}
	calls := w.h.calls
	if _, _, err := w.sync(); err != nil || w.h.calls != calls {
		t.Errorf("%d calls, %v", w.h.calls, err)
	}
}

// TestNotOurs: items of other hosts, without a source, or that this host cannot take, are left alone.
func TestNotOurs(t *testing.T) {
	w := newWorld(t, "team", func(i *api.ContentLibraryItem) { i.Status.Host = "n2" })
	if _, _, err := w.sync(); err != nil || w.h.calls != 0 {
		t.Errorf("%d calls, %v", w.h.calls, err)
	}
	w = newWorld(t, "team", func(i *api.ContentLibraryItem) { i.Spec.Source = nil })
	if item, _, err := w.sync(); err != nil || reason(item) != api.ItemSourceBad || item.Status.Host != "" {
		t.Errorf("%+v, %v", item.Status, err)
	}
	w = newWorld(t, "team", nil)
	w.h.takes = false
	if item, again, err := w.sync(); err != nil || again == 0 || item.Status.Host != "" {
		t.Errorf("%+v, %v", item.Status, err)
	}
	if err := w.c.informers[w.k.resource()].GetStore().Replace(nil, ""); err != nil {
		t.Fatal(err)
	}
	if _, err := w.c.sync(t.Context(), w.k); err != nil {
		t.Error(err)
	}
}
