package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/alecthomas/kong"
	"go.uber.org/goleak"

	"cowherd/api"
)

// runMain in the environment makes the test binary behave as the program.
const runMain = "COWHERD_TEST_RUN_MAIN"

func TestMain(m *testing.M) {
	if os.Getenv(runMain) != "" {
		main()
	}
	for _, name := range []string{"COWHERD_CONTROL", "NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID"} {
		_ = os.Unsetenv(name)
	}
	// Else each process under the race detector that a test starts ends a second later.
	_ = os.Setenv("GORACE", strings.TrimSpace(os.Getenv("GORACE")+" atexit_sleep_ms=0"))
	goleak.VerifyTestMain(m, goleak.Cleanup(func(status int) {
		removeFixtures()
		os.Exit(status)
	}))
}

// result is what a command line has come to.
type result struct {
	status         int
	stdout, stderr string
}

// cowherd runs a command line in this process.
func cowherd(t testing.TB, args ...string) result {
	t.Helper()
	var stdout, stderr bytes.Buffer
	status := run(t.Context(), args, strings.NewReader(""), &stdout, &stderr)
	return result{status, stdout.String(), stderr.String()}
}

// want checks a status and that each output holds some text.
func (r result) want(t testing.TB, status int, stdout, stderr string) {
	t.Helper()
	if r.status != status || !strings.Contains(r.stdout, stdout) || !strings.Contains(r.stderr, stderr) {
		t.Errorf("status %d, output %q, errors %q; want %d, %q and %q", r.status, r.stdout, r.stderr, status, stdout, stderr)
	}
	if status == exitOK && r.stderr != "" {
		t.Errorf("errors %q of a success", r.stderr)
	}
	if status != exitOK && !strings.HasPrefix(r.stderr, "cowherd: ") {
		t.Errorf("errors %q do not say who speaks", r.stderr)
	}
}

