package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// The policies of volumes in the bench: thin ones as the product makes them, the same encrypted, and one that
// waits for a pod.
const (
	benchClass     = "atoll-bench"
	encryptedClass = "atoll-bench-encrypted"
	lateClass      = "atoll-bench-late"
	keysNamespace  = "atoll-keys"
	driverName     = "csi.atoll.dev"
)

// withVolumes measures with the policies there, and takes them and all claims away afterwards.
func withVolumes(run func(context.Context, *host) ([]Row, error)) func(context.Context, *host) ([]Row, error) {
	return func(ctx context.Context, h *host) (rows []Row, err error) {
		defer func() {
			end, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Minute)
			defer cancel()
			err = errors.Join(err, h.deletePods(end), h.deleteClaims(end), h.removeClasses(end))
		}()
		if err := h.makeClasses(ctx); err != nil {
			return nil, err
		}
		return run(ctx, h)
	}
}

func (h *host) makeClasses(ctx context.Context) error {
	key := make([]byte, 32)
	if _, err := rand.Read(key); err != nil {
		return err
	}
	secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: encryptedClass}, Data: map[string][]byte{"a": key}}
	_, err := h.kube.CoreV1().Secrets(keysNamespace).Create(ctx, secret, metav1.CreateOptions{})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		return fmt.Errorf("making a key: %w", err)
	}
	for name, parameters := range map[string]map[string]string{benchClass: nil, lateClass: nil, encryptedClass: {"encryption": encryptedClass}} {
		binding := storagev1.VolumeBindingImmediate
		if name == lateClass {
			binding = storagev1.VolumeBindingWaitForFirstConsumer
		}
		class := &storagev1.StorageClass{
			ObjectMeta: metav1.ObjectMeta{Name: name}, Provisioner: driverName, Parameters: parameters, VolumeBindingMode: &binding,
		}
		_, err := h.kube.StorageV1().StorageClasses().Create(ctx, class, metav1.CreateOptions{})
		if err != nil && !apierrors.IsAlreadyExists(err) {
			return fmt.Errorf("making storage class %s: %w", name, err)
		}
	}
	return nil
}

func (h *host) removeClasses(ctx context.Context) error {
	var errs []error
	for _, name := range []string{benchClass, lateClass, encryptedClass} {
		errs = append(errs, ignoreGone(h.kube.StorageV1().StorageClasses().Delete(ctx, name, metav1.DeleteOptions{})))
	}
	errs = append(errs, ignoreGone(h.kube.CoreV1().Secrets(keysNamespace).Delete(ctx, encryptedClass, metav1.DeleteOptions{})))
	return errors.Join(errs...)
}

func ignoreGone(err error) error {
	if apierrors.IsNotFound(err) {
		return nil
	}
	return err
}

// claim asks for a volume.
func (h *host) claim(ctx context.Context, name, class string, mib int64, block bool) error {
	mode := corev1.PersistentVolumeFilesystem
	if block {
		mode = corev1.PersistentVolumeBlock
	}
	_, err := h.kube.CoreV1().PersistentVolumeClaims(benchNamespace).Create(ctx, &corev1.PersistentVolumeClaim{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: corev1.PersistentVolumeClaimSpec{
			StorageClassName: &class, VolumeMode: &mode, AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce},
			Resources: corev1.VolumeResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceStorage: *resource.NewQuantity(mib<<20, resource.BinarySI)}},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		return fmt.Errorf("making claim %s: %w", name, err)
	}
	return nil
}

// bound waits until all claims have their volumes.
func (h *host) bound(ctx context.Context) error {
	return until(ctx, "claims are bound", func() (bool, error) {
		list, err := h.kube.CoreV1().PersistentVolumeClaims(benchNamespace).List(ctx, metav1.ListOptions{})
		if err != nil {
			return false, err
		}
		for _, c := range list.Items {
			if c.Status.Phase != corev1.ClaimBound {
				return false, nil
			}
		}
		return true, nil
	})
}

