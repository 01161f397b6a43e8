package namespacebounds

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/validation/field"
	"k8s.io/kubernetes/pkg/apis/core"

	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/utils/ptr"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	encryption "atoll.dev/atoll/api/encryption/v1alpha1"
)

// Names in storage that are of other packages, which this one may not import.
const (
	// encryptionParam of a StorageClass makes its volumes encrypted (internal/storage/csi).
	encryptionParam = "encryption"
	// imageAnnotation of a claim is the image that its volume is made of, KIND/NAME (internal/controllers/virtualmachine).
	imageAnnotation = "atoll.dev/image"
	// defaultClass and the older name mark the StorageClass of claims that name none.
	defaultClass      = "storageclass.kubernetes.io/is-default-class"
	olderDefaultClass = "storageclass.beta.kubernetes.io/is-default-class"
)

const (
	limitStorage    = "spec.storageClasses"
	limitEncryption = "spec.encryption"
)

// storageClasses are the names of those a namespace may use.
func storageClasses(b *atoll.SupervisorNamespace) []string {
	out := make([]string, 0, len(b.Spec.StorageClasses))
	for _, c := range b.Spec.StorageClasses {
		out = append(out, c.Name)
	}
	return out
}

// storageClass tells whether a namespace may use a StorageClass.
func storageClass(b *atoll.SupervisorNamespace, class, asked string) error {
	if b.Spec.StorageClasses == nil {
		return nil
	}
	allowed := storageClasses(b)
	if slices.Contains(allowed, class) {
		return nil
	}
	return refuse(b, limitStorage, allowed, asked)
}

// attributes tells whether a volume of a StorageClass may have a VolumeAttributesClass, which replaces the limits of speed
// that the StorageClass has.
func attributes(b *atoll.SupervisorNamespace, class string, asked *string, path string) error {
	if b.Spec.StorageClasses == nil || asked == nil || *asked == "" {
		return nil
	}
	limit := limitStorage
	var allowed []string
	for i, c := range b.Spec.StorageClasses {
		if c.Name == class {
			limit, allowed = fmt.Sprintf("%s[%d].volumeAttributesClasses", limitStorage, i), c.VolumeAttributesClasses
		}
	}
	if slices.Contains(allowed, *asked) {
		return nil
	}
	return refuse(b, limit, allowed, fmt.Sprintf("%s %q", path, *asked))
}

// theDefault is the StorageClass that claims get which name none: of several defaults the newest.
func (p *Plugin) theDefault() string {
	all, err := p.source.storage.List(labels.Everything())
	if err != nil {
		return ""
	}
	var found *storagev1.StorageClass
	for _, c := range all {
		if c.Annotations[defaultClass] != "true" && c.Annotations[olderDefaultClass] != "true" {
			continue
		}
		if found == nil || found.CreationTimestamp.Before(&c.CreationTimestamp) ||
			found.CreationTimestamp.Equal(&c.CreationTimestamp) && c.Name < found.Name {
			found = c
		}
	}
	if found == nil {
		return ""
	}
	return found.Name
}

// encrypts tells whether volumes of a StorageClass are encrypted.
func (p *Plugin) encrypts(class string) bool {
	c, err := p.source.storage.Get(class)
	return err == nil && c.Parameters[encryptionParam] != ""
}

// encrypted tells whether a volume of a class, or with an EncryptionClass of its own, is encrypted as it must be.
func (p *Plugin) encrypted(b *atoll.SupervisorNamespace, class, encryptionClass, what string) error {
	e := b.Spec.Encryption
	does := encryptionClass != "" || p.encrypts(class)
	switch {
	case e.Required && !does:
		return refuseText(b, limitEncryption+".required", "volumes must be encrypted",
			fmt.Sprintf("%s of storage class %q, which does not encrypt, without an EncryptionClass", what, class))
	case e.ClassName != "" && does && encryptionClass != e.ClassName:
		return refuse(b, limitEncryption+".className", []string{e.ClassName}, fmt.Sprintf("%s with EncryptionClass %q", what, encryptionClass))
	}
	return nil
}

