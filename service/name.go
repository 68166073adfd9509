package service

import (
	"strings"
	"syscall"

	"cowherd/api"
)

// nameMax bounds each of the two parts of a name, in bytes.
const nameMax = 64

// checkName tells whether name may name a device or, behind the '@', a snapshot.
func checkName(what, name string) error {
	if name == "" {
		return api.Errorf(syscall.EINVAL, "%s needs a name", what)
	}
	if len(name) > nameMax {
		return api.Errorf(syscall.ENAMETOOLONG, "%s name %.20q... has %d characters: the most is %d", what, name, len(name),
			nameMax)
	}
	for i, c := range []byte(name) {
		alphanumeric := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
		if !alphanumeric && !strings.ContainsRune("._-", rune(c)) {
			return api.Errorf(syscall.EINVAL, "%s name %q: character %d is not one of A-Z a-z 0-9 . _ -", what, name, i+1)
		}
	}
	return nil
}

// splitName splits ORIGIN@SNAPSHOT.
func splitName(name string) (origin, snapshot string, err error) {
	origin, snapshot, ok := strings.Cut(name, "@")
	if !ok {
		return "", "", api.Errorf(syscall.EINVAL, "%q is not the name of a snapshot: ORIGIN@SNAPSHOT is wanted", name)
	}
	if err := checkName("origin", origin); err != nil {
		return "", "", err
	}
	return origin, snapshot, checkName("snapshot", snapshot)
}
