package importrequest

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	api "atoll.dev/atoll/api/imageregistry/v1alpha1"
)

func newClient(t *testing.T, objects ...client.Object) client.Client {
	t.Helper()
	s := runtime.NewScheme()
	if err := api.AddToScheme(s); err != nil {
		t.Fatal(err)
	}
	return fake.NewClientBuilder().WithScheme(s).WithObjects(objects...).WithStatusSubresource(&api.ContentLibraryItemImportRequest{}, &api.ContentLibraryItem{}).Build()
}

func request(url, library string) *api.ContentLibraryItemImportRequest {
	ttl := int64(60)
	return &api.ContentLibraryItemImportRequest{
		ObjectMeta: metav1.ObjectMeta{Namespace: "team", Name: "r", UID: "u"},
		Spec: api.ContentLibraryItemImportRequestSpec{
			Source:                  api.ContentLibraryItemImportRequestSource{URL: url},
			Target:                  api.ContentLibraryItemImportRequestTarget{Library: api.LocalObjectRef{Name: library}},
			TTLSecondsAfterFinished: &ttl,
		},
	}
}

func library() *api.ContentLibrary {
	return &api.ContentLibrary{ObjectMeta: metav1.ObjectMeta{Namespace: "team", Name: "default"}, Spec: api.ContentLibrarySpec{Writable: true, AllowImport: true}}
}

var key = types.NamespacedName{Namespace: "team", Name: "r"}

func run(t *testing.T, c client.Client, now time.Time) (ctrl.Result, api.ContentLibraryItemImportRequest) {
	t.Helper()
	r := &reconciler{client: c, now: func() time.Time { return now }}
	result, err := r.Reconcile(t.Context(), ctrl.Request{NamespacedName: key})
	if err != nil {
		t.Fatal(err)
	}
	var got api.ContentLibraryItemImportRequest
	if err := c.Get(t.Context(), key, &got); err != nil && !apierrors.IsNotFound(err) {
		t.Fatal(err)
	}
	return result, got
}

// TestImport: the item is made once, followed to its end, and the request goes when its time is over.
func TestImport(t *testing.T) {
	now := time.Now().Truncate(time.Second)
	c := newClient(t, request("https://images.example.com/debian-12.qcow2", "default"), library())
	run(t, c, now)
	_, got := run(t, c, now)
	if got.Status.ItemRef == nil || meta.IsStatusConditionTrue(got.Status.Conditions, api.ImportComplete) || !meta.IsStatusConditionTrue(got.Status.Conditions, api.ImportTargetValid) {
		t.Fatalf("%+v", got.Status)
	}
	var item api.ContentLibraryItem
	if err := c.Get(t.Context(), types.NamespacedName{Namespace: "team", Name: got.Status.ItemRef.Name}, &item); err != nil {
		t.Fatal(err)
	}
	if item.Spec.Name != "debian-12" || item.Spec.Source.HTTP.URL != "https://images.example.com/debian-12.qcow2" || item.Spec.Library != "default" {
		t.Errorf("%+v", item.Spec)
	}
	item.Status.Conditions = []metav1.Condition{{Type: "Ready", Status: metav1.ConditionFalse, Reason: api.ItemChecksum, Message: "wrong"}}
	if err := c.Status().Update(t.Context(), &item); err != nil {
		t.Fatal(err)
	}
	_, got = run(t, c, now)
	if cond := meta.FindStatusCondition(got.Status.Conditions, api.ImportComplete); cond.Reason != api.ImportUploadFailure || got.Status.FileUploadStatus.FileUploads[0].Status != "Error" {
		t.Errorf("%+v", got.Status)
	}
	item.Status.Ready, item.Status.SizeInBytes, item.Status.Conditions = true, resource.MustParse("10"), nil
	if err := c.Status().Update(t.Context(), &item); err != nil {
		t.Fatal(err)
	}
	_, got = run(t, c, now)
	if !meta.IsStatusConditionTrue(got.Status.Conditions, api.ImportComplete) || got.Status.CompletionTime == nil || *got.Status.FileUploadStatus.FileUploads[0].Size != 10 {
		t.Errorf("%+v", got.Status)
	}
	if result, _ := run(t, c, now.Add(10*time.Second)); result.RequeueAfter != 50*time.Second {
		t.Errorf("%+v", result)
	}
	if _, got = run(t, c, now.Add(time.Minute)); got.Name != "" {
		t.Error("it is still there")
	}
}

