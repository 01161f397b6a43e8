// Package projectlibrary is the controller of content libraries that are projects of the cluster's registry: each tag of
// the project that is a disk of a virtual machine has a library item, and by that an image, for as long as it is there.
//
// An item names the disk by its digest; when a tag comes to point to another one, its item is deleted and another one is
// made. Items that were pushed by a publish request are taken for those of their tags. The bytes are brought in, verified
// and judged by a host's agent, as all items' are (internal/controllers/libraryitem). It is set up in the server's
// manager, and told by the registry which projects have changed.
//
// A namespace's libraries have the content of its own project and no other one's; the project library is that of a
// ClusterContentLibrary. What can go wrong: a library names another project, or two libraries are the same project; the
// condition Ready says so.
package projectlibrary

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/util/workqueue"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
	"sigs.k8s.io/controller-runtime/pkg/source"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	api "atoll.dev/atoll/api/imageregistry/v1alpha1"
)

const (
	// lookEvery is how often a project is looked at that nobody told about, retryEvery one whose items were refused.
	lookEvery  = 10 * time.Minute
	retryEvery = time.Minute
	// maxItems is how many items a library has at most: those of the tags that were pushed last.
	maxItems = 200
)

// Disk is a tag of a project that is a disk.
type Disk struct {
	Repository, Tag, Digest string
	Pushed                  time.Time
	Firmware, Description   string
	OS                      api.OSInfo
}

// Registry has the projects.
type Registry interface {
	// Disks of a project, and how many of its older tags were not looked at because there are too many. ErrExternal.
	Disks(ctx context.Context, project string) (disks []Disk, unseen int, err error)
}

// ErrExternal says that the cluster uses another registry than its own.
var ErrExternal = errors.New("the cluster uses an external registry in place of its own")

// Changes tells the controller which projects have changed. The zero value can be used.
type Changes struct {
	mu    sync.Mutex // guards queue
	queue workqueue.TypedRateLimitingInterface[reconcile.Request]
}

// Tell says that a project has changed. What is told before the controller runs is no loss: it begins with all.
func (c *Changes) Tell(project string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.queue != nil {
		c.queue.Add(request(project))
	}
}

// Start implements the source of the controller.
func (c *Changes) start(_ context.Context, queue workqueue.TypedRateLimitingInterface[reconcile.Request]) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.queue = queue
	return nil
}

// request is that of a project.
func request(project string) reconcile.Request {
	return reconcile.Request{NamespacedName: types.NamespacedName{Name: project}}
}

// Setup adds the controller to a manager.
func Setup(registry Registry, changes *Changes) func(ctrl.Manager) error {
	return func(mgr ctrl.Manager) error {
		r := &reconciler{client: mgr.GetClient(), registry: registry}
		project := handler.EnqueueRequestsFromMapFunc(projectOf)
		err := ctrl.NewControllerManagedBy(mgr).Named("projectlibrary").
			Watches(&api.ContentLibrary{}, project).Watches(&api.ClusterContentLibrary{}, project).
			Watches(&api.ContentLibraryItem{}, project).Watches(&api.ClusterContentLibraryItem{}, project).
			WithEventFilter(predicate.Funcs{UpdateFunc: func(e event.UpdateEvent) bool { return matters(e.ObjectOld, e.ObjectNew) }}).
			WatchesRawSource(source.Func(changes.start)).
			Complete(r)
		if err != nil {
			return fmt.Errorf("project library controller: %w", err)
		}
		return nil
	}
}

// matters tells whether a project has to be looked at because an object changed. A host writes how far it is with an item
// every few seconds, and libraries are written here.
func matters(was, is client.Object) bool {
	if was.GetGeneration() != is.GetGeneration() || (was.GetDeletionTimestamp() == nil) != (is.GetDeletionTimestamp() == nil) ||
		was.GetAnnotations()[api.TagAnnotation] != is.GetAnnotations()[api.TagAnnotation] ||
		was.GetLabels()[api.PublishRequestLabel] != is.GetLabels()[api.PublishRequestLabel] {
		return true
	}
	before, ok := was.(*api.ContentLibraryItem)
	after, both := is.(*api.ContentLibraryItem)
	return ok && both && (before.Status.Digest != after.Status.Digest || refusedPush(&before.Status) != refusedPush(&after.Status))
}

// projectOf is the project that an object has to do with, if any.
func projectOf(_ context.Context, obj client.Object) []reconcile.Request {
	project := cmp.Or(obj.GetNamespace(), atoll.RegistryLibrary)
	switch o := obj.(type) {
	case *api.ContentLibrary:
		if o.Spec.Registry == nil {
			return nil
		}
	case *api.ClusterContentLibrary:
		if o.Spec.Registry == nil {
			return nil
		}
	case *api.ContentLibraryItem:
		if o.Spec.Push == nil && o.Annotations[api.TagAnnotation] == "" {
			return nil
		}
	case *api.ClusterContentLibraryItem:
		if o.Annotations[api.TagAnnotation] == "" {
			return nil
		}
	}
	return []reconcile.Request{request(project)}
}

type reconciler struct {
	client   client.Client
	registry Registry
}

