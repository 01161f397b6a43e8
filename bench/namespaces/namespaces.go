// Package namespaces measures what people meet in namespaces: making many at once, the admission of pods with every bound
// set, logging in, and pushing to and pulling from the registry.
//
// The bench calls each exported function as one part. Namespaces and the user are named bench-ns-, and whatever is named
// so is removed afterwards, whoever made it. Logging in and the registry need the portal at the port of the options; the
// user is made with the binary of the options.
package namespaces

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/wait"
	"sigs.k8s.io/controller-runtime/pkg/client"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/bench/rig"
)

const (
	// namespaceCount is how many namespaces are made at once.
	namespaceCount = 200
	// makers is how many clients make them.
	makers = 20
	// namespacePrefix begins the names of all that are made here.
	namespacePrefix = "bench-ns-"
	// admissions is how many pods are created dry in each kind of namespace.
	admissions = 500
)

// objects is a client of the kinds of atoll.dev.
func objects(h *rig.Host) (client.Client, error) {
	scheme := runtime.NewScheme()
	if err := errors.Join(atoll.AddToScheme(scheme), corev1.AddToScheme(scheme)); err != nil {
		return nil, err
	}
	return client.New(h.REST, client.Options{Scheme: scheme})
}

// bounded is a namespace with everything bounded that costs something.
func bounded(name string) *atoll.SupervisorNamespace {
	b := &atoll.SupervisorNamespace{ObjectMeta: metav1.ObjectMeta{Name: name}}
	b.Spec.Description = "made by the bench"
	b.Spec.Resources = atoll.NamespaceResources{
		CPULimit: new(resource.MustParse("4")), MemoryLimit: new(resource.MustParse("8Gi")), StorageRequestLimit: new(resource.MustParse("100Gi")),
		CPULimitDefault: new(resource.MustParse("500m")), CPURequestDefault: new(resource.MustParse("10m")),
		MemoryLimitDefault: new(resource.MustParse("128Mi")), MemoryRequestDefault: new(resource.MustParse("64Mi")),
	}
	b.Spec.Resources.Counts.Pods = new(int64(50))
	b.Spec.Images = []string{"docker.io/library/*", "registry.atoll.local/" + name + "/**"}
	b.Spec.VMClasses = []atoll.NamespaceReference{{Name: "best-effort-small"}}
	b.Spec.AccessList = []atoll.NamespaceAccess{
		{SubjectType: "User", Subject: "anna", Domain: atoll.LocalDomain, Role: atoll.RoleOwner},
		{SubjectType: "Group", Subject: "auditors", Domain: atoll.LocalDomain, Role: atoll.RoleView},
	}
	b.Spec.Network.Isolation = atoll.IsolationIsolated
	return b
}

// AtOnce makes many SupervisorNamespaces together, waits until all are ready, and removes them.
func AtOnce(ctx context.Context, h *rig.Host) (rows []rig.Row, err error) {
	c, err := objects(h)
	if err != nil {
		return nil, err
	}
	before, err := serverMiB(ctx, h)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, removeNamespaces(context.WithoutCancel(ctx), c)) }()
	names := make([]string, namespaceCount)
	for i := range names {
		names[i] = fmt.Sprintf("%s%03d", namespacePrefix, i)
	}
	begin := time.Now()
	if err := makeNamespaces(ctx, c, names); err != nil {
		return nil, err
	}
	accepted := time.Since(begin)
	took, err := awaitNamespaces(ctx, c, begin)
	if err != nil {
		return nil, err
	}
	loaded, err := serverMiB(ctx, h)
	if err != nil {
		return nil, err
	}
	ready := rig.Versus(fmt.Sprintf("%d SupervisorNamespaces at once, until each is Ready", namespaceCount), "s", took, "create accepted", []float64{accepted.Seconds()})
	ready.Note = fmt.Sprintf("all after %.0f s, the bar is 60", slices.Max(took))
	memory := rig.Row{Measure: fmt.Sprintf("server's memory for %d SupervisorNamespaces", namespaceCount), Unit: "MiB", Atoll: rig.Value{P50: loaded - before}}
	memory.Note = fmt.Sprintf("%.0f before, %.0f after; %.0f KiB each", before, loaded, (loaded-before)*1024/namespaceCount)
	begin = time.Now()
	if err := removeNamespaces(ctx, c); err != nil {
		return []rig.Row{ready, memory}, err
	}
	gone := rig.Row{Measure: fmt.Sprintf("%d SupervisorNamespaces deleted, until all are gone", namespaceCount), Unit: "s", Atoll: rig.Value{P50: time.Since(begin).Seconds()}}
	return []rig.Row{ready, memory, gone}, nil
}