// serve runs "cowherd serve" in this process until the test ends, and sets COWHERD_CONTROL. It returns its directory.
func serve(t *testing.T, args ...string) string {
	t.Helper()
	dir := t.TempDir()
	t.Setenv("COWHERD_CONTROL", filepath.Join(dir, "control.sock"))
	var ready [2]int
	if err := syscall.Pipe2(ready[:], syscall.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	args = append([]string{"serve", "--state", filepath.Join(dir, "state"), "--ready-fd", fmt.Sprint(ready[1])}, args...)
	ctx, stop := context.WithCancel(context.Background())
	var log bytes.Buffer
	var served sync.WaitGroup
	served.Go(func() {
		if status := run(ctx, args, nil, io.Discard, &log); status != exitOK {
			t.Errorf("serve: status %d", status)
			_ = syscall.Close(ready[1])
		}
	})
	t.Cleanup(func() {
		stop()
		served.Wait()
		if t.Failed() {
			t.Log(log.String())
		}
		for _, want := range []string{"msg=ready", "msg=stopped"} {
			if !strings.Contains(log.String(), want) {
				t.Errorf("no %q in the log:\n%s", want, log.String())
			}
		}
	})
	f := os.NewFile(uintptr(ready[0]), "ready")
	defer f.Close()
	if line, err := bufio.NewReader(f).ReadString('\n'); err != nil || line != "ready\n" {
		t.Fatalf("got %q, %v; want a line that says ready", line, err)
	}
	return dir
}

func TestUsage(t *testing.T) {
	for _, test := range []struct {
		args string
		text string
	}{
		{"", "expected one of"},
		{"fly", "unexpected argument fly"},
		{"ls --colour", "unknown flag --colour"},
		{"ls extra", "unexpected argument extra"},
		{"attach vm", "<device>"},
		{"clone web web.img", "--from"},
		{"clone web --from x", "<destination>"},
		{"clone web --from x y --order random", "--order"},
		{"clone web --from x y --wait", "--wait is for --detach-source"},
		{"clone --detach-source", "<name>"},
		{"clone --detach-source web web.img", "nothing else"},
		{"clone --detach-source web --from x", "nothing else"},
		{"clone --detach-source web --region-size 4k", "nothing else"},
		{"clone web --from x y --promote-on-read=perhaps", "--promote-on-read"},
		{"hydrate web --start --stop", "--stop"},
		{"hydrate web --threshold=-1", "--threshold"},
		{"attach vm disk --direct=perhaps", "--direct"},
		{"snapshot", "<name@snap>"},
		{"snapshot vm@a --chunk", "--chunk"},
		{"snapshot vm@a --chunk 3kB", "two meanings"},
		{"snapshot vm@a --max-cow -1", "--max-cow"},
		{"snapshot vm@a --discard-passdown-origin", "needs --discard-zeroes-cow"},
		{"snapshot vm@a --on-full explode", "--on-full"},
		{"snapshot vm@a --warn-at 0%", "not a share"},
		{"snapshot vm@a --warn-at 70%,x", "not a share"},
		{"snapshot vm@a --overwrite", "needs --persistent"},
		{"snapshot vm@a --persistent --overwrite --reopen", "contradict"},
		{"snapshot vm@a --stall-max 5s", "needs --on-full throttle"},
		{"snapshot vm@a --on-full throttle --stall-max=-5s", "negative"},
		{"resize vm@a", "<size>"},
		{"resize vm@a 1kB", "two meanings"},
		{"throttle --rate 1M", "--class is missing"},
		{"throttle --class merge --off --rate 1M", "contradicts"},
		{"throttle --class merge --share 101%", "not a share"},
		{"throttle --class disks", "--class"},
		{"merge vm@a --wait --stop", "contradict"},
		{"status --dm --json", "contradict"},
		{"events --since x", "--since"},
		{"completion csh", "bash"},
		{"copy a", "<destination>"},
		{"copy a b --sparse 3k", "not a power of two"},
		{"copy a b --sparse 3kB", "two meanings"},
		{"copy a b --request-size 1k", "from 4k to 16 MiB"},
		{"copy a b --connections 65", "at most 64"},
		{"copy a b --method magic", "--method"},
		{"copy a b --method clone --allocated", "contradict"},
		{"copy a b --queues 100 --requests 100", "more than 1024"},
		{"copy a b --rate 0", "never end"},
		{"copy a b --allocated --destination-is-zero", "contradict"},
		{"copy a b --resume --no-flush", "contradict"},
		{"copy a b --journal c", "needs --resume"},
		{"copy a b --quiet --json", "contradict"},
		{"serve --tls perhaps", "--tls"},
		{"serve --engine steam", "--engine"},
		{"serve --tls require --state /nowhere --control /nowhere/x", "needs --tls-certificates"},
		{"serve --tls-verify-peer --state /nowhere --control /nowhere/x", "needs TLS"},
	} {
		cowherd(t, strings.Fields(test.args)...).want(t, exitUsage, "", test.text)
	}
}

// TestHelp: every command has a help with an example, and flags that say what they do.
func TestHelp(t *testing.T) {
	r := cowherd(t, "--help")
	r.want(t, exitOK, "Usage: cowherd <command>", "")
	for _, command := range []string{
		"serve", "attach", "detach", "snapshot", "rm", "resize", "merge", "throttle", "ls", "status", "events", "cow", "copy", "version",
		"completion",
		"serve", "attach", "detach", "snapshot", "clone", "hydrate", "rm", "resize", "merge", "ls", "status", "events", "cow", "copy",
		"version", "completion",
	} {
		if !strings.Contains(r.stdout, "\n  "+command+" ") {
			t.Errorf("no %s in the help", command)
		}
		help := cowherd(t, command, "--help")
		help.want(t, exitOK, "Example", "")
		help.want(t, exitOK, "    cowherd "+command, "")
	}
	cowherd(t, "help").want(t, exitOK, "Usage: cowherd <command>", "")
	cowherd(t, "help", "copy").want(t, exitOK, "Usage: cowherd copy", "")
	cowherd(t, "help", "nothing").want(t, exitUsage, "", "nothing")
	for _, command := range []string{"info", "dump", "check", "repair", "export", "merge", "diff"} {
		cowherd(t, "cow", command, "--help").want(t, exitOK, "    cowherd cow "+command, "")
	}
}

func TestNoDaemon(t *testing.T) {
	t.Setenv("COWHERD_CONTROL", filepath.Join(t.TempDir(), "none.sock"))
	for _, args := range []string{
		"ls", "status", "status vm", "attach vm mem:1M", "detach vm", "snapshot vm@a", "rm vm@a", "events", "ls --json",
		"clone web --from /x web.img", "clone web --from x web.img", "hydrate web", "hydrate web --wait",
		"clone --detach-source web", "clone --detach-source web --wait",
		"resize vm@a 1M", "merge vm@a", "merge vm@a --wait", "status --dm",
		"throttle", "throttle --class cow --rate 1M", "throttle --off",
	} {
		cowherd(t, strings.Fields(args)...).want(t, exitError, "", `none.sock (is "cowherd serve" running?)`)
	}
	cowherd(t, "version").want(t, exitOK, "cowherd ", "")
	other := filepath.Join(t.TempDir(), "other.sock")
	cowherd(t, "ls", "--control", other).want(t, exitError, "", "other.sock")
	cowherd(t, "--control", other, "ls").want(t, exitError, "", "other.sock")
}

func TestCommands(t *testing.T) {
	dir := serve(t)
	image := filepath.Join(dir, "disk.img")
	if err := os.WriteFile(image, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Chdir(dir)
	cowherd(t, "ls").want(t, exitOK, "NAME  SIZE  KIND  CHUNK  COW  STATE  USERS\n", "")
	cowherd(t, "attach", "vm", "disk.img").want(t, exitOK, "vm: attached, 1 MiB, nbd+unix:///vm?socket="+dir+"/nbd.sock\n", "")
	cowherd(t, "attach", "vm", "disk.img").want(t, exitError, "", `attach "vm": there is a device "vm" already`)
	cowherd(t, "attach", "b", image).want(t, exitError, "", `disk.img is in use by device "vm" of this daemon`)
	cowherd(t, "attach", "b", "none.img").want(t, exitError, "", "none.img: no such file")
	cowherd(t, "snapshot", "vm@a", "--chunk", "64k", "--max-cow", "256KiB").want(t, exitOK, "vm@a: taken, vm waited for ", "")
	cowherd(t, "snapshot", "vm@b", "--store", "disk.img").want(t, exitError, "", `in use by device "vm"`)
	cowherd(t, "snapshot", "vm@b", "--chunk", "5k").want(t, exitError, "", "not a power of 2")
	cowherd(t, "snapshot", "x@b").want(t, exitError, "", `snapshot "x@b": there is no device "x"`)
	cowherd(t, "snapshot", "vm").want(t, exitError, "", "ORIGIN@SNAPSHOT")
	list := "NAME   SIZE  KIND       CHUNK                    COW  STATE  USERS\n" +
		"vm    1 MiB  origin         -                      -  live       0\n" +
		"vm@a  1 MiB  snapshot  64 KiB  0 B of 256 KiB (0.0%)  valid      0\n"
	if r := cowherd(t, "ls"); r.stdout != list {
		t.Errorf("got\n%swant\n%s", r.stdout, list)
	}
	if r := cowherd(t, "ls", "-q"); r.stdout != "vm\nvm@a\n" {
		t.Errorf("names %q", r.stdout)
	}
	status := cowherd(t, "status", "vm@a")
	for _, text := range []string{
		"\n  size           1 MiB (1048576 bytes)\n", "\n  chunk          64 KiB\n", "\n  store          temp\n",
		"\n  kcopyd         scaled: 0 jobs", "\n  export         nbd+unix:///vm@a?socket=",
	} {
		status.want(t, exitOK, text, "")
	}
	cowherd(t, "status").want(t, exitOK, "state directory", "")
	cowherd(t, "status", "vm@x").want(t, exitError, "", `there is no device "vm@x"`)
	cowherd(t, "detach", "vm").want(t, exitError, "", `detach "vm": vm has snapshots: vm@a`)
	cowherd(t, "detach", "vm@a").want(t, exitError, "", "it is a snapshot")
	cowherd(t, "rm", "vm@a").want(t, exitOK, "vm@a: removed\n", "")
	cowherd(t, "rm", "vm@a").want(t, exitError, "", `remove "vm@a": there is no such snapshot`)
	cowherd(t, "detach", "vm").want(t, exitOK, "vm: detached\n", "")
	cowherd(t, "version").want(t, exitOK, fmt.Sprintf("process %d\n", os.Getpid()), "")

	events := cowherd(t, "events", "--no-follow")
	for _, text := range []string{"device-attached      vm\n", "snapshot-taken       vm@a\n", "device-detached      vm\n"} {
		events.want(t, exitOK, text, "")
	}
	if r := cowherd(t, "events", "--no-follow", "--since", "3"); strings.Count(r.stdout, "\n") != 1 {
		t.Errorf("events since 3: %q", r.stdout)
	}
	cowherd(t, "events", "--since", "99").want(t, exitError, "", "no event 99")
}

// TestClone goes through the life of a clone by the command line.
func TestClone(t *testing.T) {
	dir := serve(t)
	t.Chdir(dir)
	data := bytes.Repeat([]byte("golden"), 1<<20/6+1)[:1<<20]
	if err := os.WriteFile("golden.img", data, 0o600); err != nil {
		t.Fatal(err)
	}
	cowherd(t, "clone", "web", "--from", "golden.img", "web.img", "--no-hydration", "--region-size", "16k", "--hydration-threshold", "8",
		"--hydration-batch-size", "2", "--promote-on-read=off", "--order", "hottest").
		want(t, exitOK, "web: cloned from golden.img, 1 MiB, 0 of 64 regions hydrated (0.0%), nbd+unix:///web?socket=", "")
	cowherd(t, "clone", "other", "--from", "golden.img", "golden.img").want(t, exitError, "", "golden.img is in use")
	cowherd(t, "clone", "other", "--from", "none", "other.img").want(t, exitError, "", "none: no such file")
	cowherd(t, "clone", "other", "--from", "web@none", "other.img").want(t, exitError, "", `there is no device "web@none"`)
	cowherd(t, "ls").want(t, exitOK, "web   1 MiB  clone  16 KiB  0 B of 1 MiB (0.0%)  live       0\n", "")
	cowherd(t, "status", "--dm", "web").want(t, exitOK, "0 2048 clone 8 ", "")
	status := cowherd(t, "status", "web")
	for _, text := range []string{
		"\n  source         " + dir + "/golden.img\n", "\n  regions        0 of 64 regions hydrated (0.0%)\n", "\n  hydration      stopped\n",
		"at most 8, 2 in one copy; hottest, promote on read off\n", "\n  mode           rw\n",
	} {
		status.want(t, exitOK, text, "")
	}
	cowherd(t, "hydrate", "web").want(t, exitOK, "web: 0 of 64 regions hydrated (0.0%), stopped\n", "")
	cowherd(t, "hydrate", "web", "--wait").want(t, exitError, "", "hydration of web is stopped")
	cowherd(t, "clone", "--detach-source", "web").want(t, exitError, "",
		"64 of 64 regions are not hydrated, and hydration is stopped (--wait hydrates the rest first)")
	cowherd(t, "snapshot", "web@a", "--persistent", "--read-only").want(t, exitOK, "web@a: taken", "")
	cowherd(t, "clone", "second", "--from", "web@a", "second.img", "--no-hydration").want(t, exitOK, "second: cloned from web@a", "")
	cowherd(t, "rm", "web@a").want(t, exitError, "", `web@a is in use by clone "second"`)
	cowherd(t, "hydrate", "second", "--start", "--wait", "--threshold", "4", "--batch-size", "1").
		want(t, exitOK, "second: 16 of 16 regions hydrated (100.0%), done, the source is no longer used\n", "")
	cowherd(t, "hydrate", "web", "--start", "--retry", "--wait", "--json").want(t, exitOK, `"source_in_use": false`, "")
	cowherd(t, "hydrate", "web", "--stop", "--wait").want(t, exitOK, "done", "")
	cowherd(t, "hydrate", "web@a").want(t, exitError, "", "web@a")
	cowherd(t, "clone", "third", "--from", "golden.img", "third.img", "--no-hydration").want(t, exitOK, "third: cloned", "")
	for range 2 {
		cowherd(t, "clone", "--detach-source", "third", "--wait").
			want(t, exitOK, "third: detached from "+dir+"/golden.img, 16 of 16 regions hydrated (100.0%)\n", "")
	}
	cowherd(t, "clone", "--detach-source", "third", "--json").want(t, exitOK, `"detached": true`, "")
	cowherd(t, "status", "third").want(t, exitOK, "/golden.img (detached)\n", "")
	cowherd(t, "clone", "--detach-source", "none").want(t, exitError, "", `there is no device "none"`)
	cowherd(t, "clone", "--detach-source", "none", "--wait").want(t, exitError, "", `there is no device "none"`)
	if got, err := os.ReadFile("second.img"); err != nil || !bytes.Equal(got, data) {
		t.Errorf("the copy of the copy is none: %v", err)
	}
	cowherd(t, "dm", "create", "mapped", "--table", "0 8 zero").want(t, exitOK, "", "")
	cowherd(t, "clone", "fourth", "--from", "mapped", "fourth.img").want(t, exitError, "", "mapped can be written")
	cowherd(t, "dm", "create", "fixed", "--readonly", "--table", "0 8 zero").want(t, exitOK, "", "")
	cowherd(t, "clone", "fourth", "--from", "fixed", "fourth.img").want(t, exitOK, "fourth: cloned from fixed, 4 KiB", "")
	cowherd(t, "events", "--no-follow").want(t, exitOK, "clone-hydrated       second\n", "")
	cowherd(t, "events", "--no-follow").want(t, exitOK, "source-detached      third\n", "")
	cowherd(t, "detach", "second").want(t, exitOK, "second: detached", "")
	cowherd(t, "clone", "second", "--from", "golden.img", "second.img").want(t, exitOK, "16 of 16 regions hydrated", "")
	if err := os.Remove("second.img.clone-metadata"); err != nil {
		t.Fatal(err)
	}
	cowherd(t, "detach", "second").want(t, exitOK, "second: detached", "")
	cowherd(t, "clone", "second", "--from", "golden.img", "second.img").want(t, exitError, "", "--overwrite")
	cowherd(t, "clone", "second", "--from", "golden.img", "second.img", "--overwrite", "--metadata", "m", "--direct=false",
		"--destination-is-zero", "--no-discard-passdown", "--no-hydration").want(t, exitOK, "0 of 16 regions hydrated", "")
}

// TestPersistent goes through the life of a persistent snapshot by the command line.
func TestPersistent(t *testing.T) {
	dir := serve(t)
	t.Chdir(dir)
	if err := os.WriteFile("disk.img", make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	cowherd(t, "attach", "vm", "disk.img").want(t, exitOK, "attached", "")
	cowherd(t, "snapshot", "vm@a", "--persistent", "--on-full", "throttle", "--stall-max", "5s", "--warn-at", "70%,90").
		want(t, exitOK, "vm@a: taken", "")
	cowherd(t, "snapshot", "vm@b", "--persistent", "--store", "b.cow", "--max-cow", "64k", "--on-full", "overflow", "--warn-at",
		"none").want(t, exitOK, "vm@b: taken", "")
	cowherd(t, "snapshot", "vm@c", "--reopen", "--store", "c.cow").want(t, exitError, "", dir+"/c.cow: no such file")
	cowherd(t, "snapshot", "vm@c", "--persistent", "--store", "disk.img").want(t, exitError, "", `in use by device "vm"`)
	lines := "vm: 0 2048 snapshot-origin \nvm@a: 0 2048 snapshot 16/2072 16\nvm@b: 0 2048 snapshot 16/128 16\n"
	if r := cowherd(t, "status", "--dm"); r.stdout != lines {
		t.Errorf("got\n%swant\n%s", r.stdout, lines)
	}
	cowherd(t, "status", "--dm", "vm@b").want(t, exitOK, "0 2048 snapshot 16/128 16\n", "")
	cowherd(t, "status", "--dm", "vm@x").want(t, exitError, "", `no device "vm@x"`)
	for _, text := range []string{
		"\n  kept           persistent\n", "\n  when full      throttle\n", "\n  store          " + dir + "/state/vm@a.cow\n",
	} {
		cowherd(t, "status", "vm@a").want(t, exitOK, text, "")
	}
	cowherd(t, "resize", "vm@b", "128k").want(t, exitOK, "vm@b: resized, 8 KiB of 128 KiB (6.2%)\n", "")
	cowherd(t, "resize", "vm@b", "64k").want(t, exitError, "", "cannot shrink")
	cowherd(t, "throttle", "--class", "merge", "--rate", "1G", "--share", "90%").want(t, exitOK,
		"merge  1 GiB/s  100 ms    90%", "")
	cowherd(t, "throttle", "--class=merge", "--burst=8M").want(t, exitOK, "merge  1 GiB/s  8 MiB    90%", "")
	cowherd(t, "throttle", "--json").want(t, exitOK, `"rate_bytes": 1073741824`, "")
	if r := cowherd(t, "throttle", "--off"); r.status != exitOK || strings.Contains(r.stdout, "GiB") {
		t.Errorf("after --off: %+v", r)
	}
	cowherd(t, "merge", "vm@a", "--stop").want(t, exitError, "", `merge "vm@a": it is not being merged`)
	cowherd(t, "merge", "vm@a", "--wait").want(t, exitOK, "vm@a: merged\n", "")
	cowherd(t, "merge", "vm@b", "--json", "--wait").want(t, exitOK, `"result": "merged"`, "")
	events := cowherd(t, "events", "--no-follow")
	for _, text := range []string{"snapshot-resized     vm@b\n", "merge-started        vm@a\n", "merge-finished       vm@b\n"} {
		events.want(t, exitOK, text, "")
	}
	if r := cowherd(t, "ls", "-q"); r.stdout != "vm\n" {
		t.Errorf("left: %q", r.stdout)
	}
}

// TestPercents: shares are read with and without the sign.
func TestPercents(t *testing.T) {
	for text, want := range map[string]string{"none": "[]", "80": "[80]", "70%,90%": "[70 90]", "1%, 100": "[1 100]"} {
		var p percents
		if err := p.UnmarshalText([]byte(text)); err != nil || p == nil || fmt.Sprint([]int(p)) != want {
			t.Errorf("%q: %v, %v", text, p, err)
		}
	}
	for _, text := range []string{"", "0", "101", "-5", "50,,60", "x%", "50%%"} {
		var p percents
		if err := p.UnmarshalText([]byte(text)); err == nil {
			t.Errorf("%q is read as %v", text, p)
		}
	}
}

// TestMergeState: what people are told of a merge, and the bar.
func TestMergeState(t *testing.T) {
	for want, m := range map[string]*api.Merge{
		"merged":                         nil,
		"merging, 1 of 4 chunks":         {Running: true, MergedChunks: 1, TotalChunks: 4},
		"merge stopped, 1 of 4 chunks":   {MergedChunks: 1, TotalChunks: 4},
		"merge failed: the disk is gone": {MergedChunks: 1, TotalChunks: 4, Failed: "the disk is gone"},
	} {
		if got := mergeState(&api.Device{Snapshot: &api.Snapshot{Merge: m}}); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
	for _, test := range []struct {
		part, whole uint64
		filled      int
	}{{0, 4, 0}, {1, 4, 10}, {4, 4, 40}, {5, 4, 40}, {0, 0, 40}} {
		if got := bar(test.part, test.whole); strings.Count(got, "=") != test.filled || len(got) != barWidth+2 {
			t.Errorf("%d of %d: %q", test.part, test.whole, got)
		}
	}
}

// TestJSON: what --json prints is what the API sends.
func TestJSON(t *testing.T) {
	serve(t)
	var device api.Device
	var taken api.SnapshotTaken
	var list api.DeviceList
	var all daemonStatus
	var v versions
	var done map[string]string
	for _, test := range []struct {
		args string
		to   any
	}{
		{"attach vm mem:1M --read-only --json", &device},
		{"snapshot vm@a --json", &taken},
		{"ls --json", &list},
		{"status --json", &all},
		{"version --json", &v},
		{"status vm@a --json", &device},
		{"rm vm@a --json", &done},
	} {
		r := cowherd(t, strings.Fields(test.args)...)
		decoder := json.NewDecoder(strings.NewReader(r.stdout))
		decoder.DisallowUnknownFields()
		if err := decoder.Decode(test.to); err != nil || r.status != exitOK {
			t.Errorf("%s: %v in %s %s", test.args, err, r.stdout, r.stderr)
		}
	}
	if device.Name != "vm@a" || device.Snapshot.ChunkBytes != 4096 || device.SizeBytes != 1<<20 {
		t.Errorf("device %+v", device)
	}
	if taken.Name != "vm@a" || len(list.Devices) != 2 || len(all.Devices) != 2 || all.Daemon.PID != os.Getpid() {
		t.Errorf("%+v, %+v, %+v", taken, list, all)
	}
	if v.Daemon == nil || done["name"] != "vm@a" || done["result"] != "removed" {
		t.Errorf("%+v, %v", v, done)
	}
	events := cowherd(t, "events", "--since", "0", "--no-follow", "--json")
	lines := strings.Split(strings.TrimSpace(events.stdout), "\n")
	for i, line := range lines {
		var e api.Event
		if err := json.Unmarshal([]byte(line), &e); err != nil || e.Seq != uint64(i+1) {
			t.Errorf("event %q: %v", line, err)
		}
	}
	if len(lines) != 3 {
		t.Errorf("%d events", len(lines))
	}
}

// TestLogGone: the daemon outlives the reader of its log.
func TestLogGone(t *testing.T) {
	dir := t.TempDir()
	control := filepath.Join(dir, "control.sock")
	p := startProgram(t, nil, "serve", "--state", filepath.Join(dir, "state"), "--control", control)
	p.waitLog(t, "msg=ready")
	if err := p.pipe.Close(); err != nil {
		t.Fatal(err)
	}
	cowherd(t, "--control", control, "attach", "vm", "mem:1M").want(t, exitOK, "attached", "")
	cowherd(t, "--control", control, "detach", "x").want(t, exitError, "", "no device")
	if err := p.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := p.Wait(); err != nil {
		t.Error(err)
	}
}

// program is the test binary running as the program.
type program struct {
	*exec.Cmd
	pipe   io.ReadCloser
	stderr *bufio.Reader
}

// startProgram starts it with a time limit.
func startProgram(t *testing.T, env []string, args ...string) *program {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	t.Cleanup(cancel)
	p := &program{Cmd: exec.CommandContext(ctx, "/proc/self/exe", args...)}
	p.Env = append(append(os.Environ(), runMain+"=1"), env...)
	pipe, err := p.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	p.pipe, p.stderr = pipe, bufio.NewReader(pipe)
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	return p
}

// waitLog waits for a line of the log.
func (p *program) waitLog(t *testing.T, text string) {
	t.Helper()
	for {
		line, err := p.stderr.ReadString('\n')
		if strings.Contains(line, text) {
			return
		}
		if err != nil {
			t.Fatalf("no %q in the log: %v", text, err)
		}
		t.Log(strings.TrimSpace(line))
	}
}

// end waits for the program's end and returns its status.
func (p *program) end(t *testing.T) int {
	t.Helper()
	if _, err := io.Copy(io.Discard, p.stderr); err != nil {
		t.Error(err)
	}
	_ = p.Wait() // the status says it
	return p.ProcessState.ExitCode()
}

// TestSignals: a signal ends the daemon cleanly; the service manager is told.
func TestSignals(t *testing.T) {
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP} {
		dir := t.TempDir()
		manager, notes := listenNotes(t, filepath.Join(dir, "notify"))
		control := filepath.Join(dir, "run", "control.sock")
		p := startProgram(t, []string{"NOTIFY_SOCKET=" + manager, "COWHERD_CONTROL=" + control}, "serve", "--state",
			filepath.Join(dir, "state"), "--log-format", "json")
		p.waitLog(t, `"msg":"ready"`)
		if note := notes(); note != "READY=1\n" {
			t.Errorf("notified of %q", note)
		}
		cowherd(t, "--control", control, "attach", "vm", "mem:1M").want(t, exitOK, "attached", "")
		second := startProgram(t, nil, "serve", "--state", filepath.Join(dir, "state"), "--control", control+"2")
		second.waitLog(t, fmt.Sprintf("another daemon (process %d) uses it", p.Process.Pid))
		if status := second.end(t); status != exitError {
			t.Errorf("the second daemon ends with %d", status)
		}
		if err := p.Process.Signal(sig); err != nil {
			t.Fatal(err)
		}
		if note := notes(); note != "STOPPING=1\n" {
			t.Errorf("notified of %q", note)
		}
		if status := p.end(t); status != exitOK {
			t.Errorf("status %d after %v", status, sig)
		}
		if left, err := os.ReadDir(filepath.Dir(control)); err != nil || len(left) != 0 {
			t.Errorf("left behind: %v, %v", left, err)
		}
	}
}

// listenNotes is a service manager's socket, and a function that reads from it.
func listenNotes(t *testing.T, path string) (string, func() string) {
	t.Helper()
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_DGRAM|syscall.SOCK_CLOEXEC, 0)
	if err == nil {
		err = syscall.Bind(fd, &syscall.SockaddrUnix{Name: path})
	}
	if err == nil {
		err = syscall.SetsockoptTimeval(fd, syscall.SOL_SOCKET, syscall.SO_RCVTIMEO, &syscall.Timeval{Sec: 20})
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = syscall.Close(fd) })
	return path, func() string {
		var note [256]byte
		n, err := syscall.Read(fd, note[:])
		if err != nil {
			t.Fatalf("notification: %v", err)
		}
		return string(note[:n])
	}
}

// TestSecondSignal: another signal ends a daemon at once that waits for a device.
func TestSecondSignal(t *testing.T) {
	dir := t.TempDir()
	control := filepath.Join(dir, "control.sock")
	p := startProgram(t, nil, "serve", "--state", filepath.Join(dir, "state"), "--control", control)
	p.waitLog(t, "msg=ready")
	cowherd(t, "--control", control, "attach", "slow", "null:1M,latency=1h").want(t, exitOK, "attached", "")
	// The stop flushes the device, which takes an hour.
	for _, text := range []string{"msg=stopping", "ended at once"} {
		if err := p.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		p.waitLog(t, text)
	}
	if status := p.end(t); status != exitError {
		t.Errorf("status %d", status)
	}
}

// TestPassedSocket: a listening socket that is passed on is used for exports, and nothing else is opened.
func TestPassedSocket(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "passed.sock")
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err == nil {
		err = syscall.Bind(fd, &syscall.SockaddrUnix{Name: path})
	}
	if err == nil {
		err = syscall.Listen(fd, 1)
	}
	if err != nil {
		t.Fatal(err)
	}
	socket := os.NewFile(uintptr(fd), path)
	defer socket.Close()
	control := filepath.Join(dir, "control.sock")
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	// The process that counts is the one that exec leaves.
	shell := exec.CommandContext(ctx, "/bin/sh", "-c", `LISTEN_PID=$$ LISTEN_FDS=1 exec "$0" "$@"`,
		"/proc/"+fmt.Sprint(os.Getpid())+"/exe", "serve", "--state", filepath.Join(dir, "state"), "--control", control)
	shell.Env = append(os.Environ(), runMain+"=1")
	shell.ExtraFiles = []*os.File{socket}
	pipe, err := shell.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := shell.Start(); err != nil {
		t.Fatal(err)
	}
	p := &program{Cmd: shell, pipe: pipe, stderr: bufio.NewReader(pipe)}
	p.waitLog(t, "msg=ready")
	cowherd(t, "--control", control, "attach", "vm", "mem:1M").want(t, exitOK, "nbd+unix:///vm?socket="+path, "")
	if _, err := os.Lstat(filepath.Join(dir, "nbd.sock")); !os.IsNotExist(err) {
		t.Errorf("a socket that nobody asked for: %v", err)
	}
	if err := p.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if status := p.end(t); status != exitOK {
		t.Errorf("status %d", status)
	}
}