func TestRefused(t *testing.T) {
	closed := library()
	closed.Spec.AllowImport = false
	taken := &api.ContentLibraryItem{ObjectMeta: metav1.ObjectMeta{Namespace: "team", Name: "x"}, Spec: api.ContentLibraryItemSpec{Name: "a", Library: "default"}}
	sum := request("https://h/a.iso", "default")
	sum.Spec.Source.Checksum = &api.Checksum{Value: "xyz"}
	for reason, objects := range map[string][]client.Object{
		api.ImportSourceURLSchemeInvalid: {request("ftp://h/a", "default"), library()},
		api.ImportSourceURLHostInvalid:   {request("https:///a", "default"), library()},
		api.ImportSourceChecksumInvalid:  {sum, library()},
		api.ImportTargetLibraryInvalid:   {request("https://h/a.iso", "other"), library()},
		api.ImportTargetItemInvalid:      {request("https://h/a.iso", "default"), library(), taken},
	} {
		_, got := run(t, newClient(t, objects...), time.Now())
		if c := meta.FindStatusCondition(got.Status.Conditions, api.ImportComplete); c == nil || c.Reason != reason || c.Message == "" {
			t.Errorf("%s: %+v", reason, got.Status.Conditions)
		}
	}
	if _, got := run(t, newClient(t, request("https://h/a.iso", "default"), closed), time.Now()); meta.FindStatusCondition(got.Status.Conditions, api.ImportTargetValid).Reason != api.ImportTargetLibraryInvalid {
		t.Errorf("%+v", got.Status)
	}
	project := library()
	project.Spec.Registry = &api.RegistryBacking{}
	if _, got := run(t, newClient(t, request("https://h/a.iso", "default"), project), time.Now()); !strings.Contains(meta.FindStatusCondition(got.Status.Conditions, api.ImportTargetValid).Message, "project of the registry") {
		t.Errorf("%+v", got.Status)
	}
}

// TestBeyondAQuota: an item that may not be made is said, and made when it may be.
func TestBeyondAQuota(t *testing.T) {
	refuse := true
	c := interceptor.NewClient(newClient(t, request("https://h/a.iso", "default"), library()).(client.WithWatch), interceptor.Funcs{
		Create: func(ctx context.Context, c client.WithWatch, obj client.Object, opts ...client.CreateOption) error {
			if refuse {
				return apierrors.NewForbidden(schema.GroupResource{Resource: "contentlibraryitems"}, obj.GetName(), errors.New("exceeded quota"))
			}
			return c.Create(ctx, obj, opts...)
		},
	})
	result, got := run(t, c, time.Now())
	for _, kind := range []string{api.ImportItemCreated, api.ImportComplete} {
		if c := meta.FindStatusCondition(got.Status.Conditions, kind); c == nil || c.Status != metav1.ConditionFalse || c.Reason != api.ImportTargetItemCreationFailure || !strings.Contains(c.Message, "exceeded quota") {
			t.Errorf("%s: %+v", kind, c)
		}
	}
	if result.RequeueAfter == 0 {
		t.Error("it is not tried again")
	}
	refuse = false
	if _, got := run(t, c, time.Now()); !meta.IsStatusConditionTrue(got.Status.Conditions, api.ImportItemCreated) {
		t.Errorf("%+v", got.Status.Conditions)
	}
}
