package registry

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"path/filepath"
	"sync"
	"time"

	"github.com/distribution/distribution/v3/configuration"
	v2 "github.com/distribution/distribution/v3/registry/api/v2"
	"github.com/distribution/distribution/v3/registry/handlers"
	storagedriver "github.com/distribution/distribution/v3/registry/storage/driver"
	"github.com/distribution/distribution/v3/registry/storage/driver/factory"
	"github.com/gorilla/mux"
	"golang.org/x/time/rate"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/internal/registry/disks"
	"atoll.dev/atoll/internal/registry/store"
)

// Config of a registry.
type Config struct {
	// Dir is where images are kept. It is made when missing.
	Dir string
	// Authority is the API server, Directory what is known of its objects.
	Authority Authority
	Directory Directory
	// People are asked for those who log in with a password; nil knows none.
	People People
	// Changed, when set, is called after tags of a project were pushed or removed. It must not wait.
	Changed func(project string)
	// CollectEvery is the pause between two collections of what is unused, one hour when zero.
	CollectEvery time.Duration
	// Grace, UploadAge and Reserve are those of the store.
	Grace, UploadAge time.Duration
	Reserve          int64
	Logger           *slog.Logger
}

// Registry is the embedded registry.
type Registry struct {
	cfg    Config
	store  *store.Store
	app    http.Handler
	stop   func() error
	router *mux.Router
	issuer *issuer
	rights *rights
	disks  *disks.Finder
	now    func() time.Time
	// reviews are questions to the API server by source, bodies the bytes of manifests by project, senders by identity.
	reviews, bodies, senders    *budget
	questions                   *rate.Limiter // about robot accounts
	manifestWithin, stallWithin time.Duration
	lingerWithin                time.Duration // how long the rest of an upload that was refused is read

	repositories [64]sync.Mutex // of what changes manifests, by hash of the repository
}

