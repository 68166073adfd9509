// Package guest runs scripts under a real Linux, in a guest of qemu's emulation. It is for tests and for measurements
// beside the kernel.
//
// The kernel and its root file system, the lab, are made by test/interop/lab/build.sh. A guest boots in a few seconds,
// runs one script as root, hands back what it has printed and what it has left in /out, and dies by a power cut.
package guest

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// arguments are for the guest's kernel: what is slow under emulation and serves nothing here is off.
const arguments = "console=ttyS0 quiet panic=-1 reboot=t nokaslr mitigations=off tsc=reliable no_timer_check audit=0"

// tries is how often a guest is started that dies before its script has begun, which emulation does now and then when the
// machine is busy.
const tries = 3

// errBoot is of such a guest.
var errBoot = errors.New("the guest died at boot")

// A Machine is what a script runs on. The zero values of all but Lab and Script are good.
type Machine struct {
	Lab      string // the directory that build.sh prints
	Script   string // for busybox's sh
	Memory   int    // MiB; 0: 512
	CPUs     int    // 0: 1
	Hardware []string
	// Images are raw disk images: the disks /dev/vda, /dev/vdb and so on. They hold afterwards what the guest has left.
	Images []string
	// Files are further files of the guest by their paths in it (lab/program), each with the path of what it is a copy of.
	// All can be executed.
	Files map[string]string
	// Limit is how long it may run; 0: 8 minutes. It needs some seconds, but of a machine that may be busy.
	Limit time.Duration
}

// A Result is what became of a run.
type Result struct {
	Output string            // what the script has printed
	Files  map[string][]byte // what it has left in /out
	Status int               // its exit status
}

// Run runs the script to its end, with files that are not needed afterwards in scratch. An error means that the guest
// did not come to the end of its script, whatever that then reports.
func (m *Machine) Run(scratch string) (r *Result, err error) {
	for range tries {
		if r, err = m.boot(scratch); !errors.Is(err, errBoot) {
			return r, err
		}
	}
	return nil, err
}

// boot runs the script once.
func (m *Machine) boot(scratch string) (*Result, error) {
	path := func(name string) string { return filepath.Join(scratch, name) }
	if err := m.writeInitrd(path("initrd")); err != nil {
		return nil, err
	}
	limit := m.Limit
	if limit == 0 {
		limit = 8 * time.Minute
	}
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", m.arguments(path)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} // whoever ends us ends it
	qemu, qemuErr := cmd.CombinedOutput()
	console, err := os.ReadFile(path("console"))
	switch {
	case ctx.Err() != nil:
		output, _ := os.ReadFile(path("output"))
		return nil, fmt.Errorf("the guest takes longer than %v:\n%s\n%s", limit, output, console)
	case qemuErr != nil || err != nil:
		return nil, fmt.Errorf("qemu: %w\n%s", errors.Join(qemuErr, err), qemu)
	case !bytes.Contains(console, []byte("lab: start")):
		return nil, fmt.Errorf("%w:\n%s", errBoot, console)
	case !bytes.Contains(console, []byte("lab: end")):
		return nil, fmt.Errorf("the guest died:\n%s", console)
	}
	return collect(path("output"), path("files"))
}

// arguments are qemu's.
func (m *Machine) arguments(path func(string) string) []string {
	memory, accel := max(m.Memory, 512), "tcg"
	if m.CPUs > 1 {
		accel = "tcg,thread=multi"
	}
	args := []string{
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-m", strconv.Itoa(memory),
		"-smp", strconv.Itoa(max(m.CPUs, 1)), "-M", "pc,vmport=off,hpet=off", "-accel", accel, "-cpu", "max",
		"-kernel", filepath.Join(m.Lab, "kernel"), "-append", arguments,
	}
	args = append(args, m.Hardware...)
	args = append(args, "-initrd", path("initrd"), "-serial", "file:"+path("console"), "-device", "virtio-serial-pci")
	for i, name := range []string{"output", "files"} {
		args = append(args, "-chardev", fmt.Sprintf("file,id=%s,path=%s", name, path(name)),
			"-device", fmt.Sprintf("virtserialport,chardev=%s,nr=%d", name, i+1))
	}
	for i, image := range m.Images {
		drive := fmt.Sprintf("file=%s,if=none,id=disk%d,format=raw,cache=unsafe,discard=unmap", image, i)
		args = append(args, "-drive", drive, "-device", fmt.Sprintf("virtio-blk-pci,drive=disk%d", i))
	}
	return args
}

// collect reads what a guest has sent.
func collect(output, files string) (*Result, error) {
	text, err := os.ReadFile(output)
	if err != nil {
		return nil, err
	}
	f, err := os.Open(files)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	r := &Result{Output: string(text), Files: map[string][]byte{}}
	for archive := tar.NewReader(f); ; {
		header, err := archive.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, fmt.Errorf("files of the guest: %w", err)
		}
		if r.Files[filepath.Clean(header.Name)], err = io.ReadAll(archive); err != nil {
			return nil, fmt.Errorf("files of the guest: %s: %w", header.Name, err)
		}
	}
	if r.Status, err = strconv.Atoi(strings.TrimSpace(string(r.Files[".status"]))); err != nil {
		return nil, fmt.Errorf("exit status of the guest's script: %w", err)
	}
	return r, nil
}

// writeInitrd writes the lab's root file system and, as a second archive behind it, what belongs to this run.
func (m *Machine) writeInitrd(path string) error {
	initrd, err := os.ReadFile(filepath.Join(m.Lab, "root.cpio"))
	if err != nil {
		return err
	}
	made := map[string]bool{}
	for _, name := range slices.Sorted(maps.Keys(m.Files)) {
		contents, err := os.ReadFile(m.Files[name])
		if err != nil {
			return err
		}
		initrd = appendDirectories(initrd, filepath.Dir(name), made)
		initrd = appendCPIO(initrd, name, 0o100755, contents)
	}
	initrd = appendCPIO(initrd, "lab/script", 0o100644, []byte(m.Script))
	initrd = appendCPIO(initrd, "TRAILER!!!", 0, nil)
	return os.WriteFile(path, initrd, 0o600)
}

// appendDirectories appends a directory and those that it lies in, once each.
func appendDirectories(archive []byte, dir string, made map[string]bool) []byte {
	if dir == "." || made[dir] {
		return archive
	}
	made[dir] = true
	return appendCPIO(appendDirectories(archive, filepath.Dir(dir), made), dir, 0o040755, nil)
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
