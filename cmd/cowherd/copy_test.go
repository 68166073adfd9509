package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cowherd/backend/file"
	"cowherd/transfer"
)

// sampleImage makes an image of n bytes: random data in some of its parts, and holes.
func sampleImage(t testing.TB, path string, n int64) []byte {
	t.Helper()
	content := make([]byte, n)
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(n); err != nil {
		t.Fatal(err)
	}
	source := rand.NewChaCha8([32]byte{byte(n)})
	for at := int64(0); at < n; at += 1 << 20 {
		part := content[at:min(at+640<<10, n)]
		if at>>20%4 == 3 {
			continue
		}
		_, _ = source.Read(part) // never fails
		if _, err := f.WriteAt(part, at); err != nil {
			t.Fatal(err)
		}
	}
	return content
}

// holds checks the content of a file.
func holds(t testing.TB, path string, want []byte) {
	t.Helper()
	got, err := os.ReadFile(path)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("%s holds something else (%d bytes, %d expected), %v", path, len(got), len(want), err)
	}
}

// only checks what files there are.
func only(t testing.TB, dir string, want ...string) {
	t.Helper()
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range list {
		names = append(names, e.Name())
	}
	if fmt.Sprint(names) != fmt.Sprint(want) {
		t.Errorf("%s has %v, want %v", dir, names, want)
	}
}

