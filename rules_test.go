package atoll_test

import (
	"bufio"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// The rules of the repository. They look at source text only, but for one that
// asks the go command what atoll-pod depends on.

const module = "atoll.dev/atoll"

// Limits. They hold for what people write, not for generated files.
const (
	maxFileLines     = 500
	maxFunctionLines = 80
	maxPackageLines  = 3000
)

// file is one Go source file.
type file struct {
	path      string // relative to the repository
	dir       string
	fset      *token.FileSet
	ast       *ast.File
	lines     int
	test      bool
	generated bool
}

// TestRules checks all rules on one reading of the source.
func TestRules(t *testing.T) {
	files := load(t)
	for name, rule := range map[string]func(*testing.T, []file){
		"ImportDirections":          importDirections,
		"UpstreamIsHeldInOnePlace":  upstreamIsHeldInOnePlace,
		"AtollPodFreeOfKubernetes":  atollPodFreeOfKubernetes,
		"PackageDocs":               packageDocs,
		"PackageNames":              packageNames,
		"NoInit":                    noInit,
		"NoPackageState":            noPackageState,
		"Sizes":                     sizes,
		"NoUnfinishedWorkInTheText": noUnfinishedWork,
	} {
		t.Run(name, func(t *testing.T) { rule(t, files) })
	}
}

// load parses all Go files of this module.
func load(t *testing.T) []file {
	t.Helper()
	var out []file
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			name := d.Name()
			if path != "." && (strings.HasPrefix(name, ".") || name == "testdata" || name == "bin" || name == "build" || isModule(path)) {
				return filepath.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(path, ".go") {
			return nil
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		fset := token.NewFileSet()
		parsed, err := parser.ParseFile(fset, path, text, parser.ParseComments)
		if err != nil {
			return err
		}
		out = append(out, file{
			path: path, dir: filepath.Dir(path), fset: fset, ast: parsed,
			lines: strings.Count(string(text), "\n"),
			test:  strings.HasSuffix(path, "_test.go"), generated: ast.IsGenerated(parsed),
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// isModule tells whether a directory is a module of its own.
func isModule(dir string) bool {
	_, err := os.Stat(filepath.Join(dir, "go.mod"))
	return err == nil
}

// layer is a place in the design's order of imports: a package may import
// packages of its own layer only if same is true, and of lower ones always.
func layer(pkg string) (name string, level int) {
	switch first := strings.Split(pkg, "/"); {
	case first[0] == "cmd", first[0] == "bench", first[0] == "guestos", first[0] == "test":
		return "link target", 5
	case first[0] == "api":
		return "leaf", 0
	case first[0] != "internal" || len(first) < 2:
		return "", -1
	default:
		switch first[1] {
		case "cli":
			return "command line", 4
		case "server", "agent", "shim", "pool", "guest":
			return "role", 3
		case "kube", "controllers", "console", "vm", "network", "storage", "registry", "image", "identity":
			return "domain", 2
		case "preflight", "assets":
			return "foundation", 1
		case "supervise", "datadir", "linux":
			return "leaf", 0
		case "testkit":
			return "tests", 6
		}
	}
	return "", -1
}

// owner is the unit that roles and domains are separated by: internal/<name>.
func owner(pkg string) string {
	parts := strings.Split(pkg, "/")
	return strings.Join(parts[:min(2, len(parts))], "/")
}

// exceptions are imports against the direction, each with its reason.
func exceptions() map[[2]string]string {
	return map[[2]string]string{
		{"internal/kube", "internal/storage"}: "containerd's snapshotter is registered in the process that runs containerd",
		{"internal/pool", "internal/shim"}:    "the pool starts shim daemons",
		{"internal/storage", "internal/vm"}:   "internal/vm/qmp, the wire to QEMU, drives storage daemons as well",
		{"internal/pool", "internal/guest"}:   "internal/guest/channel says how guest init is told to rehearse",
		{"internal/shim", "internal/guest"}:   "internal/guest/channel is both ends of the guest channel",
		{"internal/shim", "internal/pool"}:    "a shim asks the pool for a micro-VM",
	}
}

// importDirections: imports go down only, roles and domains never import
// each other.
func importDirections(t *testing.T, files []file) {
	for _, f := range files {
		name, level := layer(f.dir)
		if level < 0 {
			if strings.HasPrefix(f.dir, "internal/") {
				t.Errorf("%s: package %s has no place in the layers of rules_test.go", f.path, f.dir)
			}
			continue
		}
		for _, spec := range f.ast.Imports {
			target, ours := strings.CutPrefix(strings.Trim(spec.Path.Value, `"`), module+"/")
			if !ours || owner(target) == owner(f.dir) {
				continue
			}
			targetName, targetLevel := layer(target)
			if targetName == "tests" && f.test {
				continue
			}
			if _, ok := exceptions()[[2]string{owner(f.dir), owner(target)}]; ok {
				continue
			}
			sideways := targetLevel == level && (name == "role" || name == "domain")
			if targetLevel > level || sideways {
				t.Errorf("%s: a %s imports the %s %s", f.path, name, targetName, target)
			}
		}
	}
}

// upstreamIsHeldInOnePlace: only internal/kube imports the servers of
// Kubernetes, etcd and containerd.
func upstreamIsHeldInOnePlace(t *testing.T, files []file) {
	upstream := regexp.MustCompile(`^(k8s\.io/kubernetes|go\.etcd\.io/etcd/server|github\.com/containerd/containerd/v2/cmd/containerd)/`)
	for _, f := range files {
		if strings.HasPrefix(f.dir, "internal/kube") || strings.HasPrefix(f.dir, "test") {
			continue
		}
		for _, spec := range f.ast.Imports {
			if path := strings.Trim(spec.Path.Value, `"`); upstream.MatchString(path + "/") {
				t.Errorf("%s imports %s; only internal/kube may", f.path, path)
			}
		}
	}
}

// atollPodFreeOfKubernetes: what runs once per pod stays small.
func atollPodFreeOfKubernetes(t *testing.T, _ []file) {
	out, err := exec.Command("go", "list", "-deps", "./cmd/atoll-pod").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	for line := range strings.Lines(string(out)) {
		if strings.HasPrefix(line, "k8s.io/") || strings.HasPrefix(line, "sigs.k8s.io/") {
			t.Errorf("cmd/atoll-pod depends on %s", strings.TrimSpace(line))
		}
	}
}

// packageDocs: every package says what it is.
func packageDocs(t *testing.T, files []file) {
	documented := map[string]bool{}
	for _, f := range files {
		if f.test || f.generated {
			continue
		}
		words := 0
		if f.ast.Doc != nil {
			words = len(strings.Fields(f.ast.Doc.Text()))
		}
		documented[f.dir] = documented[f.dir] || words >= 10
	}
	for dir, ok := range documented {
		if !ok {
			t.Errorf("package %s has no package documentation", dir)
		}
	}
}

// packageNames: no package called by what it is not.
func packageNames(t *testing.T, files []file) {
	for _, f := range files {
		switch filepath.Base(f.dir) {
		case "util", "utils", "common", "helpers", "helper", "misc", "shared":
			t.Errorf("%s: the package name says nothing", f.path)
		}
	}
}

// noInit: nothing happens before main but what libraries do.
func noInit(t *testing.T, files []file) {
	for _, f := range files {
		if f.generated {
			continue
		}
		for _, d := range f.ast.Decls {
			if fn, ok := d.(*ast.FuncDecl); ok && fn.Recv == nil && fn.Name.Name == "init" {
				t.Errorf("%s: init function", f.fset.Position(fn.Pos()))
			}
		}
	}
}

// noPackageState: package-level variables are constants in all but name.
func noPackageState(t *testing.T, files []file) {
	written := map[string][]*ast.Ident{} // by directory
	for _, f := range files {
		ast.Inspect(f.ast, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.AssignStmt:
				if n.Tok != token.DEFINE {
					for _, left := range n.Lhs {
						written[f.dir] = append(written[f.dir], root(left))
					}
				}
			case *ast.IncDecStmt:
				written[f.dir] = append(written[f.dir], root(n.X))
			case *ast.UnaryExpr:
				if n.Op == token.AND {
					written[f.dir] = append(written[f.dir], root(n.X))
				}
			}
			return true
		})
	}
	for _, f := range files {
		if f.generated || f.test {
			continue
		}
		for _, d := range f.ast.Decls {
			group, ok := d.(*ast.GenDecl)
			if !ok || group.Tok != token.VAR {
				continue
			}
			for _, s := range group.Specs {
				spec := s.(*ast.ValueSpec)
				for _, name := range spec.Names {
					if name.Name == "_" { // checks that a type has an interface's methods
						continue
					}
					if isSync(spec.Type) || slices.ContainsFunc(written[f.dir], func(w *ast.Ident) bool { return means(w, name.Name, spec) }) {
						t.Errorf("%s: package-level state %s", f.fset.Position(name.Pos()), name.Name)
					}
				}
			}
		}
	}
}

// root returns the variable an expression is part of.
func root(e ast.Expr) *ast.Ident {
	for {
		switch x := e.(type) {
		case *ast.Ident:
			return x
		case *ast.SelectorExpr:
			e = x.X
		case *ast.IndexExpr:
			e = x.X
		case *ast.StarExpr:
			e = x.X
		case *ast.ParenExpr:
			e = x.X
		case *ast.SliceExpr:
			e = x.X
		default:
			return nil
		}
	}
}

// means tells whether an identifier is the package-level variable that spec
// declares, and not a local one of the same name. The parser resolves names
// within a file only; what it leaves open is taken for the variable.
func means(id *ast.Ident, name string, spec *ast.ValueSpec) bool {
	return id != nil && id.Name == name && (id.Obj == nil || id.Obj.Decl == spec)
}

// isSync tells whether a type is made for being shared and changed.
func isSync(e ast.Expr) bool {
	sel, ok := e.(*ast.SelectorExpr)
	if !ok {
		return false
	}
	pkg, ok := sel.X.(*ast.Ident)
	return ok && (pkg.Name == "sync" || pkg.Name == "atomic")
}

// sizes: files, functions and packages stay small enough to read.
func sizes(t *testing.T, files []file) {
	packages := map[string]int{}
	for _, f := range files {
		if f.generated {
			continue
		}
		if !f.test {
			packages[f.dir] += f.lines
		}
		if f.lines > maxFileLines {
			t.Errorf("%s has %d lines, the limit is %d", f.path, f.lines, maxFileLines)
		}
		for _, d := range f.ast.Decls {
			fn, ok := d.(*ast.FuncDecl)
			if !ok || f.test || fn.Body == nil || len(fn.Body.List) == 1 { // one statement is a table
				continue
			}
			if n := f.fset.Position(fn.End()).Line - f.fset.Position(fn.Pos()).Line + 1; n > maxFunctionLines {
				t.Errorf("%s: function %s has %d lines, the limit is %d", f.fset.Position(fn.Pos()), fn.Name.Name, n, maxFunctionLines)
			}
		}
	}
	for dir, lines := range packages {
		if lines > maxPackageLines {
			t.Errorf("package %s has %d lines, the limit is %d", dir, lines, maxPackageLines)
		}
	}
}

// noUnfinishedWork: no unfinished work and no path of one person's machine.
func noUnfinishedWork(t *testing.T, _ []file) {
	unfinished := regexp.MustCompile(`\b(TODO|FIXME|XXX|HACK)\b`)
	personal := regexp.MustCompile(`(^|[^\w.-])/(work/(main|shared)|root/go|home/[a-z]+/|tmp/atoll)`)
	out, err := exec.Command("git", "ls-files", "--cached", "--others", "--exclude-standard").Output()
	if err != nil {
		t.Fatalf("listing files: %v", err)
	}
	for line := range strings.Lines(string(out)) {
		path := strings.TrimSpace(line)
		switch filepath.Ext(path) {
		case ".go", ".md", ".sh", ".yaml", ".yml", ".c", ".proto", "":
		default:
			continue
		}
		if path == "rules_test.go" || strings.Contains(path, "testdata/") {
			continue
		}
		f, err := os.Open(path)
		if err != nil {
			continue // removed, but not committed yet
		}
		scanner := bufio.NewScanner(f)
		scanner.Buffer(nil, 1<<20)
		for n := 1; scanner.Scan(); n++ {
			for what, rule := range map[string]*regexp.Regexp{"unfinished work": unfinished, "a path of one machine": personal} {
				if found := rule.FindString(scanner.Text()); found != "" {
					t.Errorf("%s:%d: %s: %s", path, n, what, strings.TrimSpace(found))
				}
			}
		}
		if err := scanner.Err(); err != nil {
			t.Errorf("%s: %v", path, err)
		}
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	}
}
