// Package deletion says what is in a Namespace that keeps it from being deleted.
//
// It looks past all caches, and only at names: what counts are the things that somebody runs or has data in, and what
// makes such things. ConfigMaps, Secrets and the like do not count. The controller of SupervisorNamespaces and the webhook
// of Namespaces call it. What can go wrong: the API server does not answer.
package deletion

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// most is how many names are said of each kind.
const most = 5

// Kinds are the kinds of things that count.
func Kinds() []schema.GroupVersionKind {
	kind := func(group, version, kind string) schema.GroupVersionKind {
		return schema.GroupVersionKind{Group: group, Version: version, Kind: kind}
	}
	return []schema.GroupVersionKind{
		kind("", "v1", "Pod"),
		kind("vmoperator.vmware.com", "v1alpha5", "VirtualMachine"),
		kind("", "v1", "PersistentVolumeClaim"),
		kind("", "v1", "Service"),
		kind("apps", "v1", "Deployment"),
		kind("apps", "v1", "StatefulSet"),
		kind("apps", "v1", "DaemonSet"),
		kind("batch", "v1", "CronJob"),
		kind("batch", "v1", "Job"),
		kind("vmoperator.vmware.com", "v1alpha5", "VirtualMachineReplicaSet"),
		kind("vmoperator.vmware.com", "v1alpha5", "VirtualMachineSnapshot"),
		kind("snapshot.storage.k8s.io", "v1", "VolumeSnapshot"),
		kind("imageregistry.vmware.com", "v1alpha1", "ContentLibraryItem"),
	}
}

// Left are the objects of one kind that are there.
type Left struct {
	Kind  string
	Names []string
	// Finalizers are those of objects that are being deleted, by name.
	Finalizers map[string][]string
}

// Contents lists what is in a Namespace, kind by kind.
func Contents(ctx context.Context, live client.Reader, namespace string) ([]Left, error) {
	var out []Left
	for _, kind := range Kinds() {
		list := &metav1.PartialObjectMetadataList{}
		list.SetGroupVersionKind(kind.GroupVersion().WithKind(kind.Kind + "List"))
		if err := live.List(ctx, list, client.InNamespace(namespace)); err != nil {
			if meta.IsNoMatchError(err) {
				continue
			}
			return nil, fmt.Errorf("listing what is in namespace %s, kind %s: %w", namespace, kind.Kind, err)
		}
		if len(list.Items) == 0 {
			continue
		}
		left := Left{Kind: kind.Kind, Finalizers: map[string][]string{}}
		for _, o := range list.Items {
			left.Names = append(left.Names, o.Name)
			if o.DeletionTimestamp != nil && len(o.Finalizers) > 0 {
				left.Finalizers[o.Name] = o.Finalizers
			}
		}
		slices.Sort(left.Names)
		out = append(out, left)
	}
	return out, nil
}

// String is such as 3 Pods (a, b, c).
func (l Left) String() string {
	names := l.Names
	text := ""
	if len(names) > most {
		names, text = names[:most], ", ..."
	}
	kind := l.Kind
	if len(l.Names) != 1 {
		kind += "s"
	}
	return fmt.Sprintf("%d %s (%s%s)", len(l.Names), kind, strings.Join(names, ", "), text)
}

// Stuck says which objects wait for which finalizers.
func (l Left) Stuck() []string {
	var out []string
	for _, name := range l.Names {
		if f := l.Finalizers[name]; len(f) > 0 && len(out) < most {
			out = append(out, fmt.Sprintf("%s %s waits for finalizer %s", l.Kind, name, strings.Join(f, ", ")))
		}
	}
	return out
}

// Strings are all of them as text.
func Strings(list []Left) []string {
	var out []string
	for _, l := range list {
		out = append(out, l.String())
	}
	return out
}
