package archtest

import (
	"fmt"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "cowherd"

// layers are the packages from top to bottom, as ARCHITECTURE.md explains them. A package imports from lower lines
// only, so those on one line are siblings. A star stands for one element of the path.
var layers = [][]string{
	{"cmd/*"},
	{"demo", "bench/peers"},
	{"service", "bench"},
	{"bench/model"},
	{"bench/plot"},
	{"api"},
	{"export/*"},
	{"dm"},
	{"target/*"},
	{"target"},
	{"transfer", "trace"},
	{"cowstore", "clonemeta"},
	{"persistentdata"},
	{"kcopyd"},
	{"backend/*", "internal/fault"},
	{"block"},
	{"metrics"},
	{
		"internal/fixture", "internal/guest", "internal/invariant", "internal/percpu", "internal/size", "internal/sparse", "internal/stack",
	},
}

// apart are tools of the repository: they import no layer and no layer imports them.
var apart = []string{"internal/archtest", "internal/testsummary"}

// stdOnly are packages that import the standard library only.
var stdOnly = []string{"block"}

// confined are packages of others, with all below them, that only some packages may import. Of the standard library
// the package alone is meant: log is confined, log/slog is not.
var confined = []struct {
	path  string
	users []string
	why   string
}{
	{"github.com/alecthomas/kong", []string{"cmd/*"}, "flags are the command line's"},
	{"github.com/prometheus", nil, "it is for tests"},
	{"go.uber.org/goleak", nil, "it is for tests"},
	{"pgregory.net/rapid", nil, "it is for tests"},
	{"testing", []string{"backend/devicetest"}, "it is for tests"},
	{"C", nil, "the program is built without cgo"},
	{"os/exec", []string{"bench/peers", "internal/guest"}, "cowherd runs no programs"},
	{"expvar", nil, "an import alone adds it to the default HTTP server"},
	{"net/http/pprof", nil, "an import alone adds it to the default HTTP server"},
	{"log", nil, "use log/slog"},
	{"math/rand", nil, "use math/rand/v2"},
}

func TestImports(t *testing.T) {
	imports, err := readImports("../..")
	if err != nil {
		t.Fatal(err)
	}
	if len(imports["block"]) == 0 {
		t.Fatal("package block was not found: the test looks in the wrong place")
	}
	for _, v := range violations(imports) {
		t.Error(v)
	}
}

// TestViolations plants what TestImports must find.
func TestViolations(t *testing.T) {
	tests := []struct {
		name    string
		pkg     string
		imports []string
		want    []string // parts of the violations
	}{
		{"down", "service", []string{"cowherd/dm", "cowherd/internal/percpu", "net/http"}, nil},
		{"up", "kcopyd", []string{"cowherd/dm"}, []string{"kcopyd imports dm: imports point down"}},
		{"up from the bottom", "internal/percpu", []string{"cowherd/block"}, []string{"imports point down"}},
		{"siblings", "target/snapshot", []string{"cowherd/target/linear"}, []string{"imports point down"}},
		{"itself a root", "dm", []string{"cowherd"}, []string{"the root of the module"}},
		{"unknown package", "util", []string{"fmt"}, []string{"util is in no layer: add it"}},
		{"unknown import", "dm", []string{"cowherd/util"}, []string{"util is in no layer: add it"}},
		{"a tool imported", "dm", []string{"cowherd/internal/archtest"}, []string{"apart"}},
		{"a tool imports", "internal/testsummary", []string{"cowherd/block"}, []string{"apart"}},
		{"block, a module", "block", []string{"golang.org/x/sys/unix"}, []string{"standard library only"}},
		{"block, a layer", "block", []string{"cowherd/internal/percpu"}, []string{"standard library only"}},
		{"kong", "dm", []string{"github.com/alecthomas/kong/x"}, []string{"which only [cmd/*] may"}},
		{"kong at home", "cmd/cowherd", []string{"github.com/alecthomas/kong"}, nil},
		{"only alike in name", "dm", []string{"github.com/alecthomas/kongx", "log/slog", "math/rand/v2"}, nil},
		{"programs", "service", []string{"os/exec"}, []string{"runs no programs"}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			got := violations(map[string][]string{test.pkg: test.imports})
			if len(got) != len(test.want) {
				t.Fatalf("got %q, want %q", got, test.want)
			}
			for i, want := range test.want {
				if !strings.Contains(got[i], want) {
					t.Errorf("got %q, want %q in it", got[i], want)
				}
			}
		})
	}
}

