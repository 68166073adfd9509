//go:build interop

package interop

import (
	_ "embed"
	"errors"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	lab "cowherd/internal/guest"
)

// labLimit is how long it may take to make the lab: it downloads a kernel.
const labLimit = 20 * time.Minute

// prelude is what every script of a guest begins with.
//
//go:embed lab/prelude.sh
var prelude string

// labDir is the directory of the guest's kernel and root file system; making it is left to a script.
var labDir = sync.OnceValues(func() (dir string, err error) {
	status, stdout, stderr, err := runProgram(labLimit, "lab/build.sh")
	if err != nil || status != 0 {
		return "", errors.Join(err, errors.New(strings.TrimSpace(stderr)))
	}
	return strings.TrimSpace(stdout), nil
})

// needLab skips the test when there is no lab and none can be made.
func needLab(t *testing.T) string {
	t.Helper()
	dir, err := labDir()
	if err != nil {
		t.Skipf("needs a guest: %v", err)
	}
	return dir
}

// guest is what became of a run of the kernel: what its script reported, a line for each name.
type guest struct {
	*lab.Result
	t *testing.T
}

// kernel runs a script as root under Linux; it must succeed. images are its disks /dev/vda, /dev/vdb and so on, and hold
// afterwards what the guest has left.
func kernel(t *testing.T, script string, images ...string) *guest {
	t.Helper()
	return kernelOn(t, nil, script, images...)
}

// kernelOn is kernel on a machine that has more hardware, as qemu's arguments describe it.
func kernelOn(t *testing.T, hardware []string, script string, images ...string) *guest {
	t.Helper()
	self, err := os.Executable() // it is the guest's helper too
	if err != nil {
		t.Fatal(err)
	}
	m := lab.Machine{
		Lab: needLab(t), Script: prelude + script, Hardware: hardware, Images: images,
		Files: map[string]string{"lab/" + guestProgram: self},
	}
	r, err := m.Run(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if r.Status != 0 {
		t.Fatalf("the guest's script ends with status %d:\n%s%s", r.Status, script, r.Output)
	}
	return &guest{r, t}
}

// report is what the script has reported under a name.
func (g *guest) report(name string) string {
	g.t.Helper()
	for line := range strings.Lines(g.Output) {
		if text, ok := strings.CutPrefix(line, name+": "); ok {
			return strings.TrimSpace(text)
		}
	}
	g.t.Fatalf("the guest reports no %q:\n%s", name, g.Output)
	return ""
}