// Reconcile implements reconcile.Reconciler.
func (r *reconciler) Reconcile(ctx context.Context, req ctrl.Request) (ctrl.Result, error) {
	s := scope{client: r.client, project: req.Name}
	libraries, err := s.libraries(ctx)
	if err != nil {
		return ctrl.Result{}, err
	}
	served, errs := r.serve(ctx, s, libraries)
	// Items before disks: what is pushed meanwhile is in the later list.
	items, err := s.items(ctx)
	if err != nil {
		return ctrl.Result{}, errors.Join(errs, err)
	}
	if served == nil {
		return ctrl.Result{}, errors.Join(errs, s.match(ctx, "", items, nil))
	}
	disks, unseen, err := r.registry.Disks(ctx, s.project)
	switch {
	case errors.Is(err, ErrExternal):
		errs = errors.Join(errs, s.say(ctx, *served, api.LibraryExternal, err.Error()+"; import images of it with `atoll image import oci://...`"))
		return ctrl.Result{RequeueAfter: lookEvery}, errs
	case err != nil:
		return ctrl.Result{}, errors.Join(errs, err, s.say(ctx, *served, api.LibraryProjectUnknown, "the project cannot be read yet: "+err.Error()))
	}
	disks, left := newest(disks)
	s.leaves(*served, left, unseen)
	err = s.match(ctx, served.GetName(), items, disks)
	if refused, ok := errors.AsType[*refusedError](err); ok {
		return ctrl.Result{RequeueAfter: retryEvery}, errors.Join(errs, s.say(ctx, *served, api.LibraryItemsRefused, refused.Error()))
	}
	if err != nil {
		return ctrl.Result{}, errors.Join(errs, err)
	}
	return ctrl.Result{RequeueAfter: lookEvery}, errors.Join(errs, s.say(ctx, *served, "", ""))
}

// serve finds the library that has the project's disks, and says of others why they have not.
func (r *reconciler) serve(ctx context.Context, s scope, libraries []library) (served *library, errs error) {
	for _, l := range libraries {
		switch named := l.spec.Registry.Project; {
		case l.GetNamespace() != s.namespace():
			errs = errors.Join(errs, s.say(ctx, l, api.LibraryProjectInvalid, "the project library is for all namespaces; its disks are in the ClusterContentLibrary "+api.RegistryLibrary))
		case named != "" && named != s.project:
			errs = errors.Join(errs, s.say(ctx, l, api.LibraryProjectInvalid, s.wrong(named)))
		case served != nil:
			errs = errors.Join(errs, s.say(ctx, l, api.LibraryProjectTaken,
				fmt.Sprintf("project %s is the content of library %s already; use that one, or delete it", s.project, served.GetName())))
		default:
			served = &l
		}
	}
	return served, errs
}

// wrong says that a library may not have another project.
func (s scope) wrong(named string) string {
	if s.cluster() {
		return fmt.Sprintf("spec.registry.project %q: a ClusterContentLibrary has the project %s, which is for all namespaces; leave the field empty", named, s.project)
	}
	return fmt.Sprintf("spec.registry.project %q: a ContentLibrary of namespace %s has the project of that namespace; leave the field empty, or have the disk pushed to the project %s, which is for all namespaces",
		named, s.project, atoll.RegistryLibrary)
}

// say writes the condition Ready of a library: true without a reason.
func (s scope) say(ctx context.Context, l library, reason, message string) error {
	was := l.before
	c := metav1.Condition{Type: api.ReadyCondition, Status: metav1.ConditionFalse, Reason: reason, Message: message, ObservedGeneration: l.GetGeneration()}
	if reason == "" {
		c.Status, c.Reason = metav1.ConditionTrue, "True"
	}
	meta.SetStatusCondition(&l.status.Conditions, c)
	if equality.Semantic.DeepEqual(was, l.Object) {
		return nil
	}
	if err := s.client.Status().Patch(ctx, l.Object, client.MergeFrom(was)); client.IgnoreNotFound(err) != nil {
		return fmt.Errorf("writing the status of library %s: %w", l.GetName(), err)
	}
	return nil
}

// leaves notes in a library how many tags have no item because there are too many; say writes it.
func (s scope) leaves(l library, left, unseen int) {
	var why []string
	if left > 0 {
		why = append(why, fmt.Sprintf("%d older tags that are disks have no image: a library has the %d that were pushed last", left, maxItems))
	}
	if unseen > 0 {
		why = append(why, fmt.Sprintf("%d older tags were not looked at: the project has too many", unseen))
	}
	if why == nil {
		meta.RemoveStatusCondition(&l.status.Conditions, api.CompleteCondition)
		return
	}
	way := "delete tags with `atoll registry rm`, or have spec.registry.retention of the SupervisorNamespace do it; pushing a tag again makes it new"
	meta.SetStatusCondition(&l.status.Conditions, metav1.Condition{
		Type: api.CompleteCondition, Status: metav1.ConditionFalse, Reason: api.LibraryTooManyTags,
		Message: strings.Join(append(why, way), "; "), ObservedGeneration: l.GetGeneration(),
	})
}

// newest are the disks that were pushed last, and how many more there are.
func newest(disks []Disk) (kept []Disk, left int) {
	if len(disks) <= maxItems {
		return disks, 0
	}
	slices.SortStableFunc(disks, func(a, b Disk) int { return b.Pushed.Compare(a.Pushed) })
	return disks[:maxItems], len(disks) - maxItems
}

// older sorts libraries, so that the same one is served each time.
func older(a, b library) int {
	return cmp.Or(a.GetCreationTimestamp().Compare(b.GetCreationTimestamp().Time), strings.Compare(a.GetName(), b.GetName()))
}

func sorted(libraries []library) []library {
	slices.SortFunc(libraries, older)
	return libraries
}
