package image

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// writeRecipe makes a recipe directory; files maps names to contents.
func writeRecipe(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, content := range files {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func mustBuild(t *testing.T, dir, cache string) Result {
	t.Helper()
	recipe, err := Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	result, err := Build(t.Context(), recipe, Options{CacheDir: cache})
	if err != nil {
		t.Fatal(err)
	}
	return result
}

const example = `
names: [docker.io/library/example:1, docker.io/library/example:latest]
users: [{name: web, uid: 1000, gid: 1000, home: /srv}]
groups: [{name: web, gid: 1000}, {name: extra, gid: 50000, members: [web]}]
directories: [{path: /srv, mode: 0750, owner: "1000:50000"}]
files:
  - {path: /etc/motd, content: hello}
  - {path: /srv/www, source: www, owner: "1000"}
symlinks: [{target: etc/motd, path: /motd}, {target: motd, in: /etc, names: [issue, banner]}]
permissions: [{path: /etc/motd, mode: 0600, owner: "7:8"}]
config:
  entrypoint: [/bin/web]
  cmd: [-v]
  env: [A=b]
  user: web
  workdir: /srv
  exposedPorts: [80/tcp]
  volumes: [/data]
  stopSignal: SIGQUIT
  labels: {a: b}
`

func exampleRecipe(t *testing.T) string {
	return writeRecipe(t, map[string]string{RecipeFile: example, "www/index.html": "<h1>hi</h1>", "www/css/a.css": "b{}"})
}

func TestBuildMakesAnOCIArchive(t *testing.T) {
	result := mustBuild(t, exampleRecipe(t), t.TempDir())
	blobs, err := readBlobs(result.Archive)
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range blobs {
		if sum, ok := strings.CutPrefix(name, "blobs/sha256/"); ok {
			if got := sha256.Sum256(data); hex.EncodeToString(got[:]) != sum {
				t.Errorf("%s does not have its hash", name)
			}
		}
	}
	if !bytes.Contains(blobs["oci-layout"], []byte(`"1.0.0"`)) {
		t.Errorf("oci-layout is %q", blobs["oci-layout"])
	}
	var index v1.IndexManifest
	if err := json.Unmarshal(blobs["index.json"], &index); err != nil {
		t.Fatal(err)
	}
	ids := map[v1.Hash]bool{}
	for i, want := range []string{"docker.io/library/example:1", "docker.io/library/example:latest"} {
		image := index.Manifests[i]
		if image.Annotations["io.containerd.image.name"] != want {
			t.Errorf("image %d is named %v, want %s", i, image.Annotations, want)
		}
		if _, tag, _ := strings.Cut(want, ":"); image.Annotations["org.opencontainers.image.ref.name"] != tag {
			t.Errorf("image %d has the tag %v", i, image.Annotations)
		}
		var manifest v1.Manifest
		if err := json.Unmarshal(blobs[blobName(image.Digest)], &manifest); err != nil {
			t.Fatal(err)
		}
		ids[manifest.Config.Digest] = true
		var config v1.ConfigFile
		if err := json.Unmarshal(blobs[blobName(manifest.Config.Digest)], &config); err != nil {
			t.Fatal(err)
		}
		checkConfigFile(t, config, manifest)
		checkLayer(t, blobs[blobName(manifest.Layers[0].Digest)])
	}
	if len(ids) != 2 {
		t.Error("two names share one image ID")
	}
}

func checkConfigFile(t *testing.T, config v1.ConfigFile, manifest v1.Manifest) {
	t.Helper()
	if len(manifest.Layers) != 1 || len(config.RootFS.DiffIDs) != 1 || config.RootFS.DiffIDs[0] != manifest.Layers[0].Digest {
		t.Errorf("layers %v do not match diff ids %v", manifest.Layers, config.RootFS.DiffIDs)
	}
	c := config.Config
	_, port := c.ExposedPorts["80/tcp"]
	_, volume := c.Volumes["/data"]
	if !port || !volume || c.User != "web" || c.WorkingDir != "/srv" || c.StopSignal != "SIGQUIT" || c.Labels["a"] != "b" {
		t.Errorf("configuration is %+v", c)
	}
	if !slices.Equal(c.Entrypoint, []string{"/bin/web"}) || !slices.Equal(c.Cmd, []string{"-v"}) {
		t.Errorf("entrypoint %q, cmd %q", c.Entrypoint, c.Cmd)
	}
	if len(c.Env) != 2 || !strings.HasPrefix(c.Env[0], "PATH=") || c.Env[1] != "A=b" {
		t.Errorf("environment is %q", c.Env)
	}
}

func checkLayer(t *testing.T, layer []byte) {
	t.Helper()
	headers := map[string]*tar.Header{}
	tr := tar.NewReader(bytes.NewReader(layer))
	for {
		header, err := tr.Next()
		if err != nil {
			break
		}
		headers[header.Name] = header
	}
	for name, want := range map[string]struct {
		mode     int64
		uid, gid int
	}{
		"srv/":              {0o750, 1000, 50000},
		"srv/www/css/a.css": {0o644, 1000, 1000},
		"etc/motd":          {0o600, 7, 8},
		"etc/passwd":        {0o644, 0, 0},
		"etc/banner":        {0o777, 0, 0},
		"motd":              {0o777, 0, 0},
	} {
		header, ok := headers[name]
		if !ok || header.Mode != want.mode || header.Uid != want.uid || header.Gid != want.gid || !header.ModTime.Equal(fixedTime) {
			t.Errorf("%s: got %+v, want %+v", name, header, want)
		}
	}
}

func TestBuildIsDeterministicAndCached(t *testing.T) {
	dir, cache := exampleRecipe(t), t.TempDir()
	first := mustBuild(t, dir, cache)
	second := mustBuild(t, dir, cache)
	if first.Cached || !second.Cached || first.Archive != second.Archive {
		t.Errorf("first %+v, second %+v", first, second)
	}
	other := mustBuild(t, exampleRecipe(t), t.TempDir())
	a, err := fileSHA256(first.Archive)
	if err != nil {
		t.Fatal(err)
	}
	if b, err := fileSHA256(other.Archive); err != nil || a != b {
		t.Errorf("another machine's build differs: %s and %s, %v", a, b, err)
	}
	if err := os.WriteFile(filepath.Join(dir, "www/index.html"), []byte("changed"), 0o600); err != nil {
		t.Fatal(err)
	}
	if third := mustBuild(t, dir, cache); third.Cached || third.Archive == first.Archive {
		t.Error("a changed source did not change the image")
	}
	left, err := filepath.Glob(filepath.Join(cache, "images", "build-*"))
	if err != nil || len(left) > 0 {
		t.Errorf("work directories are left behind: %v %v", left, err)
	}
}

func TestBuildErrorsNameFileAndField(t *testing.T) {
	for want, lines := range map[string]string{
		"files[0].source":            "files: [{path: /a, source: missing}]",
		"permissions[0]: /missing":   "permissions: [{path: /missing, mode: 0600}]",
		"remove[0]: /x/* matches":    "remove: ['/x/*']",
		"symlinks[0]":                "directories: [{path: /d}]\nsymlinks: [{target: a, path: /d}]",
		"directories[1]":             "directories: [{path: /etc/x}, {path: /etc/passwd/x}]",
		"registry[0].recipe":         "registry: [{recipe: missing, root: /r, repository: a, tag: b}]",
		"go[0]: building ./missing":  "go: [{package: ./missing, output: /x}]",
		"c[0]: compiling missing.c:": "c: [{source: missing.c, output: /x}]",
	} {
		t.Run(want, func(t *testing.T) {
			dir := writeRecipe(t, map[string]string{RecipeFile: minimal + lines + "\n", "go.mod": "module x\n"})
			recipe, err := Load(dir)
			if err != nil {
				t.Fatal(err)
			}
			cache := t.TempDir()
			_, err = Build(t.Context(), recipe, Options{CacheDir: cache})
			if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), filepath.Join(dir, RecipeFile)) {
				t.Errorf("error %v does not name the file and %q", err, want)
			}
			if left, _ := filepath.Glob(filepath.Join(cache, "images", "*")); len(left) > 0 {
				t.Errorf("a failed build left %v", left)
			}
		})
	}
}

