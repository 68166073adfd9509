//go:build interop

package interop

import (
	"archive/tar"
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

const (
	// labLimit is how long it may take to make the lab: it downloads a kernel.
	labLimit = 20 * time.Minute
	// guestLimit is how long a guest may run. It needs some seconds, but of a machine that may be busy.
	guestLimit = 8 * time.Minute
	// bootTries is how often a guest is started that dies before its script has begun, which emulation does now and
	// then when the machine is busy.
	bootTries = 3
	// guestArguments are for the guest's kernel: what is slow under emulation and serves nothing here is off.
	guestArguments = "console=ttyS0 quiet panic=-1 reboot=t nokaslr mitigations=off tsc=reliable no_timer_check audit=0"
)

// prelude is what every script of a guest begins with.
//
//go:embed lab/prelude.sh
var prelude string

// lab is the directory of the guest's kernel and root file system; making it is left to a script.
var lab = sync.OnceValues(func() (dir string, err error) {
	status, stdout, stderr, err := runProgram(labLimit, "lab/build.sh")
	if err != nil || status != 0 {
		return "", errors.Join(err, errors.New(strings.TrimSpace(stderr)))
	}
	return strings.TrimSpace(stdout), nil
})

// needLab skips the test when there is no lab and none can be made.
func needLab(t *testing.T) string {
	t.Helper()
	dir, err := lab()
	if err != nil {
		t.Skipf("needs a guest: %v", err)
	}
	return dir
}

// guest is what became of a run of the kernel: what its script reported, a line for each name.
type guest struct {
	t      *testing.T
	output string
	files  map[string][]byte // what it left in /out
	status int
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
	dir := needLab(t)
	var err error
	for range bootTries {
		var g *guest
		if g, err = boot(t.TempDir(), dir, prelude+script, images, hardware); err == nil {
			g.t = t
			if g.status != 0 {
				t.Fatalf("the guest's script ends with status %d:\n%s%s", g.status, script, g.output)
			}
			return g
		}
		if !errors.Is(err, errBoot) {
			break
		}
		t.Log(err)
	}
	t.Fatal(err)
	return nil
}

// report is what the script has reported under a name.
func (g *guest) report(name string) string {
	g.t.Helper()
	for line := range strings.Lines(g.output) {
		if text, ok := strings.CutPrefix(line, name+": "); ok {
			return strings.TrimSpace(text)
		}
	}
	g.t.Fatalf("the guest reports no %q:\n%s", name, g.output)
	return ""
}

// errBoot is of a guest that died before its script began.
var errBoot = errors.New("the guest died at boot")

// boot runs one guest to its end, with its files in scratch.
func boot(scratch, lab, script string, images, hardware []string) (*guest, error) {
	path := func(name string) string { return filepath.Join(scratch, name) }
	if err := writeInitrd(path("initrd"), filepath.Join(lab, "root.cpio"), script); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), guestLimit)
	defer cancel()
	args := append(machine(lab), hardware...)
	args = append(args, "-initrd", path("initrd"), "-serial", "file:"+path("console"))
	args = append(args, "-device", "virtio-serial-pci")
	for i, name := range []string{"output", "files"} {
		args = append(args, "-chardev", fmt.Sprintf("file,id=%s,path=%s", name, path(name)),
			"-device", fmt.Sprintf("virtserialport,chardev=%s,nr=%d", name, i+1))
	}
	for i, image := range images {
		drive := fmt.Sprintf("file=%s,if=none,id=disk%d,format=raw,cache=unsafe,discard=unmap", image, i)
		args = append(args, "-drive", drive, "-device", fmt.Sprintf("virtio-blk-pci,drive=disk%d", i))
	}
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} // go test ends us so when we take too long
	qemu, qemuErr := cmd.CombinedOutput()
	console, err := os.ReadFile(path("console"))
	switch {
	case ctx.Err() != nil:
		output, _ := os.ReadFile(path("output"))
		return nil, fmt.Errorf("the guest takes longer than %v:\n%s\n%s", guestLimit, output, console)
	case qemuErr != nil || err != nil:
		return nil, fmt.Errorf("qemu: %w\n%s", errors.Join(qemuErr, err), qemu)
	case !bytes.Contains(console, []byte("lab: start")):
		return nil, fmt.Errorf("%w:\n%s", errBoot, console)
	case !bytes.Contains(console, []byte("lab: end")):
		return nil, fmt.Errorf("the guest died:\n%s", console)
	}
	return collect(path("output"), path("files"))
}

// machine is the arguments of qemu for what all guests have.
func machine(lab string) []string {
	return []string{
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-m", "512", "-M", "pc,vmport=off,hpet=off",
		"-accel", "tcg", "-cpu", "max", "-kernel", filepath.Join(lab, "kernel"), "-append", guestArguments,
	}
}

// collect reads what a guest has sent.
func collect(output, files string) (*guest, error) {
	text, err := os.ReadFile(output)
	if err != nil {
		return nil, err
	}
	f, err := os.Open(files)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	g := &guest{output: string(text), files: map[string][]byte{}}
	for archive := tar.NewReader(f); ; {
		header, err := archive.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, fmt.Errorf("files of the guest: %w", err)
		}
		if g.files[filepath.Clean(header.Name)], err = io.ReadAll(archive); err != nil {
			return nil, fmt.Errorf("files of the guest: %s: %w", header.Name, err)
		}
	}
	if g.status, err = strconv.Atoi(strings.TrimSpace(string(g.files[".status"]))); err != nil {
		return nil, fmt.Errorf("exit status of the guest's script: %w", err)
	}
	return g, nil
}

// writeInitrd writes the lab's root file system and, as a second archive behind it, what belongs to this run: the
// script, and this very program, which is the guest's helper.
func writeInitrd(path, base, script string) error {
	initrd, err := os.ReadFile(base)
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	program, err := os.ReadFile(self)
	if err != nil {
		return err
	}
	initrd = appendCPIO(initrd, "lab/script", 0o100644, []byte(script))
	initrd = appendCPIO(initrd, "lab/"+guestProgram, 0o100755, program)
	initrd = appendCPIO(initrd, "TRAILER!!!", 0, nil)
	return os.WriteFile(path, initrd, 0o600)
}

// appendCPIO appends a file to an archive of cpio's format newc: a header of hexadecimal numbers, the name and the
// contents, each padded to a multiple of four bytes.
func appendCPIO(archive []byte, name string, mode int, contents []byte) []byte {
	archive = append(archive, make([]byte, -len(archive)&3)...)
	archive = append(archive, "070701"...)
	for _, field := range []int{0, mode, 0, 0, 1, 0, len(contents), 0, 0, 0, 0, len(name) + 1, 0} {
		archive = fmt.Appendf(archive, "%08X", field)
	}
	archive = append(archive, name...)
	archive = append(archive, 0)
	archive = append(archive, make([]byte, -len(archive)&3)...)
	archive = append(archive, contents...)
	return append(archive, make([]byte, -len(archive)&3)...)
}
