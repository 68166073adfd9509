package main

import (
	"io"
	"os"
	"os/exec"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/alecthomas/kong"
	"pgregory.net/rapid"
)

// byKong has kong parse a line.
func byKong(words []string) (c *cli, command string, ok bool) {
	c = &cli{}
	root, options := c.grammarFor(words)
	options = append(options, kong.Writers(io.Discard, io.Discard), kong.Exit(func(int) { panic(exited(0)) }))
	parser, err := kong.New(root, options...)
	if err != nil {
		panic(err)
	}
	defer func() {
		if _, is := recover().(exited); is { // it was --help
			ok = false
		}
	}()
	parsed, err := parser.Parse(words)
	if err != nil {
		return c, "", false
	}
	return c, parsed.Selected().Path(), true
}

// TestPlain: what is read without kong is what kong reads, whatever is on the line.
func TestPlain(t *testing.T) {
	model, err := kong.New(&cli{})
	if err != nil {
		t.Fatal(err)
	}
	var commands [][]string
	flags := map[string][]string{}
	var visit func(n *kong.Node, path []string, above []string)
	visit = func(n *kong.Node, path, above []string) {
		for _, f := range n.Flags {
			above = append(slices.Clip(above), "--"+f.Name)
			if f.Short != 0 {
				above = append(above, "-"+string(f.Short))
			}
			if f.Tag.Negatable != "" {
				above = append(above, "--no-"+f.Name)
			}
		}
		if n.Type == kong.CommandNode {
			commands = append(commands, path)
			flags[strings.Join(path, " ")] = above
		}
		for _, child := range n.Children {
			visit(child, append(slices.Clip(path), child.Name), above)
		}
	}
	visit(model.Model.Node, nil, nil)
	values := []string{
		"a", "b/c", "", "-", "--", "7", "010", "1_000", "-3", "4k", "true", "false", "auto", "json", "clone", "off", "on", "50%", "1s",
		"=", "a=b", "a,b", "help", "ls", "--help", "-h", "-qq", "--json=false", "--no-json", "--colour", "$x", "${x}", "@a",
	}
	plain := 0
	rapid.Check(t, func(t *rapid.T) {
		words := slices.Clone(rapid.SampledFrom(commands).Draw(t, "command"))
		known := flags[strings.Join(words, " ")]
		for range rapid.IntRange(0, 6).Draw(t, "count") {
			switch rapid.IntRange(0, 3).Draw(t, "kind") {
			case 0:
				words = append(words, rapid.SampledFrom(known).Draw(t, "flag"))
			case 1:
				words = append(words, rapid.SampledFrom(known).Draw(t, "flag")+"="+rapid.SampledFrom(values).Draw(t, "value"))
			default:
				words = append(words, rapid.SampledFrom(values).Draw(t, "word"))
			}
		}
		got := &cli{}
		command, ok := got.parsePlain(words)
		if !ok {
			return
		}
		plain++
		want, path, ok := byKong(words)
		if !ok {
			t.Fatalf("%q: kong refuses it", words)
		}
		at := strings.Fields(path)
		if commandAt(got, at) != command {
			t.Fatalf("%q: %T runs, and by kong %q", words, command, path)
		}
		// Only the command's own defaults count, and what it has from those above it.
		if byKong := commandAt(want, at); !reflect.DeepEqual(command, byKong) || got.common != want.common ||
			got.Dm.outputFlags != want.Dm.outputFlags || !reflect.DeepEqual(got.Dm.dmFlags, want.Dm.dmFlags) {
			t.Fatalf("%q: %+v, and by kong %+v", words, command, byKong)
		}
	})
	if plain < 5 {
		t.Errorf("%d lines were plain", plain)
	}
}