// TestOneCommand: a command line that begins with the name of a command has the grammar of that one alone, and the same
// flags and commands below it as in the whole grammar.
func TestOneCommand(t *testing.T) {
	whole, err := kong.New(&cli{})
	if err != nil {
		t.Fatal(err)
	}
	shape := func(n *kong.Node) (list []string) {
		for _, leaf := range append(n.Leaves(true), n) {
			list = append(list, leaf.FullPath(), leaf.Help)
			for _, f := range flagsOf(leaf.Flags) {
				list = append(list, f.name)
			}
		}
		return list
	}
	for _, command := range whole.Model.Children {
		root, options := new(cli).grammarFor([]string{command.Name, "--json"})
		one, err := kong.New(root, options...)
		if err != nil {
			t.Fatal(err)
		}
		if command.Name == "completion" {
			if len(one.Model.Children) != len(whole.Model.Children) {
				t.Errorf("completion: %d commands", len(one.Model.Children))
			}
			continue
		}
		if !slices.Equal(flagsOf(one.Model.Flags), flagsOf(whole.Model.Flags)) {
			t.Errorf("%s: the flags of all commands differ", command.Name)
		}
		if n := len(one.Model.Children); n != 1 || !slices.Equal(shape(one.Model.Children[0]), shape(command)) {
			t.Errorf("%s: %d commands, or it is another one", command.Name, n)
		}
	}
	for _, args := range [][]string{nil, {"--help"}, {"--control", "x", "ls"}, {"clonemetadata"}, {"CloneMetadata"}, {""}} {
		if root, options := new(cli).grammarFor(args); len(options) > 0 {
			t.Errorf("%q: only %T", args, root)
		}
	}
}

