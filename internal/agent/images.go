package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path"
	"path/filepath"
	"strings"

	"k8s.io/client-go/rest"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	api "atoll.dev/atoll/api/imageregistry/v1alpha1"
	"atoll.dev/atoll/internal/controllers/libraryitem"
	"atoll.dev/atoll/internal/controllers/rollback"
	"atoll.dev/atoll/internal/kube/imageclaims"
	"atoll.dev/atoll/internal/storage/convert"
	"atoll.dev/atoll/internal/storage/csi"
	"atoll.dev/atoll/internal/storage/datastore"
	"atoll.dev/atoll/internal/storage/diskpush"
	"atoll.dev/atoll/internal/storage/images"
	"atoll.dev/atoll/internal/storage/library"
	"atoll.dev/atoll/internal/storage/stores"
)

// imageStore is the images of this host: it is the Host of the controllers of library items and of rollbacks, and
// what the CSI driver asks about images.
type imageStore struct {
	*images.Importer
	library *library.Library
	set     *stores.Set
	claims  *imageclaims.Reader
	node    string
	// registry is how the cluster's own registry is reached.
	registry *library.OwnRegistry
	// publisher logs in there as who may push.
	publisher func(ctx context.Context) (user, password string, err error)
	log       *slog.Logger
}

// Takes implements libraryitem.Host.
func (i *imageStore) Takes(item *api.ContentLibraryItem) bool {
	if v := item.Spec.Source.Volume; v != nil {
		s, id, err := i.set.Resolve(v.Snapshot)
		if err != nil {
			return false
		}
		_, err = s.SnapshotByID(context.Background(), id)
		return err == nil
	}
	return true
}

// Bring implements libraryitem.Host.
func (i *imageStore) Bring(ctx context.Context, item *api.ContentLibraryItem, guarded bool, told func(api.ItemProgress)) (libraryitem.Content, error) {
	source := i.source(item)
	source.Guarded = guarded
	if err := i.login(item, &source); err != nil {
		return libraryitem.Content{}, libraryitem.Permanent{Reason: api.ItemSourceBad, Err: err}
	}
	got, err := i.library.Fetch(ctx, string(item.UID), source, func(p library.Progress) {
		told(api.ItemProgress{Phase: string(p.Phase), BytesDone: p.Done, BytesTotal: p.Total})
	})
	switch {
	case err == nil:
		return i.pushed(ctx, item, content(got), told)
	case errors.Is(err, library.ErrWaiting):
		return libraryitem.Content{}, fmt.Errorf("%w: %w", libraryitem.ErrWaiting, err)
	case errors.Is(err, library.ErrChecksum):
		return libraryitem.Content{}, libraryitem.Permanent{Reason: api.ItemChecksum, Err: err}
	case errors.Is(err, library.ErrContent):
		return libraryitem.Content{}, libraryitem.Permanent{Reason: api.ItemContentBad, Err: err}
	case errors.Is(err, library.ErrSource):
		return libraryitem.Content{}, libraryitem.Permanent{Reason: api.ItemSourceBad, Err: err}
	}
	return libraryitem.Content{}, err
}

