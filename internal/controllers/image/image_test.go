package image

import (
	"strings"
	"testing"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"

	api "atoll.dev/atoll/api/imageregistry/v1alpha1"
)

func newClient(t *testing.T, objects ...client.Object) client.Client {
	t.Helper()
	s := runtime.NewScheme()
	if err := api.AddToScheme(s); err != nil {
		t.Fatal(err)
	}
	if err := vmopv1.AddToScheme(s); err != nil {
		t.Fatal(err)
	}
	return fake.NewClientBuilder().WithScheme(s).WithObjects(objects...).
		WithStatusSubresource(&api.ContentLibraryItem{}, &api.ClusterContentLibraryItem{}, &vmopv1.VirtualMachineImage{}, &vmopv1.ClusterVirtualMachineImage{}).Build()
}

// reconcile runs the controller once more than needed.
func reconcile(t *testing.T, r *reconciler, namespace, name string) {
	t.Helper()
	for range 2 {
		if _, err := r.Reconcile(t.Context(), ctrl.Request{NamespacedName: types.NamespacedName{Namespace: namespace, Name: name}}); err != nil {
			t.Fatal(err)
		}
	}
}

// TestItemToImage: an item has an image from its beginning, which becomes ready with it and says what it has.
func TestItemToImage(t *testing.T) {
	uuid := types.UID("5ba6d36d-0d6c-4f3e-a6d6-1b5a0e1a2b3c")
	item := &api.ContentLibraryItem{
		ObjectMeta: metav1.ObjectMeta{Namespace: "team", Name: "debian", UID: "u1"},
		Spec:       api.ContentLibraryItemSpec{UUID: uuid, Name: "Debian 12", OS: api.OSInfo{Type: "otherGuest"}},
		Status: api.ContentLibraryItemStatus{Name: "Debian 12", Conditions: []metav1.Condition{
			{Type: "Ready", Status: metav1.ConditionFalse, Reason: api.ItemTransferring, Message: "5 of 10 bytes"},
		}},
	}
	c := newClient(t, item)
	r := &reconciler{client: c}
	reconcile(t, r, "team", "debian")
	var image vmopv1.VirtualMachineImage
	key := types.NamespacedName{Namespace: "team", Name: api.ImageName(uuid)}
	if err := c.Get(t.Context(), key, &image); err != nil {
		t.Fatal(err)
	}
	ready := image.Status.Conditions[0]
	if ready.Status != metav1.ConditionFalse || ready.Reason != "VirtualMachineImageProviderNotReady" || ready.Message != "Transferring: 5 of 10 bytes" ||
		image.Status.Name != "Debian 12" || image.Spec.ProviderRef.Name != "debian" || image.OwnerReferences[0].UID != "u1" || !strings.HasPrefix(image.Name, "vmi-") || len(image.Name) != 21 {
		t.Errorf("%+v", image)
	}

	if err := c.Get(t.Context(), client.ObjectKeyFromObject(item), item); err != nil {
		t.Fatal(err)
	}
	value := "linux"
	item.Status = api.ContentLibraryItemStatus{
		Name: "Debian 12", Ready: true, Type: api.ItemOVF, ContentVersion: "abc", SizeInBytes: resource.MustParse("1Gi"),
		Disks: []api.ItemDisk{{Name: "disk-0", Format: "vmdk", Capacity: resource.MustParse("10Gi"), ControllerType: "SCSI", UnitNumber: 2}},
		Hardware: &api.ItemHardware{
			Firmware: "efi", Version: 19, OS: api.OSInfo{ID: "96", Type: "debian12_64Guest", Version: "12 (bookworm)"}, Product: api.ItemProduct{Version: "1.2"},
			Properties: []api.ItemProperty{
				{Key: "hostname", Type: "string", UserConfigurable: true},
				{Key: "vmware-system.x", Default: &value},
				{Key: capabilitiesProperty, Default: new("cloud-init, nvidia-gpu, b@d")},
			},
		},
	}
	if err := c.Status().Update(t.Context(), item); err != nil {
		t.Fatal(err)
	}
	reconcile(t, r, "team", "debian")
	if err := c.Get(t.Context(), key, &image); err != nil {
		t.Fatal(err)
	}
	s := image.Status
	if s.Type != "OVF" || s.Firmware != "efi" || *s.HardwareVersion != 19 || s.ProductInfo.Version != "1.2" || s.ProviderContentVersion != "abc" || s.ProviderItemID != string(uuid) ||
		len(s.OVFProperties) != 1 || len(s.VMwareSystemProperties) != 1 || s.VMwareSystemProperties[0].Value != "linux" || s.Conditions[0].Status != metav1.ConditionTrue || s.Conditions[0].Reason != "True" {
		t.Errorf("%+v", s)
	}
	d := s.Disks[0]
	if d.Limit.String() != "10Gi" || d.Requested.String() != "1Gi" || d.ControllerType != vmopv1.VirtualControllerTypeSCSI || *d.UnitNumber != 2 {
		t.Errorf("%+v", d)
	}
	want := map[string]string{
		"os.image.vmoperator.vmware.com/id": "96", "os.image.vmoperator.vmware.com/type": "debian12_64Guest", "image.vmoperator.vmware.com/type": "OVF",
		"capability.image.vmoperator.vmware.com/cloud-init": "true", "capability.image.vmoperator.vmware.com/nvidia-gpu": "true",
	}
	if len(image.Labels) != len(want) {
		t.Errorf("%v", image.Labels)
	}
	for k, v := range want {
		if image.Labels[k] != v {
			t.Errorf("label %s is %q", k, image.Labels[k])
		}
	}
}

func TestClusterImage(t *testing.T) {
	item := &api.ClusterContentLibraryItem{ObjectMeta: metav1.ObjectMeta{Name: "iso", UID: "u2"}, Status: api.ContentLibraryItemStatus{Ready: true, Type: api.ItemISO}}
	c := newClient(t, item)
	reconcile(t, &reconciler{client: c, cluster: true}, "", "iso")
	var image vmopv1.ClusterVirtualMachineImage
	if err := c.Get(t.Context(), types.NamespacedName{Name: api.ImageName("u2")}, &image); err != nil {
		t.Fatal(err)
	}
	if image.Status.Type != "ISO" || image.Status.Name != "iso" || image.Spec.ProviderRef.Kind != "ClusterContentLibraryItem" {
		t.Errorf("%+v", image)
	}
}
