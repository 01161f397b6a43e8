package rollback

import (
	"context"
	"errors"
	"log/slog"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"

	api "atoll.dev/atoll/api/imageregistry/v1alpha1"
)

type host struct {
	err   error
	calls []string
}

func (h *host) Has(handle string) bool { return handle != "elsewhere/v" }
func (h *host) Rollback(_ context.Context, volume, snapshot string) error {
	h.calls = append(h.calls, volume+" "+snapshot)
	return h.err
}

func volume(name, driver, handle string, annotations map[string]string) *corev1.PersistentVolume {
	return &corev1.PersistentVolume{
		ObjectMeta: metav1.ObjectMeta{Name: name, Annotations: annotations},
		Spec: corev1.PersistentVolumeSpec{PersistentVolumeSource: corev1.PersistentVolumeSource{
			CSI: &corev1.CSIPersistentVolumeSource{Driver: driver, VolumeHandle: handle},
		}},
	}
}

// TestRollback: what is asked for is done and said, once; what failed is said.
func TestRollback(t *testing.T) {
	asked := map[string]string{api.RollbackAnnotation: "default/s"}
	client := fake.NewClientset(
		volume("pv", "d", "default/v", asked), volume("foreign", "other", "default/v", asked), volume("away", "d", "elsewhere/v", asked), volume("quiet", "d", "default/q", nil),
		volume("done", "d", "default/d", map[string]string{api.RollbackAnnotation: "default/s", api.RolledBackAnnotation: "default/s"}))
	h := &host{err: errors.New("volume is attached")}
	c, err := newController(Config{Driver: "d", Host: h, Logger: slog.New(slog.DiscardHandler)}, client)
	if err != nil {
		t.Fatal(err)
	}
	list, err := client.CoreV1().PersistentVolumes().List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for n := range list.Items {
		if err := c.informer.GetStore().Add(&list.Items[n]); err != nil {
			t.Fatal(err)
		}
	}
	annotations := func() map[string]string {
		v, err := client.CoreV1().PersistentVolumes().Get(t.Context(), "pv", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return v.Annotations
	}
	for _, name := range []string{"foreign", "away", "quiet", "done", "gone"} {
		if err := c.sync(t.Context(), name); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := c.sync(t.Context(), "pv"); err == nil || annotations()[api.RollbackErrorAnnotation] != "volume is attached" || annotations()[api.RolledBackAnnotation] != "" {
		t.Errorf("%v, %v", err, annotations())
	}
	h.err = nil
	for range 2 { // the second time it is done, though the cache does not know
		if err := c.sync(t.Context(), "pv"); err != nil {
			t.Fatal(err)
		}
	}
	if a := annotations(); a[api.RolledBackAnnotation] != "default/s" || a[api.RollbackErrorAnnotation] != "" || len(h.calls) != 2 || h.calls[1] != "default/v default/s" {
		t.Errorf("%v, %v", a, h.calls)
	}
}
