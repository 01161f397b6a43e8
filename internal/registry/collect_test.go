package registry

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"atoll.dev/atoll/internal/registry/store"
)

// age makes everything in a directory old.
func age(t *testing.T, dir string, by time.Duration) {
	t.Helper()
	old := time.Now().Add(-by)
	err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return os.Chtimes(path, old, old)
	})
	if err != nil {
		t.Fatal(err)
	}
}

// collect runs a collection, as if everything were old.
func (h *harness) collect(dryRun bool) store.Report {
	h.t.Helper()
	report, err := h.reg.Collect(h.t.Context(), dryRun)
	if err != nil {
		h.t.Fatal(err)
	}
	return report
}

// TestUntaggedIsKept: an image that a deployment names by its digest is there for a week after its tag went on.
func TestUntaggedIsKept(t *testing.T) {
	h := start(t)
	first := h.image(2000, 1)
	h.push("shop/web:1", first, h.as("olga"))
	h.push("shop/web:1", h.image(2000, 1), h.as("olga"))
	digest, err := first.Digest()
	if err != nil {
		t.Fatal(err)
	}
	day := 24 * time.Hour
	for _, c := range []struct {
		age  time.Duration
		kept bool
	}{{6 * day, true}, {8 * day, false}} {
		age(t, h.dir, c.age)
		h.collect(false)
		if _, err := remote.Head(h.ref("shop/web@"+digest.String()), h.as("olga")...); c.kept != (err == nil) {
			t.Errorf("after %s: %v", c.age, err)
		}
	}
}

func TestCollect(t *testing.T) {
	h := start(t)
	kept, gone := h.image(2000, 2), h.image(2000, 2)
	h.push("shop/web:1", kept, h.as("olga"))
	h.push("shop/web:2", gone, h.as("olga"))
	before, _ := h.reg.Usage(t.Context(), "shop")
	if err := remote.Delete(h.ref("shop/web:2"), h.as("olga")...); err != nil {
		t.Fatal(err)
	}
	if r := h.collect(false); r.Manifests+r.Layers+r.Blobs != 0 {
		t.Errorf("removed what is young: %+v", r)
	}
	age(t, h.dir, 8*24*time.Hour)
	dry := h.collect(true)
	if dry.Manifests != 1 || dry.Layers != 3 || dry.Blobs != 4 || dry.Bytes < 4000 {
		t.Errorf("would remove %+v", dry)
	}
	if got := h.collect(false); got.Manifests != dry.Manifests || got.Layers != dry.Layers || got.Blobs != dry.Blobs || got.Bytes != dry.Bytes {
		t.Errorf("removed %+v, announced %+v", got, dry)
	}
	if after, _ := h.reg.Usage(t.Context(), "shop"); after >= before || after == 0 {
		t.Errorf("used %d, before %d", after, before)
	}
	if err := h.pull("shop/web:1", h.as("olga")); err != nil {
		t.Errorf("what is tagged is gone: %v", err)
	}
	h.push("shop/web:2", gone, h.as("olga"))
	if err := h.pull("shop/web:2", h.as("olga")); err != nil {
		t.Error(err)
	}
}

func TestCollectKeepsWhatIsUsed(t *testing.T) {
	h := start(t)
	img := h.image(500, 1)
	digest, _ := img.Digest()
	// An index keeps its images, a subject what refers to it, and a pull by digest what has no tag.
	index := mutate.AppendManifests(empty.Index, mutate.IndexAddendum{Add: img})
	if err := remote.WriteIndex(h.ref("shop/multi:1"), index, h.as("olga")...); err != nil {
		t.Fatal(err)
	}
	desc, err := remote.Head(h.ref("shop/multi@"+digest.String()), h.as("olga")...)
	if err != nil {
		t.Fatal(err)
	}
	signature := mutate.Subject(h.image(300, 1), *desc).(v1.Image)
	signed, _ := signature.Digest()
	h.push("shop/multi@"+signed.String(), signature, h.as("olga"))
	pinned := h.image(400, 1)
	byDigest, _ := pinned.Digest()
	h.push("shop/pinned@"+byDigest.String(), pinned, h.as("olga"))
	age(t, h.dir, 8*24*time.Hour)
	if err := h.pull("shop/pinned@"+byDigest.String(), h.as("victor")); err != nil {
		t.Fatal(err)
	}
	if r := h.collect(false); r.Manifests != 0 || r.Blobs != 0 {
		t.Errorf("removed %+v", r)
	}
	_, token := h.token("olga", passwords()["olga"], "repository:shop/multi:pull")
	status, header, body := h.do(http.MethodGet, "/v2/shop/multi/referrers/"+digest.String(), token, nil, nil)
	if status != http.StatusOK || !strings.Contains(body, signed.String()) || header.Get("Content-Type") != "application/vnd.oci.image.index.v1+json" {
		t.Errorf("%d %s", status, body)
	}
	age(t, h.dir, 8*24*time.Hour)
	if r := h.collect(false); r.Manifests != 1 {
		t.Errorf("what nobody pulls stays: %+v", r)
	}
}

