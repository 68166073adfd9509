package conformance

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"cowherd/backend/nbd"
	"cowherd/block"
)

const (
	kib = 1 << 10
	mib = 1 << 20
)

// engines are the copy engines that a daemon can be told to use.
var engines = []string{"scaled", "serialised"}

// need skips the test unless all these programs of others are there.
func need(t testing.TB, names ...string) {
	t.Helper()
	for _, name := range names {
		if _, err := exec.LookPath(name); err != nil {
			t.Skipf("needs %s: %v", name, err)
		}
	}
}

// tool runs another's program, which must succeed, and returns what it prints. Without it the test is skipped.
func tool(t testing.TB, name string, args ...string) string {
	t.Helper()
	need(t, name)
	r := runProgram(t, nil, name, args...)
	if r.status != 0 {
		t.Fatalf("%s %s: status %d\n%s%s", name, strings.Join(args, " "), r.status, r.stdout, r.stderr)
	}
	return r.stdout
}

// toolFails runs another's program, which must fail, and returns what it says.
func toolFails(t testing.TB, name string, args ...string) string {
	t.Helper()
	need(t, name)
	r := runProgram(t, nil, name, args...)
	if r.status == 0 {
		t.Errorf("%s %s succeeds\n%s", name, strings.Join(args, " "), r.stdout)
	}
	return r.stdout + r.stderr
}

// emptyImage makes a file of size bytes without data.
func emptyImage(t testing.TB, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "empty.img")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	return path
}

// A randomImage has a hole of randomHole bytes at the end of each randomPiece.
const (
	randomPiece = 256 * kib
	randomHole  = 96 * kib
)

// randomImage makes a file of size bytes, random data and holes in turn.
func randomImage(t testing.TB, size int64, seed byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "random.img")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	random := rand.NewChaCha8([32]byte{seed})
	p := make([]byte, randomPiece-randomHole)
	for at := int64(0); at < size; at += randomPiece {
		if _, err := random.Read(p); err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt(p[:min(int64(len(p)), size-at)], at); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	return path
}

// sumFile is a file's checksum.
func sumFile(t testing.TB, path string) string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		t.Fatal(err)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// copyFile copies a file.
func copyFile(t testing.TB, from string) (to string) {
	t.Helper()
	data, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	to = filepath.Join(t.TempDir(), "copy.img")
	if err := os.WriteFile(to, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return to
}

// fetch copies an export to a new file by nbdcopy.
func fetch(t testing.TB, uri string, flags ...string) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "fetched.img")
	tool(t, "nbdcopy", append(flags, uri, path)...)
	return path
}

// open opens an export by cowherd's own client.
func (d *daemon) open(export string, connections int) *nbd.Device {
	d.t.Helper()
	x, err := d.openErr(export, connections)
	if err != nil {
		d.t.Fatal(err)
	}
	return x
}

func (d *daemon) openErr(export string, connections int) (*nbd.Device, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	return nbd.Open(ctx, nbd.Config{Network: "unix", Address: d.socket, Export: export, Connections: connections})
}

// contents reads a whole device.
func contents(d block.Device) ([]byte, error) {
	p := make([]byte, d.Size())
	for at := 0; at < len(p); at += mib {
		if err := block.Read(d, p[at:min(at+mib, len(p))], int64(at)); err != nil {
			return nil, err
		}
	}
	return p, nil
}

// interactive is a program that takes commands from a pipe, such as qemu-io.
type interactive struct {
	t     testing.TB
	cmd   *exec.Cmd
	stdin io.WriteCloser
	out   *lockedBuffer
}

// startInteractive starts a program that ends with the test at the latest.
func startInteractive(t testing.TB, name string, args ...string) *interactive {
	t.Helper()
	need(t, name)
	p := &interactive{t: t, cmd: exec.Command(name, args...), out: &lockedBuffer{}}
	var err error
	if p.stdin, err = p.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	p.cmd.Stdout, p.cmd.Stderr = p.out, p.out
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.end() })
	return p
}

// say sends a line. A program may forget one that comes before it has answered the one before: expect its answer.
func (p *interactive) say(line string) {
	p.t.Helper()
	if _, err := io.WriteString(p.stdin, line+"\n"); err != nil {
		p.t.Errorf("%s: %v\n%s", line, err, p.out)
	}
}

// expect waits until the program has printed a text.
func (p *interactive) expect(text string) {
	p.t.Helper()
	for deadline := time.Now().Add(endLimit); !strings.Contains(p.out.String(), text); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			p.t.Fatalf("%s does not say %q: %s", p.cmd.Path, text, p.out)
		}
	}
}

// end closes the program's input, which ends it.
func (p *interactive) end() {
	if p.cmd.ProcessState != nil {
		return
	}
	_ = p.stdin.Close()
	kill := time.AfterFunc(endLimit, func() { _ = p.cmd.Process.Kill() })
	defer kill.Stop()
	_ = p.cmd.Wait() // what it thinks of its end is not what is tested
}

// eventually waits for something that happens outside of this process.
func eventually(t testing.TB, what string, happened func() bool) {
	t.Helper()
	for deadline := time.Now().Add(endLimit); time.Now().Before(deadline); time.Sleep(2 * time.Millisecond) {
		if happened() {
			return
		}
	}
	t.Fatalf("in vain waited for %s", what)
}

// sameBytes tells where two contents differ first.
func sameBytes(t testing.TB, what string, got, want []byte) {
	t.Helper()
	if bytes.Equal(got, want) {
		return
	}
	if len(got) != len(want) {
		t.Errorf("%s: %d bytes instead of %d", what, len(got), len(want))
		return
	}
	for i := range got {
		if got[i] != want[i] {
			t.Errorf("%s: byte %d is %#x instead of %#x", what, i, got[i], want[i])
			return
		}
	}
}
