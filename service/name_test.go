package service

import (
	"strings"
	"syscall"
	"testing"

	"cowherd/api"
)

func TestSplitName(t *testing.T) {
	long := strings.Repeat("x", nameMax)
	for _, name := range []string{"vm@a", "A-z_0.9@..", long + "@" + long, "-@-"} {
		origin, snapshot, err := splitName(name)
		if err != nil || origin+"@"+snapshot != name {
			t.Errorf("%q: %q, %q, %v", name, origin, snapshot, err)
		}
	}
	for _, test := range []struct {
		name  string
		errno syscall.Errno
		text  string
	}{
		{"", syscall.EINVAL, "ORIGIN@SNAPSHOT"}, {"vm", syscall.EINVAL, "ORIGIN@SNAPSHOT"},
		{"@a", syscall.EINVAL, "origin needs a name"}, {"vm@", syscall.EINVAL, "snapshot needs a name"},
		{"vm@a@b", syscall.EINVAL, "character 2"}, {"vm/x@a", syscall.EINVAL, "character 3"},
		{"vm@a b", syscall.EINVAL, "character 2"}, {"é@a", syscall.EINVAL, "character 1"},
		{"vm@a\x00", syscall.EINVAL, "character 2"},
		{long + "x@a", syscall.ENAMETOOLONG, "65 characters"}, {"vm@" + long + "x", syscall.ENAMETOOLONG, "65"},
	} {
		_, _, err := splitName(test.name)
		wantErrno(t, err, test.errno, test.text)
	}
}

// FuzzSplitName checks that what is taken consists of harmless characters only.
func FuzzSplitName(f *testing.F) {
	for _, s := range []string{"vm@a", "@", "vm", "a@b@c", "a/b@c", "é@x"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		origin, snapshot, err := splitName(s)
		if err != nil {
			if errno := api.AsError(err).Errno; errno != syscall.EINVAL && errno != syscall.ENAMETOOLONG {
				t.Fatalf("%q: errno %v", s, errno)
			}
			return
		}
		for _, part := range []string{origin, snapshot} {
			if part == "" || len(part) > nameMax || strings.ContainsAny(part, "@/ \x00\n\"\\") {
				t.Fatalf("%q is taken as %q and %q", s, origin, snapshot)
			}
		}
	})
}