// violations checks the imports of packages, given by their paths in the module.
func violations(imports map[string][]string) []string {
	var found []string
	for _, pkg := range slices.Sorted(maps.Keys(imports)) {
		if layerOf(pkg) < 0 && !slices.Contains(apart, pkg) {
			found = append(found, unknown(pkg))
			continue
		}
		for _, imported := range imports[pkg] {
			if v := violation(pkg, imported); v != "" {
				found = append(found, v)
			}
		}
	}
	return found
}

// violation tells what is wrong with one import of pkg; "" if nothing is.
func violation(pkg, imported string) string {
	inner, own := strings.CutPrefix(imported, module+"/")
	switch {
	case imported == module:
		return fmt.Sprintf("%s imports the root of the module: it has no package", pkg)
	case slices.Contains(stdOnly, pkg) && (own || isForeign(imported)):
		return fmt.Sprintf("%s imports %s: it imports the standard library only", pkg, imported)
	case own:
		return ownViolation(pkg, inner)
	}
	for _, c := range confined {
		below := isForeign(c.path) && strings.HasPrefix(imported, c.path+"/")
		if (imported == c.path || below) && !matchesAny(c.users, pkg) {
			return fmt.Sprintf("%s imports %s, which only %v may: %s", pkg, imported, c.users, c.why)
		}
	}
	return ""
}

// ownViolation is violation for an import from the module itself.
func ownViolation(pkg, imported string) string {
	from, to := layerOf(pkg), layerOf(imported)
	switch {
	case slices.Contains(apart, pkg) || slices.Contains(apart, imported):
		return fmt.Sprintf("%s imports %s: tools stand apart from the layers", pkg, imported)
	case to < 0:
		return unknown(imported)
	case to <= from:
		return fmt.Sprintf("%s imports %s: imports point down, and siblings do not know each other", pkg, imported)
	}
	return ""
}

func unknown(pkg string) string {
	return fmt.Sprintf("%s is in no layer: add it to the table in internal/archtest, and to ARCHITECTURE.md", pkg)
}

// layerOf is the index in layers of a package's layer; -1 if it has none.
func layerOf(pkg string) int {
	return slices.IndexFunc(layers, func(patterns []string) bool { return matchesAny(patterns, pkg) })
}

func matchesAny(patterns []string, pkg string) bool {
	return slices.ContainsFunc(patterns, func(pattern string) bool {
		ok, err := path.Match(pattern, pkg)
		return ok && err == nil
	})
}

// isForeign tells whether an import path is of another module: its first element has a dot.
func isForeign(imported string) bool {
	first, _, _ := strings.Cut(imported, "/")
	return strings.Contains(first, ".")
}

// readImports reads what the packages below root import, whatever platform or build tag a file is for. Test files are
// left out.
func readImports(root string) (map[string][]string, error) {
	imports := map[string][]string{}
	err := eachFile(root, func(file string) error {
		if strings.HasSuffix(file, "_test.go") {
			return nil
		}
		pkg, err := filepath.Rel(root, filepath.Dir(file))
		if err != nil {
			return err
		}
		found, err := importsOf(file)
		imports[pkg] = append(imports[pkg], found...)
		return err
	})
	for pkg, found := range imports {
		slices.Sort(found)
		imports[pkg] = slices.Compact(found)
	}
	return imports, err
}

// eachFile calls f for the Go files of the module at root. Nested modules are left out.
func eachFile(root string, f func(file string) error) error {
	return filepath.WalkDir(root, func(file string, entry fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case entry.IsDir() && file != root && isOutside(file):
			return filepath.SkipDir
		case entry.IsDir(), !strings.HasSuffix(file, ".go"):
			return nil
		}
		return f(file)
	})
}

// importsOf reads what one file imports.
func importsOf(file string) ([]string, error) {
	parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ImportsOnly)
	if err != nil {
		return nil, err
	}
	var imports []string
	for _, spec := range parsed.Imports {
		imported, err := strconv.Unquote(spec.Path.Value)
		if err != nil {
			return nil, fmt.Errorf("%s: import %s: %w", file, spec.Path.Value, err)
		}
		imports = append(imports, imported)
	}
	return imports, nil
}

// isOutside tells whether a directory is no part of the module's packages.
func isOutside(dir string) bool {
	name := filepath.Base(dir)
	if name == "testdata" || strings.HasPrefix(name, ".") || strings.HasPrefix(name, "_") {
		return true
	}
	_, err := os.Stat(filepath.Join(dir, "go.mod"))
	return err == nil
}