// deleteClaims deletes all claims and waits until their volumes are gone.
func (h *host) deleteClaims(ctx context.Context) error {
	claims := h.kube.CoreV1().PersistentVolumeClaims(benchNamespace)
	if err := claims.DeleteCollection(ctx, metav1.DeleteOptions{}, metav1.ListOptions{}); err != nil {
		return fmt.Errorf("deleting claims: %w", err)
	}
	return until(ctx, "volumes are gone", func() (bool, error) {
		list, err := h.kube.CoreV1().PersistentVolumes().List(ctx, metav1.ListOptions{})
		if err != nil {
			return false, err
		}
		for _, v := range list.Items {
			if v.Spec.ClaimRef != nil && v.Spec.ClaimRef.Namespace == benchNamespace {
				return false, nil
			}
		}
		return true, nil
	})
}

// detached waits until no volume is attached, so that the next pod has to do all of it.
func (h *host) detached(ctx context.Context) error {
	return until(ctx, "volumes are detached", func() (bool, error) {
		list, err := h.kube.StorageV1().VolumeAttachments().List(ctx, metav1.ListOptions{})
		return err == nil && len(list.Items) == 0, err
	})
}

// until waits for five minutes at most.
func until(ctx context.Context, what string, done func() (bool, error)) error {
	var last error
	for range 3000 {
		ok, err := done()
		if ok && err == nil {
			return nil
		}
		last = err
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(100 * time.Millisecond):
		}
	}
	return errors.Join(fmt.Errorf("waiting until %s: five minutes have passed", what), last)
}

// devicePath is where a pod finds a block volume.
const devicePath = "/dev/volume"

// volumePod is a pod that ends when it is told to: one that is deleted by force would be gone before its volume is
// free.
func volumePod(name, runtime string) *corev1.Pod {
	pod, grace := benchPod(name, runtime), int64(10)
	pod.Spec.TerminationGracePeriodSeconds = &grace
	pod.Spec.Containers[0].Command = []string{"sh", "-c", "trap 'exit 0' TERM; sleep 100000 & wait"}
	return pod
}

// withClaim adds a volume to a pod.
func withClaim(pod *corev1.Pod, claim string, block bool) *corev1.Pod {
	c := &pod.Spec.Containers[0]
	pod.Spec.Volumes = append(pod.Spec.Volumes, corev1.Volume{Name: "v", VolumeSource: corev1.VolumeSource{
		PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: claim},
	}})
	if block {
		c.VolumeDevices = append(c.VolumeDevices, corev1.VolumeDevice{Name: "v", DevicePath: devicePath})
	} else {
		c.VolumeMounts = append(c.VolumeMounts, corev1.VolumeMount{Name: "v", MountPath: "/data"})
	}
	return pod
}

// volumeAttach starts the same pod with and without a volume.
func volumeAttach(ctx context.Context, h *host) ([]Row, error) {
	if err := h.claim(ctx, "attach", benchClass, 1<<10, false); err != nil {
		return nil, err
	}
	if err := h.bound(ctx); err != nil {
		return nil, err
	}
	without, with, late := "without", "with", "new"
	samples := map[string][]float64{}
	for i := range h.o.n/2 + 1 {
		for _, kind := range []string{without, with, late} {
			if err := h.fullPool(ctx); err != nil {
				return nil, err
			}
			pod := volumePod(fmt.Sprintf("%s-%d", kind, i), "atoll")
			switch kind {
			case with:
				pod = withClaim(pod, "attach", false)
			case late:
				if err := h.claim(ctx, pod.Name, lateClass, 1<<10, false); err != nil {
					return nil, err
				}
				pod = withClaim(pod, pod.Name, false)
			}
			took, err := h.startPod(ctx, pod, isReady)
			if err != nil {
				return nil, err
			}
			if err := errors.Join(h.deletePods(ctx), h.detached(ctx)); err != nil {
				return nil, err
			}
			if i > 0 { // the first one warms all sides, and makes the file system
				samples[kind] = append(samples[kind], milliseconds(took))
			}
		}
	}
	const against = "the same pod without a volume"
	attach := versus("pod with a volume, create to Ready", "ms", samples[with], against, samples[without])
	attach.Note = fmt.Sprintf("attaching takes %.0f ms, the difference of the medians; the bar is 300", attach.Atoll.P50-attach.Other.P50)
	first := versus("pod with a new claim, create to Ready", "ms", samples[late], against, samples[without])
	first.Note = fmt.Sprintf("the volume is made, attached and formatted: %.0f ms", first.Atoll.P50-first.Other.P50)
	return []Row{attach, first}, nil
}
