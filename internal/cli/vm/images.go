package vm

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// imageEntry is an image that a virtual machine can be made of.
type imageEntry struct {
	kind, name string
	// display is the name that people use.
	display string
	iso     bool
	ready   *metav1.Condition
}

// images lists those of the namespace and of the cluster. With an error it returns what it found.
func (s *session) images(ctx context.Context) ([]imageEntry, error) {
	var out []imageEntry
	entry := func(kind, name string, st vmopv1.VirtualMachineImageStatus) imageEntry {
		e := imageEntry{kind: kind, name: name, display: cmp.Or(st.Name, name), iso: strings.EqualFold(st.Type, "ISO")}
		if i := slices.IndexFunc(st.Conditions, func(c metav1.Condition) bool { return c.Type == vmopv1.ReadyConditionType }); i >= 0 {
			e.ready = &st.Conditions[i]
		}
		return e
	}
	var own vmopv1.VirtualMachineImageList
	err := s.List(ctx, &own, client.InNamespace(s.namespace))
	for _, i := range own.Items {
		out = append(out, entry("VirtualMachineImage", i.Name, i.Status))
	}
	var all vmopv1.ClusterVirtualMachineImageList
	err = errors.Join(err, s.List(ctx, &all))
	for _, i := range all.Items {
		out = append(out, entry("ClusterVirtualMachineImage", i.Name, i.Status))
	}
	return out, err
}

// image finds an image by its name or display name; one of the namespace comes first. An image that cannot be looked up
// is left for the API server to judge.
func (s *session) image(ctx context.Context, want string) (imageEntry, error) {
	list, err := s.images(ctx)
	var names []string
	for _, match := range []func(imageEntry) bool{
		func(e imageEntry) bool { return e.name == want },
		func(e imageEntry) bool { return e.display == want && e.kind == "VirtualMachineImage" },
		func(e imageEntry) bool { return e.display == want },
	} {
		var found []imageEntry
		for _, e := range list {
			if match(e) {
				found = append(found, e)
			}
		}
		switch {
		case len(found) == 1:
			return found[0], nil
		case len(found) > 1:
			for _, e := range found {
				names = append(names, e.name)
			}
			return imageEntry{}, fmt.Errorf("image %q is the name of several: say which one by %s", want, strings.Join(names, " or "))
		}
	}
	if err != nil {
		return imageEntry{name: want, display: want}, nil //nolint:nilerr // images that may not be listed may still be used
	}
	for _, e := range list {
		names = append(names, e.display)
	}
	slices.Sort(names)
	if len(names) == 0 {
		return imageEntry{}, fmt.Errorf("there is no image %q, and no other one; `atoll image import` brings one in", want)
	}
	return imageEntry{}, fmt.Errorf("there is no image %q; there are: %s", want, strings.Join(slices.Compact(names), ", "))
}

// defaultStorageClass is the one that claims get that name none.
func (s *session) defaultStorageClass(ctx context.Context) (string, error) {
	var list storagev1.StorageClassList
	if err := s.List(ctx, &list); err != nil {
		return "", fmt.Errorf("looking for the default storage class: %w; name one with --storage-class", err)
	}
	var names []string
	for _, c := range list.Items {
		if c.Annotations["storageclass.kubernetes.io/is-default-class"] == "true" {
			return c.Name, nil
		}
		names = append(names, c.Name)
	}
	return "", fmt.Errorf("no storage class is the default one; name one of these with --storage-class: %s", strings.Join(names, ", "))
}
