package conformance

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// writeTree makes a directory of files of many sizes, among them empty and sparse ones.
func writeTree(t testing.TB, seed byte) (dir string) {
	t.Helper()
	dir = t.TempDir()
	random := rand.New(rand.NewChaCha8([32]byte{seed}))
	for i := range 40 {
		path := filepath.Join(dir, fmt.Sprintf("d%d", i%4), fmt.Sprintf("file%d", i))
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		p := make([]byte, random.IntN(1<<random.IntN(19)))
		for j := range p {
			p[j] = byte(random.Uint32())
		}
		if err := os.WriteFile(path, p, 0o600); err != nil {
			t.Fatal(err)
		}
		if i%5 == 0 {
			if err := os.Truncate(path, int64(len(p))+300_000); err != nil {
				t.Fatal(err)
			}
		}
	}
	return dir
}

// sameTree checks that the ext4 file system in image is clean and holds dir's files and no others.
func sameTree(t testing.TB, image, dir string) {
	t.Helper()
	tool(t, "e2fsck", "-f", "-n", image)
	out := t.TempDir()
	tool(t, "debugfs", "-R", "rdump / "+out, image)
	count := 0
	for _, top := range []string{dir, out} {
		err := filepath.Walk(top, func(path string, info os.FileInfo, err error) error {
			if err != nil || !info.Mode().IsRegular() {
				return err
			}
			name, err := filepath.Rel(top, path)
			if err != nil {
				return err
			}
			got, err := os.ReadFile(filepath.Join(out, name))
			want, wantErr := os.ReadFile(filepath.Join(dir, name))
			sameBytes(t, name, got, want)
			count++
			return errors.Join(err, wantErr)
		})
		if err != nil {
			t.Error(err)
		}
	}
	if count == 0 {
		t.Error("no files were compared")
	}
}

// makeExt4 makes an image of a file system that holds dir's files.
func makeExt4(t testing.TB, size int64, dir string) string {
	t.Helper()
	image := emptyImage(t, size)
	tool(t, "mke2fs", "-q", "-F", "-t", "ext4", "-d", dir, image)
	return image
}

// TestExt4Copied puts a file system on the origin through NBD, freezes it and puts another over it: the snapshot is the
// first all the while.
func TestExt4Copied(t *testing.T) {
	t.Parallel()
	need(t, "mke2fs", "e2fsck", "debugfs", "nbdcopy")
	const size = 32 * mib
	firstTree, secondTree := writeTree(t, 1), writeTree(t, 2)
	first, second := makeExt4(t, size, firstTree), makeExt4(t, size, secondTree)
	d := startDaemon(t)
	image := emptyImage(t, size)
	d.do("attach", "vm", image)
	tool(t, "nbdcopy", "--connections=4", "--flush", first, d.uri("vm"))
	tool(t, "cmp", first, image)
	d.do("snapshot", "vm@first", "--chunk", "16k")
	d.do("snapshot", "vm@coarse", "--chunk", "1M", "--store", "mem", "--read-only")

	copied := make(chan error, 1)
	go func() {
		r, err := tryProgram(nil, "nbdcopy", "--connections=2", "--requests=8", "--request-size=65536", second, d.uri("vm"))
		if r.status != 0 {
			err = fmt.Errorf("nbdcopy over the origin: status %d: %s", r.status, r.stderr)
		}
		copied <- err
	}()
	for _, name := range []string{"vm@first", "vm@coarse"} { // while the origin is overwritten
		tool(t, "cmp", first, fetch(t, d.uri(name), "--connections=2"))
	}
	if err := <-copied; err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"vm@first", "vm@coarse"} {
		held := fetch(t, d.uri(name))
		tool(t, "cmp", first, held)
		sameTree(t, held, firstTree)
	}
	sameTree(t, fetch(t, d.uri("vm")), secondTree)
}

// mount is an export as a file, by nbdfuse.
type mount struct {
	file string
	cmd  *exec.Cmd
	log  *lockedBuffer
	done chan struct{}
}

// mountExport shows an export as a file. Where FUSE does not work the test is skipped.
func (d *daemon) mountExport(export string, flags ...string) *mount {
	d.t.Helper()
	need(d.t, "nbdfuse")
	dir := shortDir(d.t)
	m := &mount{file: filepath.Join(dir, "mnt", "disk"), log: &lockedBuffer{}, done: make(chan struct{})}
	ready := filepath.Join(dir, "pid")
	if err := os.Mkdir(filepath.Dir(m.file), 0o700); err != nil {
		d.t.Fatal(err)
	}
	m.cmd = exec.Command("nbdfuse", append(flags, "--pidfile", ready, m.file, d.uri(export))...)
	m.cmd.Stdout, m.cmd.Stderr = m.log, m.log
	m.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	if err := m.cmd.Start(); err != nil {
		d.t.Fatal(err)
	}
	go func() {
		defer close(m.done)
		_ = m.cmd.Wait()
	}()
	d.t.Cleanup(func() { m.unmount(d.t) })
	eventually(d.t, "nbdfuse", func() bool {
		_, err := os.Stat(ready)
		return err == nil || m.ended()
	})
	if m.ended() {
		d.t.Skipf("needs FUSE: %s", m.log)
	}
	return m
}