// serverMiB is what the server has in memory.
func serverMiB(ctx context.Context, h *rig.Host) (float64, error) {
	_, parts, err := h.Resident(ctx)
	return parts["atoll server"], err
}

func makeNamespaces(ctx context.Context, c client.Client, names []string) error {
	var group sync.WaitGroup
	work, failed := make(chan string), make(chan error, makers)
	for range makers {
		group.Go(func() {
			for name := range work {
				if err := c.Create(ctx, bounded(name)); err != nil {
					failed <- fmt.Errorf("making SupervisorNamespace %s: %w", name, err)
					for range work { // lets the others end
					}
					return
				}
			}
		})
	}
	for _, name := range names {
		work <- name
	}
	close(work)
	group.Wait()
	close(failed)
	return <-failed
}

// awaitNamespaces waits until all are ready and returns when each was, in seconds after the beginning.
func awaitNamespaces(ctx context.Context, c client.Client, begin time.Time) ([]float64, error) {
	ready := map[string]float64{}
	why := ""
	err := wait.PollUntilContextTimeout(ctx, 500*time.Millisecond, 10*time.Minute, true, func(ctx context.Context) (bool, error) {
		var list atoll.SupervisorNamespaceList
		if err := c.List(ctx, &list); err != nil {
			return false, err
		}
		for _, b := range list.Items {
			if !isBench(b.Name) {
				continue
			}
			cond := meta.FindStatusCondition(b.Status.Conditions, atoll.NamespaceReady)
			switch {
			case cond == nil:
				why = b.Name + " has no condition"
			case cond.Status != metav1.ConditionTrue:
				why = b.Name + ": " + cond.Message
			case ready[b.Name] == 0:
				ready[b.Name] = time.Since(begin).Seconds()
			}
		}
		return len(ready) == namespaceCount, nil
	})
	if err != nil {
		return nil, fmt.Errorf("%d of %d SupervisorNamespaces are ready (%s): %w", len(ready), namespaceCount, why, err)
	}
	took := make([]float64, 0, len(ready))
	for _, s := range ready {
		took = append(took, s)
	}
	return took, nil
}

func isBench(name string) bool {
	return len(name) > len(namespacePrefix) && name[:len(namespacePrefix)] == namespacePrefix
}

// removeNamespaces removes all that the bench has made, with what is in them, and waits until they are gone.
func removeNamespaces(ctx context.Context, c client.Client) error {
	return wait.PollUntilContextTimeout(ctx, time.Second, 15*time.Minute, true, func(ctx context.Context) (bool, error) {
		var list atoll.SupervisorNamespaceList
		if err := c.List(ctx, &list); err != nil {
			return false, fmt.Errorf("listing SupervisorNamespaces: %w", err)
		}
		left := 0
		for i := range list.Items {
			b := &list.Items[i]
			if !isBench(b.Name) {
				continue
			}
			left++
			if b.DeletionTimestamp != nil {
				continue
			}
			before := b.DeepCopy()
			b.Annotations = map[string]string{atoll.DeleteContentsAnnotation: "true"}
			if err := c.Patch(ctx, b, client.MergeFrom(before)); client.IgnoreNotFound(err) != nil {
				return false, fmt.Errorf("deleting SupervisorNamespace %s: %w", b.Name, err)
			}
			if err := c.Delete(ctx, b); client.IgnoreNotFound(err) != nil {
				return false, fmt.Errorf("deleting SupervisorNamespace %s: %w", b.Name, err)
			}
		}
		return left == 0, nil
	})
}

