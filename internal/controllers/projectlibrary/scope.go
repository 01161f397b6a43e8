package projectlibrary

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"strings"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	api "atoll.dev/atoll/api/imageregistry/v1alpha1"
)

// scope is a project and where its libraries and items are: in the namespace of its name, or for the project library in
// the cluster.
type scope struct {
	client  client.Client
	project string
}

func (s scope) cluster() bool { return s.project == atoll.RegistryLibrary }

func (s scope) namespace() string {
	if s.cluster() {
		return ""
	}
	return s.project
}

// library is what both kinds of libraries have.
type library struct {
	client.Object
	before client.Object // as it was read
	spec   *api.ContentLibrarySpec
	status *api.ContentLibraryStatus
}

// libraries are those that are projects of the registry, the oldest first.
func (s scope) libraries(ctx context.Context) ([]library, error) {
	var out []library
	if s.cluster() {
		var list api.ClusterContentLibraryList
		if err := s.client.List(ctx, &list); err != nil {
			return nil, fmt.Errorf("listing content libraries: %w", err)
		}
		for i := range list.Items {
			if l := &list.Items[i]; l.Spec.Registry != nil && l.DeletionTimestamp == nil {
				out = append(out, library{l, l.DeepCopy(), &l.Spec, &l.Status})
			}
		}
	}
	// A namespace that is called library has libraries, too, which are not that project.
	var list api.ContentLibraryList
	if err := s.client.List(ctx, &list, client.InNamespace(s.project)); err != nil {
		return nil, fmt.Errorf("listing content libraries: %w", err)
	}
	for i := range list.Items {
		if l := &list.Items[i]; l.Spec.Registry != nil && l.DeletionTimestamp == nil {
			out = append(out, library{l, l.DeepCopy(), &l.Spec, &l.Status})
		}
	}
	return sorted(out), nil
}

// item is one that was made for a tag.
type item struct {
	client.Object
	library string
	tag     string // repository:tag
	digest  string // empty while it is being pushed
	pushed  bool
	failed  bool
	orphan  bool // the publish request that has made it is gone
}

// items are those that were made for tags, or pushed.
func (s scope) items(ctx context.Context) ([]item, error) {
	var out []item
	requests := map[string]bool{}
	add := func(obj client.Object, spec *api.ContentLibraryItemSpec, status *api.ContentLibraryItemStatus) {
		i := item{Object: obj, library: spec.Library, tag: obj.GetAnnotations()[api.TagAnnotation]}
		switch {
		case obj.GetDeletionTimestamp() != nil:
			return
		case spec.Push != nil:
			i.tag, i.digest, i.pushed = spec.Push.Repository+":"+spec.Push.Tag, status.Digest, true
			i.failed = refusedPush(status)
			request := obj.GetLabels()[api.PublishRequestLabel]
			i.orphan = request != "" && !requests[request]
		case i.tag == "" || spec.Source == nil || spec.Source.OCI == nil:
			return
		default:
			_, i.digest, _ = strings.Cut(spec.Source.OCI.Reference, "@")
		}
		out = append(out, i)
	}
	if s.cluster() {
		var list api.ClusterContentLibraryItemList
		if err := s.client.List(ctx, &list); err != nil {
			return nil, fmt.Errorf("listing library items: %w", err)
		}
		for i := range list.Items {
			add(&list.Items[i], &list.Items[i].Spec, &list.Items[i].Status)
		}
		return out, nil
	}
	var list api.ContentLibraryItemList
	if err := s.client.List(ctx, &list, client.InNamespace(s.namespace())); err != nil {
		return nil, fmt.Errorf("listing library items: %w", err)
	}
	// After the items: a request is there before its item.
	var publish vmopv1.VirtualMachinePublishRequestList
	if err := s.client.List(ctx, &publish, client.InNamespace(s.namespace())); err != nil {
		return nil, fmt.Errorf("listing publish requests: %w", err)
	}
	for i := range publish.Items {
		requests[string(publish.Items[i].UID)] = true
	}
	for i := range list.Items {
		add(&list.Items[i], &list.Items[i].Spec, &list.Items[i].Status)
	}
	return out, nil
}

