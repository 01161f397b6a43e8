// Package vmimage is the commands about images of virtual machines: atoll image import, export, and ls and rm with
// --vm. (The other commands of atoll image are about container images.)
//
// They make and read library items with a person's kubeconfig. A file is sent through the API server, or on the host
// itself put into the library directly. Everything can be run again after an interruption and goes on where it was.
//
// What can go wrong: the cluster does not answer; an item of the name exists that is another one; the import fails,
// which the item says and the command repeats.
package vmimage

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"

	api "atoll.dev/atoll/api/imageregistry/v1alpha1"
	"atoll.dev/atoll/internal/cli/cluster"
	"atoll.dev/atoll/internal/cli/command"
	"atoll.dev/atoll/internal/storage/library"
)

// Config is what the commands need of the command line.
type Config struct {
	command.App
	// Kubeconfig is the path of the kubeconfig to use.
	Kubeconfig func() (string, error)
	// Library is the library of this host, or nil when this is not the host, or not root.
	Library func() *library.Library
}

// Item is an item of either kind; one without a namespace is of the cluster.
type Item struct{ api.ContentLibraryItem }

// ImageName is the name of the item's image.
func (i Item) ImageName() string {
	if i.Spec.UUID != "" {
		return api.ImageName(i.Spec.UUID)
	}
	return api.ImageName(i.UID)
}

// DisplayName is the name that people gave it.
func (i Item) DisplayName() string {
	for _, name := range []string{i.Status.Name, i.Spec.Name} {
		if name != "" {
			return name
		}
	}
	return i.Name
}

// State is the reason of the condition Ready, and its message.
func (i Item) State() (reason, message string) {
	for _, c := range i.Status.Conditions {
		if c.Type == api.ReadyCondition {
			return c.Reason, c.Message
		}
	}
	return api.ItemWaiting, "no host has taken it yet"
}

// String names it for messages.
func (i Item) String() string {
	if i.Namespace == "" {
		return "cluster image " + i.Name
	}
	return "image " + i.Namespace + "/" + i.Name
}

// client reads and writes items.
type client struct {
	config  *rest.Config
	objects dynamic.Interface
}

// requestTimeout bounds a request to the API server.
const requestTimeout = 30 * time.Second

func (c Config) client() (*client, error) {
	path, err := c.Kubeconfig()
	if err != nil {
		return nil, err
	}
	config, err := cluster.ConfigOf(path)
	if err != nil {
		return nil, err
	}
	plain := rest.CopyConfig(config)
	plain.Timeout = requestTimeout
	objects, err := dynamic.NewForConfig(plain)
	if err != nil {
		return nil, fmt.Errorf("using the kubeconfig: %w", err)
	}
	return &client{config: config, objects: objects}, nil
}

func (c *client) resource(namespace string) dynamic.ResourceInterface {
	if namespace == "" {
		return c.objects.Resource(api.ClusterItems())
	}
	return c.objects.Resource(api.Items()).Namespace(namespace)
}

func decode(obj *unstructured.Unstructured) (Item, error) {
	var i Item
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(obj.Object, &i.ContentLibraryItem); err != nil {
		return i, fmt.Errorf("reading library item %s: %w", obj.GetName(), err)
	}
	i.TypeMeta = metav1.TypeMeta{APIVersion: obj.GetAPIVersion(), Kind: obj.GetKind()}
	return i, nil
}

func (c *client) get(ctx context.Context, namespace, name string) (Item, error) {
	obj, err := c.resource(namespace).Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return Item{}, err
	}
	return decode(obj)
}

// known tells whether the image of an item that is ready is there under its name.
func (c *client) known(ctx context.Context, i Item) (bool, error) {
	images := c.objects.Resource(vmopv1.GroupVersion.WithResource("clustervirtualmachineimages"))
	get := images.Get
	if i.Namespace != "" {
		get = c.objects.Resource(vmopv1.GroupVersion.WithResource("virtualmachineimages")).Namespace(i.Namespace).Get
	}
	obj, err := get(ctx, i.ImageName(), metav1.GetOptions{})
	if err != nil {
		return false, err
	}
	name, _, err := unstructured.NestedString(obj.Object, "status", "name")
	return name == cmp.Or(i.Status.Name, i.Name), err
}

func (c *client) create(ctx context.Context, i Item) (Item, error) {
	i.TypeMeta = metav1.TypeMeta{APIVersion: api.GroupVersion().String(), Kind: "ContentLibraryItem"}
	if i.Namespace == "" {
		i.Kind = "ClusterContentLibraryItem"
	}
	content, err := runtime.DefaultUnstructuredConverter.ToUnstructured(&i.ContentLibraryItem)
	if err != nil {
		return i, fmt.Errorf("making library item %s: %w", i.Name, err)
	}
	delete(content, "status")
	obj, err := c.resource(i.Namespace).Create(ctx, &unstructured.Unstructured{Object: content}, metav1.CreateOptions{FieldManager: "atoll-cli"})
	if err != nil {
		return i, fmt.Errorf("making library item %s: %w", i.Name, err)
	}
	return decode(obj)
}

// list returns the items of the cluster and of a namespace, or of all with "". What the person may not list of all
// namespaces is left out.
func (c *client) list(ctx context.Context, namespace string, cluster bool) ([]Item, error) {
	var out []Item
	var failed error
	sources := []dynamic.ResourceInterface{c.objects.Resource(api.Items()).Namespace(namespace)}
	if cluster {
		sources = append([]dynamic.ResourceInterface{c.objects.Resource(api.ClusterItems())}, sources...)
	}
	for _, s := range sources {
		list, err := s.List(ctx, metav1.ListOptions{})
		if err != nil {
			failed = errors.Join(failed, fmt.Errorf("listing library items: %w", err))
			continue
		}
		for _, obj := range list.Items {
			i, err := decode(&obj)
			if err != nil {
				return nil, err
			}
			out = append(out, i)
		}
	}
	slices.SortFunc(out, func(a, b Item) int { return strings.Compare(a.Namespace+"/"+a.Name, b.Namespace+"/"+b.Name) })
	if len(out) > 0 {
		failed = nil
	}
	return out, failed
}

// find returns the one item that a person means: by the item's name, the image's, or the display name.
func (c *client) find(ctx context.Context, namespace, name string) (Item, error) {
	all, err := c.list(ctx, namespace, true)
	if err != nil {
		return Item{}, err
	}
	found := slices.DeleteFunc(slices.Clone(all), func(i Item) bool {
		return i.Name != name && i.ImageName() != name && i.DisplayName() != name
	})
	switch len(found) {
	case 0:
		return Item{}, fmt.Errorf("there is no image %q; `atoll image ls --vm` lists what there is", name)
	case 1:
		return found[0], nil
	}
	var names []string
	for _, i := range found {
		names = append(names, i.String()+" ("+i.ImageName()+")")
	}
	return Item{}, fmt.Errorf("%q can be any of: %s; name one by its vmi- name, or its namespace by -n", name, strings.Join(names, ", "))
}