func TestCollectPurgesUploads(t *testing.T) {
	h := start(t)
	_, token := h.token("olga", passwords()["olga"], "repository:shop/web:pull,push")
	_, location := h.upload(token, "shop/web", "")
	if status, _, body := h.do(http.MethodPatch, location, token, strings.NewReader("half of a layer"), nil); status != http.StatusAccepted {
		t.Fatal(status, body)
	}
	if used, _ := h.reg.Usage(t.Context(), "shop"); used != 15 {
		t.Errorf("used %d", used)
	}
	age(t, h.dir, 25*time.Hour)
	if r := h.collect(false); r.Uploads != 1 || r.Bytes != 15 {
		t.Errorf("%+v", r)
	}
	if used, _ := h.reg.Usage(t.Context(), "shop"); used != 0 {
		t.Errorf("used %d", used)
	}
}

func TestOnlyOneCollection(t *testing.T) {
	h := start(t)
	var wg sync.WaitGroup
	var busy atomic.Int32
	for range 8 {
		wg.Go(func() {
			if _, err := h.reg.Collect(t.Context(), false); errors.Is(err, store.ErrCollecting) {
				busy.Add(1)
			} else if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}

// pushers are those who push while a registry collects. On a host where each push takes longer than the grace period
// none would succeed, so collections wait for one when many have failed.
type pushers struct{ failed atomic.Int32 } // since the last that succeeded

func (p *pushers) pushed(err error) {
	if err == nil {
		p.failed.Store(0)
	} else {
		p.failed.Add(1)
	}
}

func (p *pushers) wait(ctx context.Context) {
	for p.failed.Load() > 20 && ctx.Err() == nil {
		time.Sleep(time.Millisecond)
	}
}

// TestCollectBesidePushes pushes, deletes and pulls images that share layers while collections run all the time with a
// grace period that is far too short. A push may fail and be tried again, but what has succeeded must be whole.
func TestCollectBesidePushes(t *testing.T) {
	h := start(t, func(c *Config) { c.Grace = 60 * time.Millisecond })
	h.change(func() {
		h.configuration.GarbageCollection.UntaggedAge = &metav1.Duration{Duration: 60 * time.Millisecond}
	})
	shared := h.image(3000, 3)
	layers, err := shared.Layers()
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithTimeout(t.Context(), 10*time.Minute)
	defer stop()
	var wg sync.WaitGroup
	var runs, pushes, retries atomic.Int32
	var p pushers
	wg.Go(func() {
		for ctx.Err() == nil {
			p.wait(ctx)
			if _, err := h.reg.Collect(context.WithoutCancel(ctx), false); err != nil {
				t.Error(err)
			}
			runs.Add(1)
		}
	})
	for n := range 4 {
		wg.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				img, err := mutate.AppendLayers(empty.Image, layers[(n+i)%len(layers)], layers[(n+i+1)%len(layers)])
				if err != nil {
					t.Error(err)
					return
				}
				tag := fmt.Sprintf("shop/r%d:t%d", n, i%3)
				err = remote.Write(h.ref(tag), img, h.as("olga")...)
				p.pushed(err)
				if err != nil {
					retries.Add(1)
					continue
				}
				pushes.Add(1)
				if err := h.pull(tag, h.as("victor")); err != nil {
					t.Errorf("%s was pushed, and is not whole: %v", tag, err)
				}
				if i%2 == 0 {
					if err := remote.Delete(h.ref(tag), h.as("olga")...); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	for begin := time.Now(); ctx.Err() == nil; time.Sleep(20 * time.Millisecond) {
		if pushes.Load() >= 10 && runs.Load() >= 5 && time.Since(begin) > 6*time.Second {
			stop()
		}
	}
	wg.Wait()
	t.Logf("%d collections, %d pushes, %d tried again", runs.Load(), pushes.Load(), retries.Load())
	if pushes.Load() < 10 || runs.Load() < 5 {
		t.Error("too little happened for a test")
	}
	// What lost its last link within the grace period still counts, and would not anew.
	age(t, h.dir, time.Second)
	h.collect(false)
	counted, _ := h.reg.Usage(t.Context(), "shop")
	again := start(t, func(c *Config) { c.Dir = h.dir })
	if fresh, err := again.reg.Usage(t.Context(), "shop"); err != nil || fresh != counted {
		t.Errorf("counted %d, on disk %d, %v", counted, fresh, err)
	}
}

// killedEnv makes the test binary a registry that serves until it is killed, and collects for each line that it reads.
const killedEnv = "ATOLL_TEST_REGISTRY_DIR"

func TestMain(m *testing.M) {
	BridgeLogs(slog.New(slog.DiscardHandler))
	if dir := os.Getenv(killedEnv); dir != "" {
		serveUntilKilled(dir)
	}
	os.Exit(m.Run())
}

func serveUntilKilled(dir string) {
	h, err := open(dir, func(c *Config) { c.Grace = 30 * time.Millisecond })
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	h.change(func() {
		h.configuration.GarbageCollection.UntaggedAge = &metav1.Duration{Duration: 30 * time.Millisecond}
	})
	fmt.Println(h.host())
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		if _, err := h.reg.Collect(context.Background(), false); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println("collected")
	}
	os.Exit(0)
}

// TestKilled kills a registry that is pushed to and collects, again and again. Whatever it then serves is whole.
func TestKilled(t *testing.T) {
	dir := t.TempDir()
	whole, broken := 0, 0
	for round := range 8 {
		h := start(t, func(c *Config) { c.Dir = dir })
		if round > 0 {
			list, err := h.reg.store.Repositories("shop")
			if err != nil {
				t.Fatal(err)
			}
			for _, repo := range list {
				for _, tag := range repo.Tags {
					ref := repo.Name + ":" + tag.Name
					if _, err := remote.Head(h.ref(ref), h.as("olga")...); err != nil {
						continue // it is not served
					}
					if err := h.pull(ref, h.as("olga")); err != nil {
						t.Errorf("round %d: %s is served and not whole: %v", round, ref, err)
						broken++
						continue
					}
					whole++
				}
			}
			counted, err := h.reg.Usage(t.Context(), "shop")
			if err != nil || counted < 0 {
				t.Errorf("used %d, %v", counted, err)
			}
		}
		h.srv.Close()
		killWhilePushing(t, dir, time.Duration(150+97*round)*time.Millisecond)
	}
	t.Logf("%d images whole, %d not", whole, broken)
	if whole == 0 {
		t.Error("nothing was pushed")
	}
}

func killWhilePushing(t *testing.T, dir string, after time.Duration) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), killedEnv+"="+dir)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	if !lines.Scan() {
		t.Fatal("the registry says nothing")
	}
	host := lines.Text()
	h := &harness{t: t}
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	var p pushers
	wg.Go(func() {
		for ask := true; ask && ctx.Err() == nil; p.wait(ctx) {
			_, err := fmt.Fprintln(in)
			ask = err == nil && lines.Scan() // until it is killed
			if ask && lines.Text() != "collected" {
				t.Error(lines.Text())
			}
		}
	})
	first, pushed := make(chan struct{}), sync.Once{}
	for w := range 3 {
		wg.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				ref, err := name.ParseReference(fmt.Sprintf("%s/shop/w%d:t%d", host, w, i%4))
				if err != nil {
					t.Error(err)
					return
				}
				opts := append(h.plainLogin("olga"), remote.WithContext(ctx))
				err = remote.Write(ref, h.image(20_000, 2), opts...) // it is killed meanwhile
				p.pushed(err)
				if err == nil {
					pushed.Do(func() { close(first) })
				}
			}
		})
	}
	select {
	case <-first:
		time.Sleep(after)
	case <-time.After(10 * time.Minute):
		t.Error("nothing was pushed")
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Error(err)
	}
	_ = cmd.Wait()
	stop()
	wg.Wait()
}
