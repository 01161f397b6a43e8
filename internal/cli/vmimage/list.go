package vmimage

import (
	"cmp"
	"context"
	"fmt"
	"strconv"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	api "atoll.dev/atoll/api/imageregistry/v1alpha1"
	"atoll.dev/atoll/internal/cli/text"
)

// List prints the images of the cluster and of a namespace, or of all namespaces with "".
func (c Config) List(ctx context.Context, namespace, output string) error {
	cl, err := c.client()
	if err != nil {
		return err
	}
	all, err := cl.list(ctx, namespace, true)
	if err != nil {
		return err
	}
	if output == "json" || output == "yaml" {
		plain := make([]api.ContentLibraryItem, 0, len(all))
		for _, i := range all {
			plain = append(plain, i.ContentLibraryItem)
		}
		return c.Structured(output, plain)
	}
	head := []string{"IMAGE", "NAMESPACE", "NAME", "TYPE", "SIZE", "STATE", "AGE"}
	if output == "wide" {
		head = append(head, "DISKS", "OS", "FIRMWARE", "ITEM", "LIBRARY", "HOST", "SHA256")
	}
	rows := [][]string{head}
	for _, i := range all {
		state, _ := i.State()
		if p := i.Status.Progress; p != nil && p.BytesTotal > 0 && !i.Status.Ready {
			state += " " + strconv.Itoa(int(p.Percent)) + "%"
		}
		row := []string{
			i.ImageName(), cmp.Or(i.Namespace, "-"), i.DisplayName(), cmp.Or(strings.ToUpper(string(i.Status.Type)), "-"), capacity(i), state, text.Age(i.CreationTimestamp.Time),
		}
		if output == "wide" {
			row = append(row, disks(i), cmp.Or(osOf(i), "-"), cmp.Or(firmwareOf(i), "-"), i.Name, i.Spec.Library, cmp.Or(i.Status.Host, "-"), cmp.Or(i.Status.ContentVersion, "-"))
		}
		rows = append(rows, row)
	}
	c.Table(rows)
	for _, i := range all {
		switch reason, message := i.State(); reason {
		case api.ItemChecksum, api.ItemSourceBad, api.ItemContentBad, api.ItemRetrying:
			c.Printf("%s: %s: %s\n", i, reason, message)
		}
	}
	return nil
}

// capacity is the size of all disks.
func capacity(i Item) string {
	var sum int64
	for _, d := range i.Status.Disks {
		sum += d.Capacity.Value()
	}
	if sum == 0 {
		return "-"
	}
	return text.Size(sum)
}

func disks(i Item) string {
	var out []string
	for _, d := range i.Status.Disks {
		out = append(out, d.Format+" "+text.Size(d.Capacity.Value()))
	}
	return cmp.Or(strings.Join(out, ", "), "-")
}

func osOf(i Item) string {
	if h := i.Status.Hardware; h != nil && h.OS.Type != "" {
		return h.OS.Type
	}
	return i.Spec.OS.Type
}

func firmwareOf(i Item) string {
	if h := i.Status.Hardware; h != nil && h.Firmware != "" {
		return h.Firmware
	}
	return i.Spec.Firmware
}

// tag is the PROJECT/REPOSITORY:TAG of the registry that an item is for, if it is.
func (i Item) tag() string {
	project := cmp.Or(i.Namespace, atoll.RegistryLibrary)
	switch push, tag := i.Spec.Push, i.Annotations[api.TagAnnotation]; {
	case push != nil && i.Status.Digest != "":
		return project + "/" + push.Repository + ":" + push.Tag
	case push == nil && tag != "":
		return project + "/" + tag
	}
	return ""
}

// Remove deletes images. Virtual machines that were made of them stay as they are.
func (c Config) Remove(ctx context.Context, namespace string, names []string) error {
	cl, err := c.client()
	if err != nil {
		return err
	}
	for _, name := range names {
		i, err := cl.find(ctx, namespace, name)
		if err != nil {
			return err
		}
		if tag := i.tag(); tag != "" {
			return fmt.Errorf("%s is in the registry, and would come again; delete it there: `atoll registry rm %s`", i, tag)
		}
		if err := cl.resource(i.Namespace).Delete(ctx, i.Name, metav1.DeleteOptions{}); err != nil {
			return fmt.Errorf("removing %s: %w", i, err)
		}
		c.Printf("removed %s\n", i)
	}
	return nil
}