func TestCopy(t *testing.T) {
	dir := scratchDir(t)
	t.Chdir(dir)
	const n = 5<<20 + 1234
	content := sampleImage(t, "a", n)
	sampleImage(t, "none", 0)
	if r := cowherd(t, "copy", "none", "nothing"); r.status != exitOK || !strings.HasSuffix(r.stdout, " s\n") {
		t.Errorf("an empty image: %+v", r)
	}
	for _, name := range []string{"none", "nothing"} {
		holds(t, name, nil)
		if err := os.Remove(name); err != nil {
			t.Fatal(err)
		}
	}
	cowherd(t, "copy", "a", "b").want(t, exitOK, "b: 5 MiB in ", "")
	holds(t, "b", content)
	stat, err := os.Stat("b")
	if err != nil || stat.Mode() != 0o644 {
		t.Errorf("mode %v, %v", stat.Mode(), err)
	}
	var st syscall.Stat_t
	if err := syscall.Stat("b", &st); err != nil || st.Blocks*512 > 4*(640<<10)+(64<<10) {
		t.Errorf("%d bytes allocated, %v", st.Blocks*512, err)
	}
	cowherd(t, "copy", "a", "b").want(t, exitError, "", "b holds data: --force overwrites it")
	if err := os.WriteFile("b", bytes.Repeat([]byte{7}, 9<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	cowherd(t, "copy", "a", "b", "--force", "--verify").want(t, exitOK, "5 MiB verified", "")
	holds(t, "b", content)
	if err := os.WriteFile("c", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	r := cowherd(t, "copy", "a", "c", "--json", "--no-flush")
	var report copyReport
	if err := json.Unmarshal([]byte(r.stdout), &report); err != nil {
		t.Fatal(err, r)
	}
	if report.Size != n || report.ReadWrite+report.Skipped != n || report.Flushed || report.Changed || report.Source != "a" {
		t.Errorf("%+v", report)
	}
	if r := cowherd(t, "copy", "a", "d", "--quiet", "--allocated"); r.status != exitOK || r.stdout+r.stderr != "" {
		t.Errorf("%+v", r)
	}
	if err := syscall.Stat("d", &st); err != nil || st.Blocks*512 < n {
		t.Errorf("%d bytes allocated, %v", st.Blocks*512, err)
	}
	holds(t, "d", content)
	only(t, ".", "a", "b", "c", "d")
}

func TestCopyRefuses(t *testing.T) {
	dir := scratchDir(t)
	t.Chdir(dir)
	content := sampleImage(t, "a", 1<<20)
	sampleImage(t, "b", 1<<20)
	if err := os.Link("a", "hard"); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("a", "soft"); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir("dir", 0o700); err != nil {
		t.Fatal(err)
	}
	for args, text := range map[string]string{
		"none b":                            "none: no such file",
		"a dir":                             "dir is a directory: name the file in it",
		"dir b":                             "dir is a directory",
		"a a --force":                       "a and a are the same",
		"a /dev/cowherd-no-such-device":     "there is no such device",
		"a /dev/../dev/cowherd/none":        "there is no such device",
		"a hard --force":                    "the same",
		"a soft --force":                    "the same",
		"soft hard --force":                 "the same",
		"a /dev/null":                       "neither a regular file nor a block device",
		"a none/b":                          "no such file",
		"a nbd+unix:///x?socket=none":       "no such file",
		"nbd://h/x nbd://h/x":               "the same",
		"a nbd://h/x?y=z":                   "y",
		"a nbd+unix:///?socket=no --resume": "--resume needs --journal",
	} {
		want := exitError
		if strings.Contains(text, "needs") {
			want = exitUsage
		}
		cowherd(t, append([]string{"copy"}, strings.Fields(args)...)...).want(t, want, "", text)
	}
	holds(t, "a", content)
	only(t, ".", "a", "b", "dir", "hard", "soft")
}

// TestCopyLocked: what others have open is left alone.
func TestCopyLocked(t *testing.T) {
	t.Chdir(scratchDir(t))
	sampleImage(t, "a", 1<<20)
	content := sampleImage(t, "b", 1<<20)
	lock := func(path string, kind int16, start, length int64) (unlock func()) {
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		l := unix.Flock_t{Type: kind, Start: start, Len: length}
		if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &l); err != nil {
			t.Skipf("the file system has no locks: %v", err)
		}
		return func() { _ = f.Close() }
	}
	unlock := lock("b", unix.F_RDLCK, 201, 1) // as qemu: others shall not write
	cowherd(t, "copy", "a", "b", "--force").want(t, exitError, "", "another program has it open")
	holds(t, "b", content)
	unlock()
	unlock = lock("a", unix.F_RDLCK, 100, 2) // as qemu: reads and writes
	cowherd(t, "copy", "a", "c").want(t, exitError, "", "another program writes to it; --shared reads it all the same")
	cowherd(t, "copy", "a", "c", "--shared").want(t, exitOK, "", "")
	unlock()
	unlock = lock("a", unix.F_RDLCK, 0, 0) // another reader
	cowherd(t, "copy", "a", "d").want(t, exitOK, "", "")
	unlock()
	unlock = lock("a", unix.F_WRLCK, 0, 0) // a daemon
	cowherd(t, "copy", "a", "e").want(t, exitError, "", "--shared reads it all the same")
	unlock()
	only(t, ".", "a", "b", "c", "d")
}

// TestCopyLive: a live device is copied, and copied to, by its name.
func TestCopyLive(t *testing.T) {
	dir := serve(t)
	t.Chdir(dir)
	content := sampleImage(t, "disk.img", 3<<20)
	cowherd(t, "attach", "vm", "disk.img").want(t, exitOK, "attached", "")
	cowherd(t, "snapshot", "vm@a").want(t, exitOK, "taken", "")
	cowherd(t, "copy", "vm@a", "a.img", "--verify").want(t, exitOK, "a.img: 3 MiB", "")
	holds(t, "a.img", content)
	cowherd(t, "copy", "disk.img", "b.img").want(t, exitError, "", "--shared")
	other := sampleImage(t, "other.img", 2<<20)
	cowherd(t, "copy", "other.img", "disk.img", "--force").want(t, exitError, "", "another program has it open")
	cowherd(t, "copy", "other.img", "vm").want(t, exitError, "", "vm is a live device: --force overwrites it")
	cowherd(t, "copy", "other.img", "vm", "--force").want(t, exitOK, "vm: 2 MiB", "")
	cowherd(t, "copy", "vm", "now.img").want(t, exitOK, "", "")
	holds(t, "now.img", append(other, content[2<<20:]...))
	cowherd(t, "copy", "vm@a", "then.img").want(t, exitOK, "", "")
	holds(t, "then.img", content)
	cowherd(t, "dm", "create", "mapped", "--table", "0 8 zero").want(t, exitOK, "", "")
	cowherd(t, "copy", "other.img", "mapped").want(t, exitError, "", "mapped is a live device: --force overwrites it")
	cowherd(t, "copy", "mapped", "d.img").want(t, exitOK, "d.img: 4 KiB", "")
	holds(t, "d.img", make([]byte, 4096))
	cowherd(t, "dm", "create", "bare", "--notable").want(t, exitOK, "", "")
	cowherd(t, "copy", "bare", "e.img").want(t, exitError, "", "bare is a mapped device without a live table")
	cowherd(t, "copy", "other.img", "./mapped").want(t, exitOK, "", "")
	cowherd(t, "copy", "mapped", "e.img").want(t, exitError, "", "mapped is a file and a live device")
	sampleImage(t, "large", 4<<20)
	cowherd(t, "copy", "large", "vm", "--force", "--resume", "--journal", "j").want(t, exitError, "", "vm is too small: it has 3145728 bytes, and large 4194304")
	if _, err := os.Stat("j"); err == nil {
		t.Error("a journal was begun for a copy that cannot be")
	}
	sampleImage(t, "vm", 1<<20)
	cowherd(t, "copy", "vm", "c.img").want(t, exitError, "", "vm is a file and a live device: write ./vm")
	cowherd(t, "copy", "./vm", "c.img").want(t, exitOK, "", "")
}

// TestCopyResumeSnapshot: a copy of a snapshot is not gone on with from another one of the same name.
func TestCopyResumeSnapshot(t *testing.T) {
	t.Chdir(serve(t))
	sampleImage(t, "disk.img", 20<<20)
	cowherd(t, "attach", "vm", "disk.img").want(t, exitOK, "attached", "")
	cowherd(t, "snapshot", "vm@a").want(t, exitOK, "taken", "")
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	var stdout, stderr bytes.Buffer
	if run(ctx, []string{"copy", "vm@a", "b", "--resume", "--rate", "1M"}, nil, &stdout, &stderr) != exitError {
		t.Fatal(stdout.String(), stderr.String())
	}
	cowherd(t, "rm", "vm@a").want(t, exitOK, "", "")
	cowherd(t, "snapshot", "vm@a").want(t, exitOK, "taken", "")
	cowherd(t, "copy", "vm@a", "b", "--resume").want(t, exitError, "", "it is another snapshot of the same name")
}

// TestCopyInterrupted: a new image vanishes, an old one is marked, and with a journal the copy goes on.
func TestCopyInterrupted(t *testing.T) {
	t.Chdir(scratchDir(t))
	content := sampleImage(t, "a", 40<<20)
	interrupted := func(text string, args ...string) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		var stdout, stderr bytes.Buffer
		status := run(ctx, append([]string{"copy", "--rate", "8M"}, args...), nil, &stdout, &stderr)
		if status != exitError || !strings.Contains(stderr.String(), text) {
			t.Errorf("status %d, %q; want %q", status, stderr.String(), text)
		}
	}
	interrupted("b was removed", "a", "b")
	only(t, ".", "a")
	sampleImage(t, "c", 1<<20)
	interrupted("c is incomplete, as c.cowherd-copy tells", "a", "c", "--force")
	only(t, ".", "a", "c", "c.cowherd-copy")
	cowherd(t, "copy", "a", "c").want(t, exitError, "", "c.cowherd-copy tells of a copy to c that was not finished")
	cowherd(t, "copy", "a", "c", "--resume").want(t, exitOK, "c: 40 MiB", "")
	holds(t, "c", content)
	interrupted("0 B of it can be gone on with, by the same command", "a", "d", "--resume")
	only(t, ".", "a", "c", "d", "d.cowherd-copy")
	now := time.Now()
	if err := os.Chtimes("a", now, now); err != nil {
		t.Fatal(err)
	}
	cowherd(t, "copy", "a", "d", "--resume").want(t, exitError, "", "the source cannot be gone on with: it has been written since")
	cowherd(t, "copy", "a", "d", "--force").want(t, exitOK, "", "")
	holds(t, "d", content)
	only(t, ".", "a", "c", "d")
}

// TestCopyResumeChanged: what has become of a destination since is found out. An image that is gone is made anew, even
// where the file system gives the new one the number of the old; one that was not emptied yet is; one that has another
// size is refused.
func TestCopyResumeChanged(t *testing.T) {
	t.Chdir(scratchDir(t))
	const n = 40 << 20
	content := sampleImage(t, "a", n)
	begin := func(done int64) {
		t.Helper()
		if err := os.WriteFile("b", content[:done], 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate("b", n); err != nil {
			t.Fatal(err)
		}
		var ids [2]transfer.Identity
		for i, path := range []string{"a", "b"} {
			var err error
			if ids[i], err = identify(kindFile, path, n); err != nil {
				t.Fatal(err)
			}
		}
		ids[1].Modified = 0
		j, err := transfer.CreateJournal("b"+journalSuffix, ids[0], ids[1], true)
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(j.Record(done), j.Close()); err != nil {
			t.Fatal(err)
		}
	}
	begin(32 << 20)
	if err := os.Remove("b"); err != nil {
		t.Fatal(err)
	}
	cowherd(t, "copy", "a", "b", "--resume").want(t, exitOK, "b: 40 MiB", "")
	holds(t, "b", content)

	begin(0)
	if err := os.WriteFile("b", bytes.Repeat([]byte{7}, n+4096), 0o600); err != nil {
		t.Fatal(err)
	}
	cowherd(t, "copy", "a", "b", "--resume").want(t, exitOK, "b: 40 MiB", "")
	holds(t, "b", content)

	for _, journal := range []string{"a", "new", "b"} { // what is no journal of this copy is left alone
		cowherd(t, "copy", "a", "new", "--resume", "--journal", journal).want(t, exitError, "", "journal "+journal)
		holds(t, "a", content)
		holds(t, "b", content)
		only(t, ".", "a", "b")
	}

	for _, size := range []int64{n + 512, n - 512, 0} {
		begin(32 << 20)
		if err := os.Truncate("b", size); err != nil {
			t.Fatal(err)
		}
		cowherd(t, "copy", "a", "b", "--resume").want(t, exitError, "", fmt.Sprintf("it had %d bytes, and has %d now", int64(n), size))
		only(t, ".", "a", "b", "b"+journalSuffix)
	}
}

// TestCopyKilled kills a copy again and again, at random moments; what is made durable before is never done again, and
// the result is whole.
func TestCopyKilled(t *testing.T) {
	t.Chdir(scratchDir(t))
	content := sampleImage(t, "a", 96<<20)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	args := []string{"copy", "a", "b", "--resume", "--rate", "8M", "--progress", "json"}
	before := int64(0)
	for range 3 {
		p := startProgram(t, nil, args...)
		for range 1 + r.IntN(2) {
			p.waitLog(t, `"done_bytes"`)
		}
		if err := p.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		p.end(t)
		done := journalDone(t, "a", "b")
		t.Logf("killed with %d bytes done", done)
		if done < before {
			t.Errorf("%d bytes were done, and now %d", before, done)
		}
		got, err := os.ReadFile("b")
		if err != nil || !bytes.Equal(got[:done], content[:done]) {
			t.Errorf("what the journal says is done is not, %v", err)
		}
		before = done
	}
	r1 := cowherd(t, "copy", "a", "b", "--resume", "--json", "--verify")
	var report copyReport
	if err := json.Unmarshal([]byte(r1.stdout), &report); err != nil {
		t.Fatal(err, r1)
	}
	if report.Resumed != before || report.Verified != 96<<20 {
		t.Errorf("%+v, %d bytes had been done", report, before)
	}
	holds(t, "b", content)
	only(t, ".", "a", "b")
}

// journalDone reads the journal of a copy.
func journalDone(t *testing.T, source, destination string) int64 {
	t.Helper()
	var ids [2]transfer.Identity
	for i, path := range []string{source, destination} {
		var err error
		if ids[i], err = identify(kindFile, path, 96<<20); err != nil {
			t.Fatal(err)
		}
	}
	ids[1].Modified = 0
	j, err := transfer.OpenJournal(destination+journalSuffix, ids[0], ids[1])
	if err != nil {
		t.Fatal(err)
	}
	defer j.Close()
	return j.Done()
}

// TestCopyProgress: the last line for programs tells of all, and of what was done last.
func TestCopyProgress(t *testing.T) {
	t.Chdir(scratchDir(t))
	sampleImage(t, "a", 8<<20)
	for _, c := range []struct{ method, verify string }{{"readwrite", "--verify=false"}, {"verify", "--verify"}} {
		r := cowherd(t, "copy", "a", "b-"+c.method, "--method", "readwrite", c.verify, "--progress", "json")
		if r.status != exitOK {
			t.Fatal(r)
		}
		lines := strings.Split(strings.TrimSpace(r.stderr), "\n")
		var last progressLine
		if err := json.Unmarshal([]byte(lines[len(lines)-1]), &last); err != nil {
			t.Fatal(err, r)
		}
		if last.Method != c.method || last.DoneBytes != last.TotalBytes {
			t.Errorf("%+v, want method %s", last, c.method)
		}
	}
}

// TestCopyNoRoom: a full file system.
func TestCopyNoRoom(t *testing.T) {
	dir := mountTmpfs(t, "size=2m")
	t.Chdir(scratchDir(t))
	sampleImage(t, "a", 8<<20)
	to := filepath.Join(dir, "b")
	cowherd(t, "copy", "a", to).want(t, exitError, "", "no space left on device; "+to+" was removed")
	cowherd(t, "copy", "a", to, "--resume", "--journal", "j").want(t, exitError, "", "can be gone on with")
	only(t, ".", "a", "j")
}

// mountTmpfs mounts a file system in memory.
func mountTmpfs(t *testing.T, options string) string {
	t.Helper()
	return mountMemory(t, "tmpfs", options)
}

// mountMemory mounts a file system of a type that needs no disk, and returns where.
func mountMemory(t *testing.T, kind, options string) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("cowherd-test", dir, kind, 0, options); err != nil {
		t.Skipf("no file system can be mounted: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// TestCopyNoDirect: where a file system has no direct I/O an image that is there already stays, and no other is made.
func TestCopyNoDirect(t *testing.T) {
	t.Chdir(mountMemory(t, "ramfs", ""))
	if _, err := os.OpenFile(".probe", os.O_RDWR|os.O_CREATE|unix.O_DIRECT, 0o600); err == nil {
		t.Skip("ramfs has direct I/O here")
	}
	if err := os.Remove(".probe"); err != nil {
		t.Fatal(err)
	}
	source := filepath.Join(scratchDir(t), "a")
	sampleImage(t, source, 1<<20)
	content := sampleImage(t, "b", 1<<20)
	for _, args := range [][]string{{"b"}, {"b", "--force"}, {"c"}} {
		cowherd(t, append([]string{"copy", source, "--direct"}, args...)...).want(t, exitError, "", "the file system has no direct I/O")
	}
	only(t, ".", "b")
	holds(t, "b", content)
}

// TestCopyLoop: a loop device is its file.
func TestCopyLoop(t *testing.T) {
	t.Chdir(scratchDir(t))
	content := sampleImage(t, "a", 3<<20+700)
	if err := os.WriteFile("disk", bytes.Repeat([]byte{9}, 4<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("losetup", "--find", "--show", "disk").Output()
	if err != nil {
		t.Skipf("no loop device: %v", err)
	}
	loop := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if err := exec.Command("losetup", "--detach", loop).Run(); err != nil {
			t.Error(err)
		}
	})
	cowherd(t, "copy", "disk", loop).want(t, exitError, "", "are the same")
	cowherd(t, "copy", loop, "disk", "--force").want(t, exitError, "", "are the same")
	cowherd(t, "copy", "a", loop).want(t, exitError, "", loop+" holds data, at byte 0: --force overwrites it")
	cowherd(t, "copy", "a", loop, "--force", "--verify").want(t, exitOK, loop+": 3 MiB", "")
	got, err := os.ReadFile(loop)
	if err != nil || !bytes.Equal(got[:len(content)], content) || !bytes.Equal(got[len(content):], bytes.Repeat([]byte{9}, 4<<20-len(content))) {
		t.Errorf("the loop device holds something else, %v", err)
	}
	cowherd(t, "copy", loop, "back").want(t, exitOK, "back: 4 MiB", "")
	holds(t, "back", got)
	sampleImage(t, "large", 5<<20)
	cowherd(t, "copy", "large", loop).want(t, exitError, "", "too small")
	held, err := os.OpenFile(loop, os.O_RDONLY|unix.O_EXCL, 0)
	if err != nil {
		t.Fatal(err)
	}
	cowherd(t, "copy", "a", loop).want(t, exitError, "", "is mounted, or another program holds it")
	if err := held.Close(); err != nil {
		t.Fatal(err)
	}
	// What is on the device is seen at its start, at its end, and nowhere else.
	for at, text := range map[int64]string{3: "at byte 3", 4<<20 - 1: "at byte 4194303", 2 << 20: ""} {
		blank := make([]byte, 4<<20)
		blank[at] = 1
		if err := os.WriteFile(loop, blank, 0o600); err != nil {
			t.Fatal(err)
		}
		resumed := cowherd(t, "copy", "a", loop, "--resume", "--journal", "j")
		if text == "" {
			resumed.want(t, exitOK, loop+": 3 MiB", "")
		} else {
			resumed.want(t, exitError, "", text)
		}
		only(t, ".", "a", "back", "disk", "large")
	}
}

// TestCopyForeign copies to and from another server, and has another program compare.
func TestCopyForeign(t *testing.T) {
	t.Chdir(scratchDir(t))
	content := sampleImage(t, "a", 9<<20)
	if err := os.WriteFile("served", bytes.Repeat([]byte{5}, 10<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, x := range []struct{ socket, image string }{{"s", "served"}, {"r", "a"}} {
		startNBDKit(t, x.socket, x.image)
	}
	to, from := "nbd+unix:///?socket=s", "nbd+unix:///?socket=r"
	cowherd(t, "copy", "a", to, "--verify").want(t, exitOK, to, "")
	holds(t, "served", append(bytes.Clone(content), bytes.Repeat([]byte{5}, 1<<20)...))
	cowherd(t, "copy", from, "b", "--verify").want(t, exitOK, "", "")
	holds(t, "b", content)
	cowherd(t, "copy", from, to, "--resume", "--journal", "j").want(t, exitOK, "", "")
	if path, err := exec.LookPath("qemu-img"); err != nil {
		t.Skip("qemu-img is not installed")
	} else if out, err := exec.Command(path, "compare", "-f", "raw", "-F", "raw", "a", "b").CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}

// TestCopySpliced: between two servers the kernel passes the data on, unless something else is asked for.
func TestCopySpliced(t *testing.T) {
	t.Chdir(scratchDir(t))
	content := make([]byte, 32<<20)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(content) // never fails
	for at := 0; at < len(content); at += 1 << 20 {
		content[at] = 1
	}
	clear(content[5<<20 : 6<<20])
	if err := os.WriteFile("a", content, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile("served", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate("served", int64(len(content))); err != nil {
		t.Fatal(err)
	}
	startNBDKit(t, "r", "a")
	startNBDKit(t, "s", "served")
	for _, c := range []struct {
		flags   []string
		spliced bool
	}{
		{nil, true}, {[]string{"--sparse", "0"}, true}, {[]string{"--allocated"}, true}, {[]string{"--connections", "1"}, true},
		{[]string{"--sparse", "4k"}, false}, {[]string{"--method", "readwrite"}, false},
	} {
		// The rate leaves time for relays to be there.
		r := cowherd(t, append([]string{"copy", "nbd+unix:///?socket=r", "nbd+unix:///?socket=s", "--json", "--rate", "120M", "--verify"},
			c.flags...)...)
		var report copyReport
		if err := json.Unmarshal([]byte(r.stdout), &report); err != nil || r.status != exitOK {
			t.Fatal(err, r)
		}
		if spliced := report.Splice > 0; spliced != c.spliced {
			t.Errorf("%q: %+v", c.flags, report)
		}
		holds(t, "served", content)
	}
}

// startNBDKit serves a file until the test ends.
func startNBDKit(t *testing.T, socket, image string) {
	t.Helper()
	path, err := exec.LookPath("nbdkit")
	if err != nil {
		t.Skip("nbdkit is not installed")
	}
	c := exec.Command(path, "--foreground", "--exit-with-parent", "--unix", socket, "file", image)
	var out bytes.Buffer
	c.Stdout, c.Stderr = &out, &out
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = c.Process.Kill()
		_ = c.Wait()
	})
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) { // another program tells no other way
		if stream, err := net.Dial("unix", socket); err == nil {
			_ = stream.Close()
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("nbdkit does not listen: %s", out.String())
		}
	}
}

// TestCopyClone: on a file system that shares blocks a copy is a clone, if nothing else is asked for.
func TestCopyClone(t *testing.T) {
	dir := mountTmpfs(t, "size=400m")
	mkfs, err := exec.LookPath("mkfs.xfs")
	if err != nil {
		t.Skip("mkfs.xfs is not installed")
	}
	disk, mnt := filepath.Join(dir, "disk"), filepath.Join(dir, "mnt")
	if err := os.WriteFile(disk, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(disk, 320<<20); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(mkfs, "-q", "-m", "reflink=1", disk).CombinedOutput(); err != nil {
		t.Skipf("no XFS: %v: %s", err, out)
	}
	if err := os.Mkdir(mnt, 0o700); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("mount", "-o", "loop", disk, mnt).CombinedOutput(); err != nil {
		t.Skipf("XFS cannot be mounted: %v: %s", err, out)
	}
	t.Cleanup(func() {
		if out, err := exec.Command("umount", mnt).CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	})
	a, b := filepath.Join(mnt, "a"), filepath.Join(mnt, "b")
	content := sampleImage(t, a, 9<<20+777)
	cowherd(t, "copy", a, b, "--method", "clone", "--verify").want(t, exitOK, "9 MiB cloned, 9 MiB verified", "")
	holds(t, b, content)
	cowherd(t, "copy", a, b, "--force").want(t, exitOK, "9 MiB cloned", "")
	testCloneNew(t, mnt, a, content)
	cowherd(t, "copy", a, b, "--force", "--method", "readwrite").want(t, exitOK, "read and written", "")
	cowherd(t, "copy", a, b, "--force", "--allocated").want(t, exitOK, "read and written", "")
	holds(t, b, content)
	t.Chdir(scratchDir(t))
	cowherd(t, "copy", a, "c", "--method", "clone").want(t, exitError, "", "offers no such way to be filled from the source")
	only(t, ".")
	cowherd(t, "copy", a, "c").want(t, exitOK, "read and written", "")
	holds(t, "c", content)
}

// testCloneNew tests copies of image a, of 9 MiB and something, to new images in mnt: nothing has to be known but the two.
func testCloneNew(t *testing.T, mnt, a string, content []byte) {
	t.Helper()
	n, m := filepath.Join(mnt, "n"), filepath.Join(mnt, "m")
	s := &session{Context: t.Context(), stderr: io.Discard, cli: &cli{}}
	if r, done, err := (&copyCmd{Source: a, Destination: n}).cloneNew(s, transfer.Options{Flush: true}); err != nil || !done ||
		r.Clone != int64(len(content)) || r.Size != r.Clone || !r.Flushed || r.Changed {
		t.Errorf("%+v, %v, %v", r, done, err)
	}
	holds(t, n, content)
	cowherd(t, "copy", a, n).want(t, exitError, "", "n holds data: --force overwrites it")
	if err := os.WriteFile(m+journalSuffix, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	cowherd(t, "copy", a, m).want(t, exitError, "", "tells of a copy to "+m+" that was not finished")
	if err := errors.Join(os.Remove(n), os.Remove(m+journalSuffix)); err != nil {
		t.Error(err)
	}
	r := cowherd(t, "copy", a, n, "--json", "--progress", "json", "--no-flush")
	if !strings.Contains(r.stdout, fmt.Sprintf(`"clone_bytes": %d`, len(content))) || strings.Count(r.stderr, `"method":"clone"`) != 2 {
		t.Errorf("%+v", r)
	}
	holds(t, n, content)
	busy, err := file.Open(a, file.Options{})
	if err != nil {
		t.Fatal(err)
	}
	cowherd(t, "copy", a, m).want(t, exitError, "", "--shared reads it all the same")
	cowherd(t, "copy", a, m, "--shared", "--quiet").want(t, exitOK, "", "")
	holds(t, m, content)
	if err := errors.Join(busy.Close(), os.Remove(n), os.Remove(m)); err != nil {
		t.Error(err)
	}
	only(t, mnt, "a", "b")
}