// New opens the registry. It serves as soon as it is made; Run does what has to be done from time to time.
func New(cfg Config) (*Registry, error) {
	if cfg.Authority == nil || cfg.Directory == nil {
		return nil, errors.New("registry: Authority and Directory must be set")
	}
	if cfg.CollectEvery == 0 {
		cfg.CollectEvery = time.Hour
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Changed == nil {
		cfg.Changed = func(string) {}
	}
	r := &Registry{cfg: cfg, now: time.Now, manifestWithin: manifestWithin, stallWithin: stallWithin, lingerWithin: lingerWithin, router: v2.RouterWithPrefix("")}
	r.reviews = newBudget(maxReviews, maxReviewsPerSource)
	r.questions = rate.NewLimiter(robotQuestions, robotQuestions)
	r.bodies, r.senders = newBudget(maxBodies, maxBodiesPerProject), newBudget(maxBodies, maxBodiesPerProject)
	r.issuer = newIssuer(func() time.Time { return r.now() })
	r.rights = &rights{authority: cfg.Authority, now: func() time.Time { return r.now() }}
	var err error
	r.store, err = store.New(store.Config{
		Dir: cfg.Dir, Quota: r.quota, Grace: cfg.Grace, UploadAge: cfg.UploadAge, Reserve: cfg.Reserve, Logger: cfg.Logger,
	})
	if err != nil {
		return nil, err
	}
	r.disks = disks.NewFinder(r.store)
	app, err := newApp(r.store.Driver())
	if err != nil {
		return nil, fmt.Errorf("registry: %w", err)
	}
	r.app, r.stop = app, app.Shutdown
	return r, nil
}

// made is a factory of one driver.
type made struct{ driver storagedriver.StorageDriver }

// Create implements factory.StorageDriverFactory.
func (m made) Create(context.Context, map[string]any) (storagedriver.StorageDriver, error) {
	return m.driver, nil
}

// newApp makes distribution's handler. It has no access control of its own: serveV2 is before it.
func newApp(driver storagedriver.StorageDriver) (app *handlers.App, err error) {
	defer func() { // it reports what is wrong with its configuration so
		if p := recover(); p != nil {
			err = fmt.Errorf("configuring distribution: %v", p)
		}
	}()
	name := "atoll-" + rand.Text() // drivers are known by name in the whole process
	factory.Register(name, made{driver})
	cfg := &configuration.Configuration{
		Storage: configuration.Storage{
			name:       configuration.Parameters{},
			"delete":   configuration.Parameters{"enabled": true},
			"redirect": configuration.Parameters{"disable": true},
			"maintenance": configuration.Parameters{"uploadpurging": map[any]any{
				"enabled": false, "age": "24h", "interval": "24h", "dryrun": false, // collections do it
			}},
		},
	}
	// A layer that names where clients get it is not looked for in the repository: by its digest it could be another
	// project's, which a host has already.
	cfg.Validation.Manifests.URLs.Deny = []string{".*"}
	cfg.HTTP.Secret = rand.Text()
	cfg.HTTP.RelativeURLs = true
	return handlers.NewApp(context.Background(), cfg), nil
}

// settings of a project. The library is nobody's: a namespace that has its name says nothing about it.
func (r *Registry) settings(project string) atoll.NamespaceRegistry {
	if project == atoll.RegistryLibrary {
		return atoll.NamespaceRegistry{}
	}
	return r.cfg.Directory.Settings(project)
}

func (r *Registry) quota(project string) (int64, bool) {
	if q := r.settings(project).Quota; q != nil {
		return q.Value(), true
	}
	return 0, false
}

// Usage is how many bytes a project takes.
func (r *Registry) Usage(_ context.Context, project string) (int64, error) {
	return r.store.Usage(project)
}

// Deleted puts the images of the namespace with a uid aside, which has been deleted. There may be another of its name by
// now, whose images stay.
func (r *Registry) Deleted(project, uid string) error {
	if project == atoll.RegistryLibrary {
		return nil
	}
	return r.store.Remove(project, uid)
}

// Forget puts the images of a namespace aside that is not there, unless one is that they are of.
func (r *Registry) Forget(project string) error {
	owner, err := r.store.Owner(project) // before anybody is asked: who comes after that is not removed
	if err != nil {
		return err
	}
	if uid, ok := r.cfg.Directory.Namespace(project); ok && uid == owner {
		return nil // Deleted follows if it is known to be there for too long
	}
	return r.Deleted(project, owner)
}

// ErrNotKnown says that a namespace is not known of, yet or any more.
var ErrNotKnown = errors.New("the registry does not know the namespace")

// ErrExternal says that the cluster uses another registry.
var ErrExternal = errors.New("the cluster uses an external registry in place of its own")

// Disks are the tags of a project that are disks of virtual machines. unseen of its older tags were not looked at.
func (r *Registry) Disks(ctx context.Context, project string) (found []disks.Disk, unseen int, err error) {
	if r.cfg.Directory.Configuration().External != nil {
		return nil, 0, ErrExternal
	}
	owner, err := r.owner(project)
	if err != nil {
		return nil, 0, err
	}
	if err := r.store.Own(project, owner); err != nil {
		return nil, 0, err
	}
	return r.disks.Find(ctx, project)
}

// owner is whom a project belongs to now.
func (r *Registry) owner(project string) (string, error) {
	if project == atoll.RegistryLibrary {
		return atoll.RegistryLibrary, nil
	}
	uid, ok := r.cfg.Directory.Namespace(project)
	if !ok {
		return "", fmt.Errorf("%w %s", ErrNotKnown, project)
	}
	return uid, nil
}

// Tagged tells whether a project has a tag, whatever it is.
func (r *Registry) Tagged(project, repository, tag string) (bool, error) {
	owner, err := r.owner(project)
	if err != nil {
		return false, err
	}
	if err := r.store.Own(project, owner); err != nil {
		return false, err
	}
	_, ok, err := r.store.Tag(project+"/"+repository, tag)
	return ok, err
}

// Run collects from time to time, and removes projects whose namespace has gone. It holds until ctx ends.
func (r *Registry) Run(ctx context.Context) error {
	defer func() { _ = r.stop() }() // it only ends what there is none of
	tick := time.NewTicker(r.cfg.CollectEvery)
	defer tick.Stop()
	for {
		r.forgetOthers()
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if _, err := r.Collect(ctx, false); err != nil && ctx.Err() == nil && !errors.Is(err, store.ErrCollecting) {
			r.cfg.Logger.Error("registry collection failed", "error", err)
		}
	}
}

// forgetOthers puts projects aside whose namespace was deleted while nobody looked.
func (r *Registry) forgetOthers() {
	projects, err := r.store.Projects()
	for _, p := range projects {
		owner, unknown := r.store.Owner(p) // first, see Forget
		if unknown != nil {
			err = errors.Join(err, unknown)
			continue
		}
		if p != atoll.RegistryLibrary && !r.cfg.Directory.Exists(p) {
			err = errors.Join(err, r.Deleted(p, owner))
		}
	}
	if err != nil {
		r.cfg.Logger.Error("registry projects without a namespace stay", "error", err)
	}
}

// Collect applies retention everywhere and removes what nobody uses.
func (r *Registry) Collect(ctx context.Context, dryRun bool) (store.Report, error) {
	if !dryRun {
		if err := r.tidy(); err != nil {
			return store.Report{}, err
		}
	}
	opts := store.Options{DryRun: dryRun}
	if age := r.cfg.Directory.Configuration().GarbageCollection.UntaggedAge; age != nil {
		opts.UntaggedAge = age.Duration
	}
	report, err := r.store.Collect(ctx, opts)
	if err == nil {
		r.cfg.Logger.Info("registry collected", "dryRun", dryRun, "manifests", report.Manifests, "layers", report.Layers,
			"blobs", report.Blobs, "uploads", report.Uploads, "bytes", report.Bytes, "seconds", report.Seconds)
	}
	return report, err
}

// tidy applies retention to every repository.
func (r *Registry) tidy() error {
	projects, err := r.store.Projects()
	if err != nil {
		return err
	}
	for _, p := range projects {
		if len(r.settings(p).Retention) == 0 {
			continue
		}
		list, err := r.store.Repositories(p)
		if err != nil {
			return err
		}
		for _, repo := range list {
			if err := r.retain(p, filepath.ToSlash(repo.Name)); err != nil {
				return err
			}
		}
	}
	return nil
}