// commandAt is the part of a grammar that is the command with a path.
func commandAt(c *cli, path []string) any {
	part := reflect.ValueOf(c).Elem()
	for _, name := range path {
		for i := range part.NumField() {
			f := part.Type().Field(i)
			if own, ok := f.Tag.Lookup("name"); name == own || !ok && name == commandName(f.Name) {
				part = part.Field(i)
				break
			}
		}
	}
	return part.Addr().Interface()
}

// TestPlainLines: the lines that have to start fast are plain, and what only kong knows is not.
func TestPlainLines(t *testing.T) {
	for line, want := range map[string]bool{
		"version":                          true,
		"version --json":                   true,
		"ls -q":                            true,
		"copy a b":                         true,
		"copy --quiet a b":                 true,
		"copy a b --no-flush --rate=5M":    true,
		"copy a --method clone -q b":       true,
		"copy a b --queues 4 --control s":  true,
		"status vm":                        true,
		"cow info f":                       true,
		"snapshot vm@a --chunk 8k":         true,
		"":                                 false,
		"--help":                           false,
		"help copy":                        false,
		"copy":                             false,
		"copy a":                           false,
		"copy a b c":                       false,
		"copy a b --help":                  false,
		"copy a b --method fast":           false,
		"copy a b --queues 0x4":            false,
		"copy a b --rate":                  false,
		"copy a b -- c":                    false,
		"copy a b --quiet --quiet":         false,
		"copy a b --quiet=true":            false,
		"--control s copy a b":             false,
		"completion bash":                  false,
		"cow":                              false,
		"cow info":                         false,
		"bench":                            false,
		"dm message d 0 --word":            false,
		"hydrate a --start":                false,
		"snapshot vm@a --chunk much":       false,
		"copy a b --progress none --shard": false,
	} {
		if _, plain := (&cli{}).parsePlain(strings.Fields(line)); plain != want {
			t.Errorf("%q is plain: %v", line, plain)
		}
	}
	t.Setenv("COWHERD_CONTROL", "s")
	c := &cli{}
	if _, plain := c.parsePlain([]string{"version"}); !plain || c.Control != "s" {
		t.Errorf("%v, %q", plain, c.Control)
	}
}

// TestStart: the packages of the program make nothing before it begins, which every command would wait for. Variables
// that are made are to be functions, or made at their first use; errors.New and composite literals are ready in the
// program's file.
func TestStart(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	c := exec.Command(self, "version")
	c.Env = append(os.Environ(), runMain+"=yes", "GODEBUG=inittrace=1", "COWHERD_CONTROL=/none")
	var trace strings.Builder
	c.Stderr = &trace
	if err := c.Run(); err != nil {
		t.Fatal(err)
	}
	traced := 0
	for line := range strings.Lines(trace.String()) {
		f := strings.Fields(line) // init PACKAGE @0.1 ms, 0.01 ms clock, 48 bytes, 1 allocs
		if len(f) != 11 || f[0] != "init" {
			continue
		}
		traced++
		own := strings.HasPrefix(f[1], "cowherd/") && f[1] != "cowherd/cmd/cowherd" // which is this test here
		if own && f[9] != "0" {
			t.Errorf("the start makes something: %s", line)
		}
	}
	if traced == 0 {
		t.Errorf("no trace: %q", trace.String())
	}
}

// BenchmarkStart is the least that a command takes, from exec to its end.
func BenchmarkStart(b *testing.B) {
	self, err := os.Executable()
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		c := exec.Command(self, "version")
		c.Env = append(os.Environ(), runMain+"=yes", "COWHERD_CONTROL=/none")
		if err := c.Run(); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkParse: how long a command line takes to be understood.
func BenchmarkParse(b *testing.B) {
	line := []string{"copy", "--quiet", "a", "b"}
	b.Run("plain", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, plain := (&cli{}).parsePlain(line); !plain {
				b.Fatal("it is not plain")
			}
		}
	})
	b.Run("kong", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			s := &session{stdout: io.Discard, stderr: io.Discard}
			if command, _ := s.parse(line); command == nil {
				b.Fatal("it is wrong")
			}
		}
	})
}
