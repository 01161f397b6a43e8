package supervisornamespace

import (
	"context"
	"fmt"
	"slices"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"sigs.k8s.io/controller-runtime/pkg/client"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	encryption "atoll.dev/atoll/api/encryption/v1alpha1"
	imageregistry "atoll.dev/atoll/api/imageregistry/v1alpha1"
	"atoll.dev/atoll/internal/controllers/supervisornamespace/expand"
	"atoll.dev/atoll/internal/controllers/virtualmachineclass"
)

// lookup collects what a spec names and does not exist.
type lookup struct {
	r       *Reconciler
	unknown []string
}

// exists looks an object up and notes when there is none.
func (l *lookup) exists(ctx context.Context, field, name string, key client.ObjectKey, obj client.Object) error {
	err := l.r.Shared.Get(ctx, key, obj)
	if apierrors.IsNotFound(err) {
		l.missing(field, name)
		return nil
	}
	if err != nil {
		return fmt.Errorf("looking up %s of %s: %w", name, field, err)
	}
	return nil
}

func (l *lookup) missing(field, name string) {
	l.unknown = append(l.unknown, fmt.Sprintf("%s: %s does not exist", field, name))
}

// references looks up what a spec names, and fills in the classes that are known.
func (r *Reconciler) references(ctx context.Context, sn *atoll.SupervisorNamespace, in *expand.Input) (unknown []string, err error) {
	l := &lookup{r: r}
	spec := in.Spec
	for i, c := range spec.StorageClasses {
		if err := l.exists(ctx, fmt.Sprintf("spec.storageClasses[%d]", i), "StorageClass "+c.Name, client.ObjectKey{Name: c.Name}, &storagev1.StorageClass{}); err != nil {
			return nil, err
		}
	}
	for i, s := range spec.ContentSources {
		key, obj := client.ObjectKey{Name: s.Name}, client.Object(&imageregistry.ClusterContentLibrary{})
		if s.Type == "ContentLibrary" {
			key, obj = client.ObjectKey{Namespace: sn.Name, Name: s.Name}, &imageregistry.ContentLibrary{}
		}
		if err := l.exists(ctx, fmt.Sprintf("spec.contentSources[%d]", i), s.Type+" "+s.Name, key, obj); err != nil {
			return nil, err
		}
	}
	for i, h := range spec.Hosts {
		if err := l.exists(ctx, fmt.Sprintf("spec.hosts[%d]", i), "host "+h, client.ObjectKey{Name: h}, &corev1.Node{}); err != nil {
			return nil, err
		}
	}
	if name := spec.Encryption.ClassName; name != "" {
		if err := l.exists(ctx, "spec.encryption.className", "EncryptionClass "+sn.Name+"/"+name, client.ObjectKey{Namespace: sn.Name, Name: name}, &encryption.EncryptionClass{}); err != nil {
			return nil, err
		}
	}
	for field, names := range map[string][]string{"spec.network.fromNamespaces": spec.Network.FromNamespaces, "spec.network.toNamespaces": spec.Network.ToNamespaces} {
		for i, name := range names {
			if err := l.exists(ctx, fmt.Sprintf("%s[%d]", field, i), "Namespace "+name, client.ObjectKey{Name: name}, &corev1.Namespace{}); err != nil {
				return nil, err
			}
		}
	}
	if err := l.zones(ctx, spec); err != nil {
		return nil, err
	}
	if err := l.classes(ctx, in); err != nil {
		return nil, err
	}
	if err := r.people(ctx, sn); err != nil {
		return nil, err
	}
	slices.Sort(l.unknown)
	return l.unknown, nil
}

// zones are known by the labels of hosts.
func (l *lookup) zones(ctx context.Context, spec *atoll.SupervisorNamespaceSpec) error {
	if len(spec.Zones) == 0 {
		return nil
	}
	var nodes corev1.NodeList
	if err := l.r.Shared.List(ctx, &nodes); err != nil {
		return fmt.Errorf("listing hosts: %w", err)
	}
	for i, z := range spec.Zones {
		if !slices.ContainsFunc(nodes.Items, func(n corev1.Node) bool { return n.Labels[corev1.LabelTopologyZone] == z.Name }) {
			l.missing(fmt.Sprintf("spec.zones[%d]", i), "zone "+z.Name)
		}
	}
	return nil
}

// classes looks for VirtualMachineClasses where administrators keep them, among the default ones, and in the namespace,
// where an administrator may have made one.
func (l *lookup) classes(ctx context.Context, in *expand.Input) error {
	in.Classes = map[string]vmopv1.VirtualMachineClassSpec{}
	for i, ref := range in.Spec.VMClasses {
		class := &vmopv1.VirtualMachineClass{}
		err := l.r.Shared.Get(ctx, client.ObjectKey{Namespace: atoll.ClassCatalogNamespace, Name: ref.Name}, class)
		if err == nil {
			in.Classes[ref.Name] = class.Spec
			continue
		}
		if !apierrors.IsNotFound(err) {
			return fmt.Errorf("looking up VirtualMachineClass %s: %w", ref.Name, err)
		}
		defaults := virtualmachineclass.Defaults(in.Name)
		if n := slices.IndexFunc(defaults, func(d *vmopv1.VirtualMachineClass) bool { return d.Name == ref.Name }); n >= 0 {
			in.Classes[ref.Name] = defaults[n].Spec
			continue
		}
		err = l.r.Shared.Get(ctx, client.ObjectKey{Namespace: in.Name, Name: ref.Name}, class)
		if err == nil && class.Labels[atoll.SupervisorNamespaceLabel] == "" {
			continue
		}
		if client.IgnoreNotFound(err) != nil {
			return fmt.Errorf("looking up VirtualMachineClass %s: %w", ref.Name, err)
		}
		l.missing(fmt.Sprintf("spec.vmClasses[%d]", i), fmt.Sprintf("VirtualMachineClass %s (neither a default one nor in namespace %s)", ref.Name, atoll.ClassCatalogNamespace))
	}
	return nil
}
