package vmimage

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	api "atoll.dev/atoll/api/imageregistry/v1alpha1"
	"atoll.dev/atoll/internal/cli/command"
)

// ImportOptions say what to import and how it is called.
type ImportOptions struct {
	// Source is a file, an http or https URL, or oci:// and a reference.
	Source string
	// Name is the display name, Object the name of the item; both follow from the source when empty.
	Name, Object string
	// Namespace is where the image goes; empty is the cluster.
	Namespace string
	Library   string
	// Checksum is algorithm:hex or hex.
	Checksum string
	// CA is a file with certificates.
	CA                    string
	PlainHTTP             bool
	OSType, OSID, OSVer   string
	Firmware, Description string
	NoWait                bool
	Output                string
}

// pollEvery is how often an import is looked at.
const pollEvery = 500 * time.Millisecond

// Import imports an image, or goes on with an import that was interrupted.
func (c Config) Import(ctx context.Context, o ImportOptions) error {
	want, file, err := c.plan(ctx, o)
	if err != nil {
		return err
	}
	cl, err := c.client()
	if err != nil {
		return err
	}
	item, err := cl.get(ctx, o.Namespace, want.Name)
	switch {
	case apierrors.IsNotFound(err):
		if item, err = cl.create(ctx, want); err != nil {
			return err
		}
	case err != nil:
		return fmt.Errorf("looking for library item %s: %w", want.Name, err)
	case !reflect.DeepEqual(item.Spec.Source, want.Spec.Source):
		return fmt.Errorf("%s exists and has another source; choose another --name, or remove it with `%s`", item, removeCommand(item))
	}
	if file != "" && !item.Status.Ready {
		if err := c.send(ctx, cl, item, file); err != nil {
			return err
		}
	}
	if !o.NoWait {
		if item, err = c.await(ctx, cl, item); err != nil {
			return err
		}
	}
	if o.Output == "json" || o.Output == "yaml" {
		return c.Structured(o.Output, item.ContentLibraryItem)
	}
	verb := "imported"
	if o.NoWait {
		verb = "importing"
	}
	c.Printf("%s %s as %s (%s)\n", verb, item.DisplayName(), item.ImageName(), item)
	return nil
}

// removeCommand is what removes an item.
func removeCommand(i Item) string {
	if i.Namespace == "" {
		return "atoll image rm --vm " + i.Name
	}
	return "atoll image rm --vm " + i.Name + " -n " + i.Namespace
}

// plan is the item to make, and the file to send if there is one.
func (c Config) plan(ctx context.Context, o ImportOptions) (item Item, file string, err error) {
	sum, err := checksum(o.Checksum)
	if err != nil {
		return Item{}, "", command.UsageError{Err: err}
	}
	ca := ""
	if o.CA != "" {
		b, err := os.ReadFile(o.CA)
		if err != nil {
			return Item{}, "", fmt.Errorf("reading --ca-file: %w", err)
		}
		ca = string(b)
	}
	source, name := &api.ItemSource{}, ""
	u, parseErr := url.Parse(o.Source)
	switch {
	case parseErr == nil && (u.Scheme == "http" || u.Scheme == "https"):
		source.HTTP, name = &api.HTTPSource{URL: o.Source, Checksum: sum, SSLCertificate: ca}, path.Base(u.Path)
	case strings.HasPrefix(o.Source, "oci://") || strings.HasPrefix(o.Source, "docker://"):
		if sum != nil {
			return Item{}, "", command.UsageError{Err: errors.New("--checksum is not for OCI images; name one by its digest, as oci://registry/repository@sha256:HEX")}
		}
		ref := strings.TrimPrefix(strings.TrimPrefix(o.Source, "oci://"), "docker://")
		source.OCI = &api.OCISource{Reference: ref, SSLCertificate: ca, PlainHTTP: o.PlainHTTP}
		name, _, _ = strings.Cut(path.Base(ref), "@")
		name = strings.ReplaceAll(name, ":", "-")
	case parseErr == nil && u.Scheme != "" && strings.Contains(o.Source, "://"):
		return Item{}, "", command.UsageError{Err: fmt.Errorf("%q: use a file, an http or https URL, or oci://REFERENCE", o.Source)}
	default:
		file, name = o.Source, filepath.Base(o.Source)
		if sum, err = c.hash(ctx, file, sum); err != nil {
			return Item{}, "", err
		}
		source.Upload = &api.UploadSource{FileName: name, Checksum: sum}
	}
	if o.Name == "" {
		o.Name = trimExtensions(name)
	}
	if o.Object == "" {
		o.Object = objectName(o.Name)
	}
	if o.Object == "" {
		return Item{}, "", command.UsageError{Err: fmt.Errorf("no name for the image follows from %q; give one with --name", o.Source)}
	}
	item.ObjectMeta = metav1.ObjectMeta{Name: o.Object, Namespace: o.Namespace}
	item.Spec = api.ContentLibraryItemSpec{
		Name: o.Name, Library: o.Library, Description: o.Description, Source: source, Firmware: o.Firmware,
		OS: api.OSInfo{Type: o.OSType, ID: o.OSID, Version: o.OSVer},
	}
	return item, file, nil
}