func TestBuildCompilesPrograms(t *testing.T) {
	dir := writeRecipe(t, map[string]string{
		RecipeFile: minimal + `
go: [{package: ./cmd, output: /bin/go-program}]
c: [{source: main.c, output: /bin/c-program, mode: 4755}]
`,
		"go.mod":      "module example.com/x\n",
		"cmd/main.go": "package main\n\nfunc main() {}\n",
		"main.c":      "int main(void) { return 0; }\n",
	})
	result := mustBuild(t, dir, t.TempDir())
	blobs, err := readBlobs(result.Archive)
	if err != nil {
		t.Fatal(err)
	}
	found := false
	for _, data := range blobs {
		if bytes.Contains(data, []byte("bin/go-program")) && bytes.Contains(data, []byte("bin/c-program")) {
			found = true
		}
	}
	if !found {
		t.Error("no layer holds both programs")
	}
}

func TestRegistryHoldsAnotherImage(t *testing.T) {
	dir := writeRecipe(t, map[string]string{
		RecipeFile:            minimal + "registry: [{recipe: inner, root: /var/registry, repository: sub/inner, tag: testing}]\n",
		"inner/" + RecipeFile: "names: [docker.io/library/inner:1]\nfiles: [{path: /a, content: b}]\n",
	})
	recipe, err := Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	inner := mustBuild(t, filepath.Join(dir, "inner"), t.TempDir())
	tr := emptyTree(t)
	if err := (nested{entry: recipe.Registry[0], archive: inner.Archive}).addTo(tr); err != nil {
		t.Fatal(err)
	}
	tag, err := tr.readFile("var/registry/sub/inner/manifests/testing")
	if err != nil {
		t.Fatal(err)
	}
	sum := strings.TrimPrefix(strings.TrimSpace(string(tag)), "sha256:")
	data, err := tr.readFile("var/registry/sub/inner/manifests/sha256/" + sum[:2] + "/" + sum + "/data")
	if err != nil {
		t.Fatal(err)
	}
	var manifest v1.Manifest
	if err := json.Unmarshal(data, &manifest); err != nil || manifest.MediaType == "" {
		t.Fatalf("manifest %s: %v", data, err)
	}
	for _, hash := range []v1.Hash{manifest.Config.Digest, manifest.Layers[0].Digest} {
		if _, err := tr.lookup("var/registry/sub/inner/blobs/sha256/" + hash.Hex[:2] + "/" + hash.Hex + "/data"); err != nil {
			t.Error(err)
		}
	}
}