// TestDocs: every command has a page that names all its flags, and the index leads to it.
func TestDocs(t *testing.T) {
	const docs = "../../docs"
	index, err := os.ReadFile(filepath.Join(docs, "cowherd.md"))
	if err != nil {
		t.Fatal(err)
	}
	parser, err := kong.New(&cli{})
	if err != nil {
		t.Fatal(err)
	}
	for _, command := range parser.Model.Children {
		page := "cowherd-" + command.Name + ".md"
		if command.Name == "version" {
			page = "cowherd.md" // there is nothing else to say
		} else if !bytes.Contains(index, []byte("]("+page+")")) {
			t.Errorf("docs/cowherd.md does not lead to %s", page)
		}
		text, err := os.ReadFile(filepath.Join(docs, page))
		if err != nil {
			t.Error(err)
		}
		for _, leaf := range append(command.Leaves(true), command) {
			for _, flag := range flagsOf(leaf.Flags) {
				if !bytes.Contains(text, []byte("--"+flag.name)) {
					t.Errorf("docs/%s does not name --%s", page, flag.name)
				}
			}
		}
		for _, title := range []string{"## Synopsis", "## Description", "## Exit status", "## See also"} {
			if err == nil && !bytes.Contains(text, []byte("\n"+title+"\n")) {
				t.Errorf("docs/%s has no %q", page, title)
			}
		}
	}
}