// readyNamespace makes one SupervisorNamespace and waits until it is ready.
func readyNamespace(ctx context.Context, c client.Client, b *atoll.SupervisorNamespace) error {
	if err := c.Create(ctx, b); err != nil {
		return fmt.Errorf("making SupervisorNamespace %s: %w", b.Name, err)
	}
	return wait.PollUntilContextTimeout(ctx, 200*time.Millisecond, 2*time.Minute, true, func(ctx context.Context) (bool, error) {
		if err := c.Get(ctx, client.ObjectKeyFromObject(b), b); err != nil {
			return false, err
		}
		return meta.IsStatusConditionTrue(b.Status.Conditions, atoll.NamespaceReady), nil
	})
}

// PodAdmission creates pods dry, in turn in a namespace with every bound and in a plain one. What differs is the quota,
// the defaults and AtollNamespaceBounds.
func PodAdmission(ctx context.Context, h *rig.Host) (rows []rig.Row, err error) {
	c, err := objects(h)
	if err != nil {
		return nil, err
	}
	bound, plain := bounded(namespacePrefix+"pods"), namespacePrefix+"plain"
	defer func() {
		end := context.WithoutCancel(ctx)
		err = errors.Join(err, removeNamespaces(end, c), client.IgnoreNotFound(h.Kube.CoreV1().Namespaces().Delete(end, plain, metav1.DeleteOptions{})))
	}()
	if err := readyNamespace(ctx, c, bound); err != nil {
		return nil, err
	}
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: plain}}
	if _, err := h.Kube.CoreV1().Namespaces().Create(ctx, ns, metav1.CreateOptions{}); err != nil && !apierrors.IsAlreadyExists(err) {
		return nil, fmt.Errorf("making namespace %s: %w", plain, err)
	}
	if err := serviceAccounts(ctx, h, bound.Name, plain); err != nil {
		return nil, err
	}
	took := map[string][]float64{}
	for i := range admissions + 20 {
		for _, name := range []string{bound.Name, plain} {
			pod := rig.Pod(fmt.Sprintf("dry-%d", i), "atoll")
			pod.Namespace = name
			begin := time.Now()
			_, err := h.Kube.CoreV1().Pods(name).Create(ctx, pod, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
			if err != nil {
				return nil, fmt.Errorf("creating a pod dry in %s: %w", name, err)
			}
			if i >= 20 { // those before warm it up
				took[name] = append(took[name], rig.Milliseconds(time.Since(begin)))
			}
		}
	}
	row := rig.Versus("pod created dry, every bound", "ms", took[bound.Name], "plain namespace", took[plain])
	b50, p50, b99, p99 := rig.Quantile(took[bound.Name], .5), rig.Quantile(took[plain], .5), rig.Quantile(took[bound.Name], .99), rig.Quantile(took[plain], .99)
	row.Note = fmt.Sprintf("adds %.2f at p50, %.2f at p99 (%.2f against %.2f), the bar is 5", b50-p50, b99-p99, b99, p99)
	return []rig.Row{row}, nil
}

// serviceAccounts waits for those that pods have when they name none.
func serviceAccounts(ctx context.Context, h *rig.Host, namespaces ...string) error {
	for _, ns := range namespaces {
		err := wait.PollUntilContextTimeout(ctx, 100*time.Millisecond, time.Minute, true, func(ctx context.Context) (bool, error) {
			_, err := h.Kube.CoreV1().ServiceAccounts(ns).Get(ctx, "default", metav1.GetOptions{})
			return err == nil, client.IgnoreNotFound(err)
		})
		if err != nil {
			return fmt.Errorf("waiting for the service account of %s: %w", ns, err)
		}
	}
	return nil
}
