package image

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const minimal = "names: [docker.io/library/x:1]\n"

func TestParseRefusesWhatIsWrong(t *testing.T) {
	tests := map[string]struct {
		recipe string
		want   []string
	}{
		"empty":                {"", []string{"the recipe is empty"}},
		"unknown field":        {minimal + "colour: blue\n", []string{"line 2", `unknown field "colour" in Recipe`}},
		"unknown nested field": {minimal + "config: {entrypiont: [a]}\n", []string{`unknown field "entrypiont" in Config`}},
		"two documents":        {minimal + "---\n" + minimal, []string{"more than one YAML document"}},
		"no name":              {"debian: [bash]\n", []string{"names: an image needs at least one name"}},
		"short name":           {"names: [busybox]\n", []string{"names[0]", "has no tag"}},
		"not a full name":      {"names: ['busybox:1']\n", []string{"names[0]", `write "docker.io/library/busybox:1"`}},
		"digest":               {"names: ['a.io/x:1@sha256:" + strings.Repeat("0", 64) + "']\n", []string{"names[0]", "has a digest"}},
		"name twice":           {"names: [a.io/x:1, a.io/x:1]\n", []string{"names[1]", "listed twice"}},
		"package name":         {minimal + "debian: ['--purge']\n", []string{`debian[0]: "--purge" is not a package name`}},
		"keep":                 {minimal + "keep: [fonts]\n", []string{"keep[0]"}},
		"go package":           {minimal + "go: [{package: -x, output: /x}]\n", []string{"go[0].package"}},
		"go output":            {minimal + "go: [{package: ./x, output: x}]\n", []string{"go[0].output"}},
		"c source":             {minimal + "c: [{output: /x}]\n", []string{"c[0].source"}},
		"mode":                 {minimal + "directories: [{path: /a, mode: 0999}]\n", []string{"line 2", `mode "0999"`}},
		"large mode":           {minimal + "directories: [{path: /a, mode: 17777}]\n", []string{`mode "17777"`}},
		"owner":                {minimal + "directories: [{path: /a, owner: root}]\n", []string{`owner "root"`}},
		"unclean path":         {minimal + "directories: [{path: /a/../b}]\n", []string{"directories[0].path"}},
		"file without content": {minimal + "files: [{path: /a}]\n", []string{"files[0]", "exactly one of content and source"}},
		"file with both":       {minimal + "files: [{path: /a, content: x, source: y}]\n", []string{"files[0]"}},
		"module escape":        {minimal + "files: [{path: /a, module: m, source: ../../etc/passwd}]\n", []string{"files[0].source", "leaves the module"}},
		"symlink":              {minimal + "symlinks: [{target: a, path: /b, names: [c]}]\n", []string{"symlinks[0]"}},
		"symlink name":         {minimal + "symlinks: [{target: a, in: /b, names: [c/d]}]\n", []string{"symlinks[0].names[0]"}},
		"permission":           {minimal + "permissions: [{path: /b}]\n", []string{"permissions[0]", "mode or owner"}},
		"pattern":              {minimal + "remove: ['/a[']\n", []string{"remove[0]"}},
		"user":                 {minimal + "users: [{name: 'a:b', uid: 1, gid: -1}]\n", []string{"users[0].name", "users[0]: uid and gid"}},
		"group":                {minimal + "groups: [{name: g, gid: 1, members: ['']}]\n", []string{"groups[0].members[0]"}},
		"env":                  {minimal + "config: {env: [PATH]}\n", []string{"config.env[0]"}},
		"port":                 {minimal + "config: {exposedPorts: [http]}\n", []string{"config.exposedPorts[0]"}},
		"registry":             {minimal + "registry: [{recipe: ../x, root: /r, repository: 'A', tag: t}]\n", []string{"registry[0]"}},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			_, err := Parse([]byte(test.recipe))
			if err == nil {
				t.Fatal("the recipe was accepted")
			}
			for _, want := range test.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("error %q does not mention %q", err, want)
				}
			}
		})
	}
}

func TestLoadNamesTheFile(t *testing.T) {
	dir := t.TempDir()
	if _, err := Load(dir); err == nil || !strings.Contains(err.Error(), filepath.Join(dir, RecipeFile)) {
		t.Errorf("missing file: %v", err)
	}
	if err := os.WriteFile(filepath.Join(dir, RecipeFile), []byte("names: []\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(dir); err == nil || !strings.Contains(err.Error(), filepath.Join(dir, RecipeFile)+": names") {
		t.Errorf("bad file: %v", err)
	}
}

func TestModesAreOctal(t *testing.T) {
	recipe, err := Parse([]byte(minimal + "directories: [{path: /a, mode: 1777}, {path: /b, mode: '0o750'}, {path: /c, mode: 0700}, {path: /d}]\n"))
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []int64{0o1777, 0o750, 0o700, 0o755} {
		if got := recipe.Directories[i].Mode.or(0o755); got != want {
			t.Errorf("directories[%d]: mode %o, want %o", i, got, want)
		}
	}
}

// The recipes of this repository must parse, whatever machine the test runs on.
func TestOwnRecipes(t *testing.T) {
	dirs, err := filepath.Glob("../../guestos/images/*/" + RecipeFile)
	if err != nil || len(dirs) == 0 {
		t.Fatalf("no recipes found: %v", err)
	}
	seen := map[string]string{}
	for _, file := range dirs {
		recipe, err := Load(filepath.Dir(file))
		if err != nil {
			t.Error(err)
		}
		for _, name := range recipe.Names {
			if other, ok := seen[name]; ok {
				t.Errorf("%s is a name of both %s and %s", name, other, file)
			}
			seen[name] = file
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(minimal))
	f.Add([]byte(minimal + "files: [{path: /a, content: x, mode: 4755, owner: 1:2}]\n"))
	f.Add([]byte(minimal + "symlinks: [{target: a, in: /b, names: [c]}]\nconfig: {env: [A=b]}\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		recipe, err := Parse(data)
		if err == nil && len(recipe.Names) == 0 {
			t.Error("a recipe without names was accepted")
		}
	})
}
