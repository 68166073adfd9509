package guest

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
)

// Program is a program of this machine for a guest: itself as bin/NAME and the libraries that it is linked with, to be
// added to Machine.Files. The lab's busybox has a link of the same name only for what it knows itself.
func Program(name string) (files map[string]string, err error) {
	path, err := exec.LookPath(name)
	if err != nil {
		return nil, err
	}
	if path, err = filepath.EvalSymlinks(path); err != nil {
		return nil, err
	}
	out, err := exec.Command("ldd", path).Output()
	if err != nil {
		return nil, fmt.Errorf("ldd %s: %w", path, err)
	}
	files = map[string]string{"bin/" + name: path}
	for line := range strings.Lines(string(out)) {
		// NAME => PATH (ADDRESS), or PATH (ADDRESS) for the loader
		for word := range strings.FieldsSeq(line) {
			if strings.HasPrefix(word, "/") {
				files[strings.TrimPrefix(word, "/")] = word
			}
		}
	}
	return files, nil
}
