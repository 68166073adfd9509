package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// complete asks a shell what may stand in place of the last of words, with a program "cowherd" that knows two names.
func complete(t *testing.T, shell, script string, words ...string) string {
	t.Helper()
	path, err := exec.LookPath(shell)
	if err != nil {
		t.Skipf("there is no %s", shell)
	}
	dir := t.TempDir()
	fake := "#!/bin/sh\nprintf 'vm\\nvm@a\\n'\n"
	if err := os.WriteFile(filepath.Join(dir, "cowherd"), []byte(fake), 0o700); err != nil {
		t.Fatal(err)
	}
	c := exec.Command(path, append([]string{"-c", script, shell}, words...)...)
	c.Env = append(os.Environ(), "PATH="+dir+":"+os.Getenv("PATH"), "HOME="+dir)
	out, err := c.CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v: %s", shell, err, out)
	}
	return strings.Join(strings.Fields(string(out)), " ")
}

func TestBashCompletion(t *testing.T) {
	script := cowherd(t, "completion", "bash").stdout + `
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _cowherd; printf '%s\n' "${COMPREPLY[@]}"`
	for words, want := range map[string]string{
		"cowherd sn":                        "snapshot",
		"cowherd --control x det":           "detach",
		"cowherd --co":                      "--control",
		"cowherd detach ":                   "vm",
		"cowherd rm ":                       "vm@a",
		"cowherd rm --force ":               "vm@a",
		"cowherd merge --wait ":             "vm@a",
		"cowherd resize ":                   "vm@a",
		"cowherd snapshot vm@x --on-full g": "grow",
		"cowherd status ":                   "vm vm@a",
		"cowherd serve --engine ":           "scaled serialised",
		"cowherd serve --tls r":             "require",
		"cowherd snapshot vm@x --ch":        "--chunk",
		"cowherd snapshot vm@x --chunk ":    "",
		"cowherd events --no":               "--no-follow",
		"cowherd bench kc":                  "kcopyd",
		"cowherd bench kcopyd --dev":        "--device",
		"cowherd bench kcopyd --device nu":  "null",
		"cowherd cow ":                      "info dump check repair export merge diff",
		"cowherd cow du":                    "dump",
		"cowherd cow check --m":             "--max",
		"cowherd cow check --origin /etc/h": "/etc/hostname",
		"cowherd cow info /etc/hostn":       "/etc/hostname",
		"cowherd attach vm /etc/host":       "/etc/host.conf /etc/hostname /etc/hosts",
		"cowherd serve --config /etc/hostn": "/etc/hostname",
	} {
		got := complete(t, "bash", script, strings.Split(words, " ")...)
		if strings.HasPrefix(want, "/etc") && !strings.Contains(got, "/etc/hostname") || !strings.HasPrefix(want, "/etc") &&
			got != want {
			t.Errorf("%q: got %q, want %q", words, got, want)
		}
	}
}

func TestFishCompletion(t *testing.T) {
	script := cowherd(t, "completion", "fish").stdout + "\ncomplete -C \"$argv[-1]\" | cut -f 1\n"
	for words, want := range map[string]string{
		"cowherd sn":                       "snapshot",
		"cowherd rm ":                      "vm@a",
		"cowherd detach ":                  "vm",
		"cowherd serve --engine ":          "scaled serialised",
		"cowherd events --no":              "--no-follow",
		"cowherd cow ch":                   "check",
		"cowherd cow check --m":            "--max",
		"cowherd bench kcopyd --device nu": "null",
	} {
		if got := complete(t, "fish", script, words); got != want {
			t.Errorf("%q: got %q, want %q", words, got, want)
		}
	}
}

// TestZshCompletion runs the function with the builtins of the completion system replaced by ones that print.
func TestZshCompletion(t *testing.T) {
	script := `compdef() { : }; compadd() { shift; print -l -- ${(M)@:#$PREFIX*} }; _files() { print files }
words=("$@"); CURRENT=$#; PREFIX=${words[-1]}
` + cowherd(t, "completion", "zsh").stdout + "\n_cowherd\n"
	for words, want := range map[string]string{
		"cowherd sn":              "snapshot",
		"cowherd --control x det": "detach",
		"cowherd rm ":             "vm@a",
		"cowherd status ":         "vm vm@a",
		"cowherd serve --engine ": "scaled serialised",
		"cowherd attach vm ":      "files",
		"cowherd cow du":          "dump",
		"cowherd cow info ":       "files",
		"cowherd cow check --m":   "--max",
		"cowherd snapshot vm --d": "--discard-zeroes-cow --discard-passdown-origin",
	} {
		if got := complete(t, "zsh", script, strings.Split(words, " ")...); got != want {
			t.Errorf("%q: got %q, want %q", words, got, want)
		}
	}
}