// nameEncryption names the EncryptionClass that the volumes of the namespace must have, where a claim names none.
func (p *Plugin) nameEncryption(b *atoll.SupervisorNamespace, claim *core.PersistentVolumeClaim) {
	e := b.Spec.Encryption
	if e.ClassName == "" || claim.Annotations[encryption.ClaimAnnotation] != "" {
		return
	}
	if !e.Required && !p.encrypts(p.classOf(&claim.Spec)) {
		return
	}
	if claim.Annotations == nil {
		claim.Annotations = map[string]string{}
	}
	claim.Annotations[encryption.ClaimAnnotation] = e.ClassName
}

// classOf is the StorageClass of a claim, or the one that it will get.
func (p *Plugin) classOf(spec *core.PersistentVolumeClaimSpec) string {
	if spec.StorageClassName != nil {
		return *spec.StorageClassName
	}
	return p.theDefault()
}

// claim holds a claim to the limits; an old one where something has changed.
func (p *Plugin) claim(ctx context.Context, b *atoll.SupervisorNamespace, claim, old *core.PersistentVolumeClaim) error {
	name, image := claim.Annotations[encryption.ClaimAnnotation], claim.Annotations[imageAnnotation]
	class := p.classOf(&claim.Spec)
	if old == nil || ptr.Deref(old.Spec.VolumeAttributesClassName, "") != ptr.Deref(claim.Spec.VolumeAttributesClassName, "") {
		if err := attributes(b, class, claim.Spec.VolumeAttributesClassName, "spec.volumeAttributesClassName"); err != nil {
			return err
		}
	}
	if old != nil {
		if p.classOf(&old.Spec) == class && old.Annotations[encryption.ClaimAnnotation] == name && old.Annotations[imageAnnotation] == image {
			return nil
		}
		// A claim without a class that waits for one may go on waiting.
		if claim.Spec.StorageClassName == nil && old.Spec.StorageClassName == nil && class == "" {
			return nil
		}
	}
	if class != "" || claim.Spec.StorageClassName != nil {
		if err := storageClass(b, class, fmt.Sprintf("spec.storageClassName %q", class)); err != nil {
			return err
		}
		if err := p.encrypted(b, class, name, "a claim"); err != nil {
			return err
		}
	}
	if image == "" || old != nil && old.Annotations[imageAnnotation] == image {
		return nil
	}
	kind, imageName, _ := strings.Cut(image, "/")
	return p.machineImage(ctx, b, kind, imageName, "annotation "+imageAnnotation+" "+image)
}

// claimSpec holds the template of a claim to the limits. What a claim made of it lacks is filled in then.
func (p *Plugin) claimSpec(b *atoll.SupervisorNamespace, spec *core.PersistentVolumeClaimSpec, annotations map[string]string, path string) error {
	class := p.classOf(spec)
	if err := attributes(b, class, spec.VolumeAttributesClassName, path+" volumeAttributesClassName"); err != nil {
		return err
	}
	if class == "" && spec.StorageClassName == nil {
		return nil
	}
	if err := storageClass(b, class, fmt.Sprintf("%s storageClassName %q", path, class)); err != nil {
		return err
	}
	name := annotations[encryption.ClaimAnnotation]
	if name == "" {
		name = b.Spec.Encryption.ClassName
	}
	return p.encrypted(b, class, name, path)
}

// ephemeralVolumes holds the claims to the limits that a pod makes for itself.
func (p *Plugin) ephemeralVolumes(b *atoll.SupervisorNamespace, pod *core.Pod) error {
	for i, v := range pod.Spec.Volumes {
		if v.Ephemeral == nil || v.Ephemeral.VolumeClaimTemplate == nil {
			continue
		}
		t := v.Ephemeral.VolumeClaimTemplate
		path := field.NewPath("spec", "volumes").Index(i).Child("ephemeral").String()
		if err := p.claimSpec(b, &t.Spec, t.Annotations, path); err != nil {
			return err
		}
	}
	return nil
}