// checksum reads --checksum.
func checksum(text string) (*api.Checksum, error) {
	if text == "" {
		return nil, nil
	}
	algorithm, value, ok := strings.Cut(text, ":")
	if !ok {
		algorithm, value = map[int]string{64: "sha256", 128: "sha512"}[len(text)], text
	}
	size := map[string]int{"sha256": 64, "sha512": 128}[strings.ToLower(algorithm)]
	if _, err := hex.DecodeString(value); err != nil || len(value) != size || size == 0 {
		return nil, fmt.Errorf("--checksum %q: use sha256:HEX or sha512:HEX", text)
	}
	return &api.Checksum{Algorithm: strings.ToUpper(algorithm), Value: strings.ToLower(value)}, nil
}

// hash is the checksum of a file that is sent: what the person says, or what it has now.
func (c Config) hash(ctx context.Context, file string, said *api.Checksum) (*api.Checksum, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, fmt.Errorf("opening the image: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	switch {
	case err != nil:
		return nil, fmt.Errorf("opening the image: %w", err)
	case !info.Mode().IsRegular():
		return nil, fmt.Errorf("opening the image: %s is not a file", file)
	case info.Size() == 0:
		return nil, fmt.Errorf("opening the image: %s is empty", file)
	case said != nil:
		return said, nil
	}
	bar := c.bar("reading")
	defer bar.end()
	h := sha256.New()
	var done int64
	buf := make([]byte, 1<<20)
	for {
		n, err := f.Read(buf)
		h.Write(buf[:n])
		done += int64(n)
		bar.show(done, info.Size())
		if errors.Is(err, io.EOF) {
			break
		}
		if err = errors.Join(err, ctx.Err()); err != nil {
			return nil, fmt.Errorf("reading the image: %w", err)
		}
	}
	return &api.Checksum{Algorithm: "SHA256", Value: hex.EncodeToString(h.Sum(nil))}, nil
}

// trimExtensions makes a name of a file's name.
func trimExtensions(name string) string {
	for range 2 {
		switch ext := strings.ToLower(path.Ext(name)); ext {
		case ".qcow2", ".img", ".raw", ".iso", ".vmdk", ".vhd", ".vhdx", ".ova", ".gz", ".xz", ".zst":
			name = strings.TrimSuffix(name, name[len(name)-len(ext):])
		}
	}
	return name
}

// objectName makes a name of an object of any name.
func objectName(name string) string {
	name = regexp.MustCompile(`[^a-z0-9]+`).ReplaceAllString(strings.ToLower(name), "-")
	return strings.Trim(name[:min(len(name), 63)], "-")
}

// await waits until an item is ready and its image can be named, or the item has failed.
func (c Config) await(ctx context.Context, cl *client, item Item) (Item, error) {
	bar := c.bar("")
	defer bar.end()
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	for {
		got, err := cl.get(ctx, item.Namespace, item.Name)
		switch {
		case ctx.Err() != nil:
		case apierrors.IsNotFound(err):
			return item, fmt.Errorf("%s was deleted meanwhile", item)
		case err == nil && got.Status.Ready:
			known, err := cl.known(ctx, got)
			if known || apierrors.IsForbidden(err) {
				return got, nil
			}
			bar.say("its image is being made")
			if err != nil && !apierrors.IsNotFound(err) {
				bar.say(err.Error())
			}
		case err == nil:
			reason, message := got.State()
			switch reason {
			case api.ItemChecksum, api.ItemSourceBad, api.ItemContentBad:
				return got, fmt.Errorf("importing %s: %s: %s\nremove it with `%s` before another attempt", got, reason, message, removeCommand(got))
			}
			bar.title = reason
			if p := got.Status.Progress; p != nil && reason != api.ItemRetrying {
				bar.show(p.BytesDone, p.BytesTotal)
			} else {
				bar.say(message)
			}
		}
		select {
		case <-ctx.Done():
			return item, fmt.Errorf("%w; the import of %s goes on, and the same command looks at it again", ctx.Err(), item)
		case <-tick.C:
		}
	}
}