// pushed sends an item that was brought in to the project of its namespace, if it is to be there.
func (i *imageStore) pushed(ctx context.Context, item *api.ContentLibraryItem, got libraryitem.Content, told func(api.ItemProgress)) (libraryitem.Content, error) {
	to := item.Spec.Push
	if to == nil {
		return got, nil
	}
	if got.Digest = item.Status.Digest; got.Digest != "" { // it was pushed, and its specification has changed since
		return got, nil
	}
	if item.Namespace == "" || item.Namespace == atoll.RegistryLibrary || i.registry == nil {
		return got, libraryitem.Permanent{Reason: api.ItemPushRefused, Err: errors.New("spec.push is for items of namespaces; use a VirtualMachinePublishRequest")}
	}
	image, _, err := i.library.Open(string(item.UID), 0)
	if err != nil {
		return got, err
	}
	defer image.File.Close()
	name := path.Base(to.Repository) + ".qcow2"
	publisher := *i.registry
	publisher.Login = i.publisher
	got.Digest, err = diskpush.Push(ctx, diskpush.Target{
		Registry: &publisher, Reference: atoll.RegistryHost + "/" + item.Namespace + "/" + to.Repository + ":" + to.Tag,
	}, diskpush.Disk{File: image.File, Name: name, Annotations: map[string]string{
		api.ManifestFirmware: item.Spec.Firmware, api.ManifestDescription: item.Spec.Description,
		api.ManifestOSID: item.Spec.OS.ID, api.ManifestOSType: item.Spec.OS.Type, api.ManifestOSVersion: item.Spec.OS.Version,
	}}, func(done, total int64) {
		told(api.ItemProgress{Phase: api.ItemPushing, BytesDone: done, BytesTotal: total})
	})
	if errors.Is(err, diskpush.ErrRefused) {
		err = libraryitem.Permanent{Reason: api.ItemPushRefused, Err: err}
	}
	return got, err
}

// login lets items read what is their own in the cluster's registry: those of a namespace its project and the library,
// those of the cluster, which administrators make, all.
func (i *imageStore) login(item *api.ContentLibraryItem, source *library.Source) error {
	if source.OCI == nil || i.registry == nil {
		return nil
	}
	ref, err := source.OCI.Parse()
	if err != nil || ref.Context().RegistryStr() != atoll.RegistryHost {
		return nil // what is wrong with it is said when it is fetched
	}
	project, _, _ := strings.Cut(ref.Context().RepositoryStr(), "/")
	if item.Namespace != "" && project != item.Namespace && project != atoll.RegistryLibrary {
		return fmt.Errorf("images of namespace %s can come from the registry's projects %s and %s, not from %s", item.Namespace, item.Namespace, atoll.RegistryLibrary, project)
	}
	source.OCI.Own = i.registry
	return nil
}

// source is the source of an item as the library has it.
func (i *imageStore) source(item *api.ContentLibraryItem) library.Source {
	s := item.Spec.Source
	var out library.Source
	sum := func(c *api.Checksum) {
		if c != nil {
			out.Checksum = library.Checksum{Algorithm: or(c.Algorithm, "SHA256"), Value: c.Value}
		}
	}
	switch {
	case s.HTTP != nil:
		out.HTTP = &library.HTTP{URL: s.HTTP.URL, CA: s.HTTP.SSLCertificate}
		sum(s.HTTP.Checksum)
	case s.OCI != nil:
		out.OCI = &library.OCI{Reference: s.OCI.Reference, CA: s.OCI.SSLCertificate, PlainHTTP: s.OCI.PlainHTTP}
	case s.Upload != nil:
		out.Upload, out.FileName = &library.Upload{}, s.Upload.FileName
		sum(s.Upload.Checksum)
	case s.Volume != nil:
		out.FileName = item.Name + ".qcow2"
		out.Make = func(ctx context.Context, path string, progress func(done, total int64)) error {
			store, id, err := i.set.Resolve(s.Volume.Snapshot)
			if err != nil {
				return err
			}
			return convert.Snapshot(ctx, store, id, string(item.UID), path, progress)
		}
	}
	return out
}

func or(text, otherwise string) string {
	if text == "" {
		return otherwise
	}
	return text
}

// content is an item as its status has it.
func content(i library.Item) libraryitem.Content {
	out := libraryitem.Content{Type: api.ItemOVF, SHA256: i.SHA256, Bytes: i.Bytes, FileName: i.FileName}
	if i.Kind == library.KindISO {
		out.Type = api.ItemISO
	}
	for _, d := range i.Disks {
		out.Disks = append(out.Disks, api.ItemDisk{
			Name: d.Name, Format: string(d.Info.Format), Capacity: quantity(d.Size), ControllerType: d.Controller,
			ControllerBusNumber: int32(d.Bus), UnitNumber: int32(d.Unit),
		})
	}
	if o := i.OVF; o != nil {
		h := &api.ItemHardware{
			CPUs: int32(o.CPUs), Memory: quantity(o.Memory), Firmware: o.Firmware, SecureBoot: o.SecureBoot, Version: int32(o.HardwareVersion),
			OS:      api.OSInfo{ID: o.OSID, Type: o.OSType, Version: o.OSVersion},
			Product: api.ItemProduct(o.Product),
		}
		for _, p := range o.Properties {
			property := api.ItemProperty{Key: p.Key, Type: p.Type, UserConfigurable: p.UserConfigurable}
			if p.HasDefault {
				property.Default = &p.Default
			}
			h.Properties = append(h.Properties, property)
		}
		out.Hardware = h
	}
	return out
}

