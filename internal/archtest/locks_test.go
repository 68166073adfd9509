package archtest

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// A lock annotation stands alone on its comment's line: the tool takes all that follows the colon for the lock's name,
// and passes over an annotation that something else comes before.
var (
	annotation  = regexp.MustCompile(`\+checklocks[\w:]`)
	wellWritten = regexp.MustCompile(`^// \+checklocks(\w*:[\w.=]+|(ignore|force|fail)\b.*)$`)
)

// TestLockAnnotations finds annotations that checklocks would pass over in silence.
func TestLockAnnotations(t *testing.T) {
	err := eachFile("../..", func(file string) error {
		found, err := silentAnnotations(file, nil)
		for _, f := range found {
			t.Error(strings.TrimPrefix(f, "../../"))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestSilentAnnotations plants what TestLockAnnotations must find.
func TestSilentAnnotations(t *testing.T) {
	tests := []struct {
		name   string
		source string
		want   []string // parts of what is found
	}{
		{"behind the field", "type s struct {\n a int // +checklocks:mu\n}", nil},
		{"above the field", "type s struct {\n // a is.\n //\n // +checklocks:mu\n a int\n}", nil},
		{"several names, no annotation", "type s struct { a, b int }", nil},
		{"an explained exemption", "type s struct {\n a int // +checklocksignore: set once\n}", nil},
		{"in words", "// f carries +checklocks.\nfunc f() {}", nil},
		{"function", "// f is.\n//\n// +checklocks:s.mu\nfunc f() {}", nil},
		{"words behind", "type s struct {\n a int // +checklocks:mu the first\n}", []string{"p.go:3:"}},
		{"words before", "type s struct {\n a int // the first; +checklocks:mu\n}", []string{"p.go:3:"}},
		{"no blank", "type s struct {\n a int //+checklocks:mu\n}", []string{"p.go:3:"}},
		{"several names before", "type s struct {\n a, b int\n c int // +checklocks:mu\n}",
			[]string{"p.go:3:2: one field a line"}},
		{"several names annotated", "type s struct {\n // +checklocks:mu\n a, b int\n}",
			[]string{"p.go:4:2: one field a line"}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			got, err := silentAnnotations("p.go", "package p\n"+test.source)
			if err != nil {
				t.Fatal(err)
			}
			if len(got) != len(test.want) {
				t.Fatalf("got %q, want %q", got, test.want)
			}
			for i, want := range test.want {
				if !strings.HasPrefix(got[i], want) {
					t.Errorf("got %q, want %q at its begin", got[i], want)
				}
			}
		})
	}
}

// silentAnnotations finds the annotations of one file that the tool would not see. source is as in go/parser.
func silentAnnotations(file string, source any) ([]string, error) {
	files := token.NewFileSet()
	parsed, err := parser.ParseFile(files, file, source, parser.ParseComments|parser.SkipObjectResolution)
	if err != nil {
		return nil, err
	}
	var found []string
	for _, group := range parsed.Comments {
		for _, c := range group.List {
			if annotation.MatchString(c.Text) && !wellWritten.MatchString(c.Text) {
				found = append(found, fmt.Sprintf("%v: a lock annotation stands alone on its line", files.Position(c.Pos())))
			}
		}
	}
	ast.Inspect(parsed, func(n ast.Node) bool {
		s, ok := n.(*ast.StructType)
		if !ok || !isAnnotated(s) {
			return true
		}
		for _, field := range s.Fields.List {
			if len(field.Names) > 1 {
				found = append(found, fmt.Sprintf("%v: one field a line in a struct with lock annotations: "+
					"the tool counts declarations, and mistakes the fields that follow", files.Position(field.Pos())))
			}
		}
		return true
	})
	return found, nil
}

// isAnnotated tells whether a field of s has a lock annotation.
func isAnnotated(s *ast.StructType) bool {
	matches := func(c *ast.Comment) bool { return annotation.MatchString(c.Text) }
	for _, field := range s.Fields.List {
		for _, group := range []*ast.CommentGroup{field.Doc, field.Comment} {
			if group != nil && slices.ContainsFunc(group.List, matches) {
				return true
			}
		}
	}
	return false
}
