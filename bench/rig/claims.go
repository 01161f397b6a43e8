package rig

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
	VolumeClass    = "atoll-bench"
	EncryptedClass = "atoll-bench-encrypted"
	LateClass      = "atoll-bench-late"
)

// DriverName is what the CSI driver is called.
const DriverName = "csi.atoll.dev"

// keysNamespace is where the product looks for keys.
const keysNamespace = "atoll-keys"

// WithVolumes measures with the policies there, and takes them and all claims away afterwards.
func WithVolumes(run Part) Part {
	return func(ctx context.Context, h *Host) (rows []Row, err error) {
		defer func() {
			end, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Minute)
			defer cancel()
			err = errors.Join(err, h.DeletePods(end), h.DeleteClaims(end), h.removeClasses(end))
		}()
		if err := h.makeClasses(ctx); err != nil {
			return nil, err
		}
		return run(ctx, h)
	}
}

func (h *Host) makeClasses(ctx context.Context) error {
	key := make([]byte, 32)
	if _, err := rand.Read(key); err != nil {
		return err
	}
	secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: EncryptedClass}, Data: map[string][]byte{"a": key}}
	_, err := h.Kube.CoreV1().Secrets(keysNamespace).Create(ctx, secret, metav1.CreateOptions{})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		return fmt.Errorf("making a key: %w", err)
	}
	for name, parameters := range map[string]map[string]string{VolumeClass: nil, LateClass: nil, EncryptedClass: {"encryption": EncryptedClass}} {
		binding := storagev1.VolumeBindingImmediate
		if name == LateClass {
			binding = storagev1.VolumeBindingWaitForFirstConsumer
		}
		class := &storagev1.StorageClass{
			ObjectMeta: metav1.ObjectMeta{Name: name}, Provisioner: DriverName, Parameters: parameters, VolumeBindingMode: &binding,
		}
		_, err := h.Kube.StorageV1().StorageClasses().Create(ctx, class, metav1.CreateOptions{})
		if err != nil && !apierrors.IsAlreadyExists(err) {
			return fmt.Errorf("making storage class %s: %w", name, err)
		}
	}
	return nil
}

func (h *Host) removeClasses(ctx context.Context) error {
	var errs []error
	for _, name := range []string{VolumeClass, LateClass, EncryptedClass} {
		errs = append(errs, ignoreGone(h.Kube.StorageV1().StorageClasses().Delete(ctx, name, metav1.DeleteOptions{})))
	}
	errs = append(errs, ignoreGone(h.Kube.CoreV1().Secrets(keysNamespace).Delete(ctx, EncryptedClass, metav1.DeleteOptions{})))
	return errors.Join(errs...)
}

func ignoreGone(err error) error {
	if apierrors.IsNotFound(err) {
		return nil
	}
	return err
}

// Claim asks for a volume of a class, with a file system or as a block device.
func (h *Host) Claim(ctx context.Context, name, class string, mib int64, block bool) error {
	mode := corev1.PersistentVolumeFilesystem
	if block {
		mode = corev1.PersistentVolumeBlock
	}
	_, err := h.Kube.CoreV1().PersistentVolumeClaims(Namespace).Create(ctx, &corev1.PersistentVolumeClaim{
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

// Bound waits until all claims have their volumes.
func (h *Host) Bound(ctx context.Context) error {
	return Until(ctx, "claims are bound", func() (bool, error) {
		list, err := h.Kube.CoreV1().PersistentVolumeClaims(Namespace).List(ctx, metav1.ListOptions{})
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

// DeleteClaims deletes all claims and waits until their volumes are gone.
func (h *Host) DeleteClaims(ctx context.Context) error {
	claims := h.Kube.CoreV1().PersistentVolumeClaims(Namespace)
	if err := claims.DeleteCollection(ctx, metav1.DeleteOptions{}, metav1.ListOptions{}); err != nil {
		return fmt.Errorf("deleting claims: %w", err)
	}
	return Until(ctx, "volumes are gone", func() (bool, error) {
		list, err := h.Kube.CoreV1().PersistentVolumes().List(ctx, metav1.ListOptions{})
		if err != nil {
			return false, err
		}
		for _, v := range list.Items {
			if v.Spec.ClaimRef != nil && v.Spec.ClaimRef.Namespace == Namespace {
				return false, nil
			}
		}
		return true, nil
	})
}

// Detached waits until no volume is attached, so that the next pod has to do all of it.
func (h *Host) Detached(ctx context.Context) error {
	return Until(ctx, "volumes are detached", func() (bool, error) {
		list, err := h.Kube.StorageV1().VolumeAttachments().List(ctx, metav1.ListOptions{})
		return err == nil && len(list.Items) == 0, err
	})
}