func (m *mount) ended() bool {
	select {
	case <-m.done:
		return true
	default:
		return false
	}
}

// unmount ends nbdfuse, which flushes when the kernel lets go of the file.
func (m *mount) unmount(t testing.TB) {
	_ = m.cmd.Process.Signal(syscall.SIGTERM) // it may have ended
	select {
	case <-m.done:
	case <-time.After(endLimit):
		t.Errorf("nbdfuse does not end: %s", m.log)
		_ = syscall.Unmount(filepath.Dir(m.file), syscall.MNT_FORCE|syscall.MNT_DETACH)
		_ = m.cmd.Process.Kill()
		<-m.done
	}
}

// TestExt4Live makes a file system on the origin, puts files into it, freezes it and changes it, all through NBD: the
// tools of ext4 work on the export as on a file, by nbdfuse.
func TestExt4Live(t *testing.T) {
	need(t, "mkfs.ext4", "e2fsck", "debugfs", "nbdfuse")
	for _, engine := range engines {
		t.Run(engine, func(t *testing.T) {
			t.Parallel()
			ext4Live(t, startDaemon(t, "--engine", engine))
		})
	}
}

func ext4Live(t *testing.T, d *daemon) {
	d.do("attach", "vm", emptyImage(t, 32*mib))
	origin := d.mountExport("vm")
	tool(t, "mkfs.ext4", "-q", "-F", "-b", "1024", origin.file)
	tree := writeTree(t, 3)
	debugfsScript(t, origin.file, writeScript(t, tree, ""))
	d.do("snapshot", "vm@files", "--chunk", "8k")
	frozen := d.mountExport("vm@files", "--readonly")
	sameTree(t, frozen.file, tree)
	frozen.unmount(t) // and with it what the kernel keeps of the file

	// Other files in place of some, then another file system.
	debugfsScript(t, origin.file, "rm /d0/file0\nrm /d1/file5\n"+writeScript(t, writeTree(t, 4), "new"))
	tool(t, "e2fsck", "-f", "-n", origin.file)
	d.do("snapshot", "vm@more") // not in memory, whose logical block of 512 bytes nbdfuse would not respect
	tool(t, "mkfs.ext4", "-q", "-F", "-b", "4096", origin.file)
	sameTree(t, d.mountExport("vm@files", "--readonly").file, tree)
	more := d.mountExport("vm@more")
	tool(t, "e2fsck", "-f", "-n", more.file)

	// A snapshot can be written: what is done to it stays in it.
	debugfsScript(t, more.file, "rm /d0/file4\n")
	tool(t, "e2fsck", "-f", "-n", more.file)
	tool(t, "e2fsck", "-f", "-n", origin.file)
	toolFails(t, "cmp", origin.file, more.file)
}

// writeScript is the commands of debugfs that put dir's files into the file system, in a directory of its own if one is
// named.
func writeScript(t testing.TB, dir, top string) string {
	t.Helper()
	var script strings.Builder
	if top != "" {
		fmt.Fprintf(&script, "mkdir /%s\n", top)
	}
	err := filepath.Walk(dir, func(path string, info os.FileInfo, err error) error {
		if err != nil || path == dir {
			return err
		}
		name, err := filepath.Rel(dir, path)
		if info.IsDir() {
			fmt.Fprintf(&script, "mkdir %s\n", filepath.Join("/", top, name))
		} else {
			fmt.Fprintf(&script, "write %s %s\n", path, filepath.Join("/", top, name))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return script.String()
}

// debugfsScript runs commands of debugfs on an image. debugfs goes on after a command that failed, and says so.
func debugfsScript(t testing.TB, image, script string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "script")
	if err := os.WriteFile(path, []byte(script), 0o600); err != nil {
		t.Fatal(err)
	}
	r := runProgram(t, nil, "debugfs", "-w", "-f", path, image)
	said := strings.TrimSpace(r.stderr)
	if _, rest, _ := strings.Cut(said, "\n"); r.status != 0 || rest != "" { // the first line is its version
		t.Fatalf("debugfs: status %d, %s", r.status, said)
	}
}