// refusedPush tells that the registry does not take what an item is to push.
func refusedPush(status *api.ContentLibraryItemStatus) bool {
	c := meta.FindStatusCondition(status.Conditions, api.ReadyCondition)
	return c != nil && c.Reason == api.ItemPushRefused
}

// refusedError says that the API server does not take items, by a quota for one.
type refusedError struct {
	missing int
	err     error
}

// Error implements error.
func (e *refusedError) Error() string {
	return fmt.Sprintf("%d tags that are disks have no image, because items are refused: %s; delete tags, or have spec.resources.counts.contentLibraryItemCount of the SupervisorNamespace raised", e.missing, e.err)
}

// match makes items of disks that have none, and deletes those whose tag is gone or points elsewhere.
func (s scope) match(ctx context.Context, served string, items []item, disks []Disk) error {
	points := make(map[string]string, len(disks))
	for _, d := range disks {
		points[d.Repository+":"+d.Tag] = d.Digest
	}
	has, claimed := map[string]bool{}, map[string]bool{}
	var errs []error
	for _, first := range []bool{true, false} { // those that were pushed come before those that were not
		for _, i := range items {
			if i.pushed != first {
				continue
			}
			switch {
			case i.digest == "" && i.orphan: // nobody waits for it, and it would hold its tag for ever
				errs = append(errs, s.remove(ctx, i))
			case i.digest == "" && i.pushed: // it is under way, and says itself how it ends
				claimed[i.tag] = claimed[i.tag] || !i.failed
			case i.library == served && points[i.tag] == i.digest && !has[i.tag]:
				has[i.tag] = true
			default:
				errs = append(errs, s.remove(ctx, i))
			}
		}
	}
	var missing []Disk
	for _, d := range disks {
		if tag := d.Repository + ":" + d.Tag; !has[tag] && !claimed[tag] {
			missing = append(missing, d)
		}
	}
	for n, d := range missing {
		err := s.add(ctx, served, d)
		if apierrors.IsForbidden(err) {
			// So are the others, and trying them all again at once changes nothing.
			return cmp.Or(errors.Join(errs...), error(&refusedError{len(missing) - n, err}))
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// remove deletes an item, and with it its image. Machines that were made of it stay.
func (s scope) remove(ctx context.Context, i item) error {
	uid := i.GetUID()
	if err := s.client.Delete(ctx, i.Object, client.Preconditions{UID: &uid}); client.IgnoreNotFound(err) != nil && !apierrors.IsConflict(err) {
		return fmt.Errorf("deleting library item %s of %s, which is gone: %w", i.GetName(), i.tag, err)
	}
	return nil
}

// maxName is how long the name of an item for people may be.
const maxName = 253

// add makes the item of a disk.
func (s scope) add(ctx context.Context, library string, d Disk) error {
	tag := d.Repository + ":" + d.Tag
	name := api.TagName(d.Repository, d.Tag)
	sum := sha256.Sum256([]byte(s.project + "/" + library + "/" + tag + "@" + d.Digest))
	object := metav1.ObjectMeta{
		Namespace: s.namespace(), Name: fmt.Sprintf("registry-%x", sum[:10]), Annotations: map[string]string{api.TagAnnotation: tag},
	}
	spec := api.ContentLibraryItemSpec{
		Library: library, Name: name[:min(len(name), maxName)], Description: d.Description, OS: d.OS, Firmware: d.Firmware,
		Source: &api.ItemSource{OCI: &api.OCISource{Reference: atoll.RegistryHost + "/" + s.project + "/" + d.Repository + "@" + d.Digest}},
	}
	var made client.Object = &api.ContentLibraryItem{ObjectMeta: object, Spec: spec}
	if s.cluster() {
		made = &api.ClusterContentLibraryItem{ObjectMeta: object, Spec: spec}
	}
	if err := s.client.Create(ctx, made); err != nil && !apierrors.IsAlreadyExists(err) {
		return fmt.Errorf("making the library item of %s/%s: %w", s.project, tag, err)
	}
	return nil
}