// Forget implements libraryitem.Host.
func (i *imageStore) Forget(ctx context.Context, gone func(uid string) bool) error {
	ids, err := i.library.Items()
	err = errors.Join(err, i.library.Sweep())
	for _, id := range ids {
		if gone(id) {
			err = errors.Join(err, i.library.Remove(id))
		}
	}
	for _, s := range i.set.All() {
		err = errors.Join(err, images.Forget(ctx, s, gone))
	}
	return err
}

// Claim implements csi.Images.
func (i *imageStore) Claim(ctx context.Context, namespace, claim string) (*csi.Image, error) {
	found, err := i.claims.Claim(ctx, namespace, claim)
	if err != nil || found == nil {
		return nil, err
	}
	return &csi.Image{Disk: images.Disk{Item: found.Item, Disk: found.Disk, Name: found.Name}, Size: found.Size}, nil
}

// Has implements rollback.Host.
func (i *imageStore) Has(handle string) bool {
	_, _, err := i.set.Resolve(handle)
	return err == nil
}

// Rollback implements rollback.Host.
func (i *imageStore) Rollback(ctx context.Context, volume, snapshot string) error {
	s, id, err := i.set.Resolve(volume)
	if err != nil {
		return err
	}
	store, of, err := stores.Split(snapshot)
	switch {
	case err != nil:
		return err
	case store != s.Name:
		return fmt.Errorf("%w: snapshot %s is on another datastore than volume %s", datastore.ErrInvalid, snapshot, volume)
	}
	_, err = s.Rollback(ctx, id, of)
	return err
}

// newImageStore opens the library in a directory.
func newImageStore(cfg library.Config, set *stores.Set, claims *imageclaims.Reader, node string, log *slog.Logger) (*imageStore, error) {
	if err := os.MkdirAll(filepath.Clean(cfg.Dir), 0o700); err != nil {
		return nil, fmt.Errorf("opening the image library: %w", err)
	}
	l, err := library.New(cfg)
	if err != nil {
		return nil, err
	}
	return &imageStore{Importer: images.New(l, log), library: l, set: set, claims: claims, node: node, log: log}, nil
}

// imageParts are the images of this host and what looks after them.
type imageParts struct {
	store     *imageStore
	items     *libraryitem.Controller
	rollbacks *rollback.Controller
}

func (a *Agent) images(client *rest.Config, set *stores.Set) (imageParts, error) {
	claims, err := imageclaims.New(client)
	if err != nil {
		return imageParts{}, err
	}
	own, publisher, err := a.ownRegistry(client)
	if err != nil {
		return imageParts{}, err
	}
	store, err := newImageStore(library.Config{
		Dir: a.cfg.ContentDir, Guarded: a.cfg.Network.cluster(),
	}, set, claims, a.cfg.NodeName, a.cfg.Logger)
	if err != nil {
		return imageParts{}, err
	}
	store.registry, store.publisher = own, publisher
	items, err := libraryitem.New(libraryitem.Config{Client: client, Node: a.cfg.NodeName, Host: store, Logger: a.cfg.Logger})
	if err != nil {
		return imageParts{}, err
	}
	rollbacks, err := rollback.New(rollback.Config{Client: client, Driver: csi.Name, Host: store, Logger: a.cfg.Logger})
	return imageParts{store: store, items: items, rollbacks: rollbacks}, err
}
