package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"cowherd/api"
)

// Names of stacks.
const (
	ours            = "cowherd"
	nbdkitFile      = "nbdkit-file"
	nbdkitMemory    = "nbdkit-memory"
	nbdkitCow       = "nbdkit-cow"
	qemuNBD         = "qemu-nbd"
	qemuNBDSnapshot = "qemu-nbd-snapshot"
	qemuNBDOverlay  = "qemu-nbd-overlay"
	qsdCBW          = "qsd-cbw"
	qsdStream       = "qsd-stream"
	nbdServer       = "nbd-server"
)

func peerNames() []string {
	return []string{nbdkitFile, nbdkitMemory, nbdkitCow, qemuNBD, qemuNBDSnapshot, qemuNBDOverlay, qsdCBW, qsdStream, nbdServer}
}

// stack is a server and the way it is set up.
type stack struct {
	name    string
	program string   // that is run, a path or a name to be looked up in PATH
	needs   []string // programs more that it is set up with
	label   string   // what it is, for people
	start   func(ctx context.Context, s *server, program, image string) error
	// clone starts it with a clone of the image, which does not hydrate. It is nil for a stack without clones.
	clone   func(ctx context.Context, s *server, program, image string) error
	skipped string // why it is not measured; "" if it is
}

// server is a stack that runs. What it writes is in a directory of its own; its log lies beside it.
type server struct {
	dir     string
	process *process
	closers []func() error // of connections to it
	exports [2]string      // URIs, by export; "" where the stack has none
	// freeze takes the snapshot. It is nil where the snapshot is there from the start, or never.
	freeze func(ctx context.Context) error
	// hydrate starts the hydration of the clone, and hydrated waits for its end. Both are nil where there is no clone.
	hydrate, hydrated func(ctx context.Context) error
	// check fails unless the snapshot is valid and has this many chunks of its own. It is nil where that is not known.
	check func(ctx context.Context, chunks int64) error
}

func stacks(cowherd string) map[string]*stack {
	all := map[string]*stack{}
	for _, s := range []*stack{
		{name: ours, program: cowherd, label: "cowherd", start: startCowherd, clone: cloneCowherd},
		{name: nbdkitFile, program: "nbdkit", label: "nbdkit file", start: startNbdkitFile},
		{name: nbdkitMemory, program: "nbdkit", needs: []string{"nbdcopy"}, label: "nbdkit memory", start: startNbdkitMemory},
		{name: nbdkitCow, program: "nbdkit", label: "nbdkit cow 4k", start: startNbdkitCow},
		{name: qemuNBD, program: "qemu-nbd", label: "qemu-nbd", start: startQemuNBD},
		{name: qemuNBDSnapshot, program: "qemu-nbd", label: "qemu-nbd --snapshot", start: startQemuNBDSnapshot},
		{name: qemuNBDOverlay, program: "qemu-nbd", needs: []string{"qemu-img"}, label: "qemu-nbd overlay", clone: cloneQemuNBD},
		{name: qsdCBW, program: "qemu-storage-daemon", label: "qsd copy-before-write", start: startQSD},
		{name: qsdStream, program: "qemu-storage-daemon", needs: []string{"qemu-img"}, label: "qsd block-stream",
			clone: cloneQSD},
		{name: nbdServer, program: "nbd-server", label: "nbd-server", start: startNBDServer},
	} {
		all[s.name] = s
	}
	return all
}

// startServer starts a stack over an image, or with a clone of it.
func startServer(ctx context.Context, k *stack, clone bool, dir, image string) (*server, error) {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	s := &server{dir: dir}
	start := k.start
	if clone {
		start = k.clone
	}
	if err := start(ctx, s, k.program, image); err != nil {
		return nil, fmt.Errorf("start %s: %w", k.name, withLog(err, s.stop()))
	}
	return s, nil
}

// stop ends the server, removes what it wrote, and returns what it logged.
func (s *server) stop() string {
	log := ""
	for _, closer := range s.closers {
		_ = closer() // the process ends in any case
	}
	if s.process != nil {
		log = s.process.stop()
	}
	if err := os.RemoveAll(s.dir); err != nil {
		log += err.Error()
	}
	return log
}

func (s *server) path(name string) string { return filepath.Join(s.dir, name) }

// socket is where the server listens for NBD.
func (s *server) socket() string { return s.path("nbd.sock") }

// uri is an export on the server's socket.
func (s *server) uri(export string) string {
	return "nbd+unix:///" + export + "?socket=" + url.QueryEscape(s.socket())
}

// spawn starts the server's process and waits until it greets NBD clients.
func (s *server) spawn(ctx context.Context, program string, args ...string) (err error) {
	if s.process, err = spawn(s.dir, program, args...); err != nil {
		return err
	}
	return s.process.waitListening(ctx, s.socket())
}

func startNbdkitFile(ctx context.Context, s *server, program, image string) error {
	s.exports[live] = s.uri("")
	return s.spawn(ctx, program, "--foreground", "--unix", s.socket(), "file", image)
}

// startNbdkitMemory starts the memory plugin with what is in the image, because reads of what was never written are cheap.
func startNbdkitMemory(ctx context.Context, s *server, program, image string) error {
	info, err := os.Stat(image)
	if err != nil {
		return err
	}
	s.exports[live] = s.uri("")
	if err := s.spawn(ctx, program, "--foreground", "--unix", s.socket(), "memory", "size="+number(info.Size())); err != nil {
		return err
	}
	return tool(ctx, "nbdcopy", image, s.uri(""))
}

// startNbdkitCow starts the cow filter, whose overlay is an unlinked file in TMPDIR, which is the server's directory.
func startNbdkitCow(ctx context.Context, s *server, program, image string) error {
	s.exports[snapshot] = s.uri("")
	return s.spawn(ctx, program, "--foreground", "--unix", s.socket(), "--filter=cow", "file", image,
		fmt.Sprintf("cow-block-size=%d", blockBytes))
}

// startQSD starts qemu-storage-daemon with a live export that copies before it writes, and one of the frozen view.
func startQSD(ctx context.Context, s *server, program, image string) error {
	info, err := os.Stat(image)
	if err != nil {
		return err
	}
	fleece := s.path("fleece")
	if err := os.WriteFile(fleece, nil, 0o600); err != nil {
		return err
	}
	if err := os.Truncate(fleece, info.Size()); err != nil {
		return err
	}
	s.exports = [2]string{live: s.uri("origin"), snapshot: s.uri("snap")}
	return s.spawn(ctx, program,
		"--blockdev", "driver=file,node-name=image,filename="+image,
		"--blockdev", "driver=file,node-name=fleece,discard=unmap,filename="+fleece,
		"--blockdev", "driver=copy-before-write,node-name=cbw,file=image,target=fleece",
		"--blockdev", "driver=snapshot-access,node-name=access,file=cbw",
		"--nbd-server", "addr.type=unix,max-connections=0,addr.path="+s.socket(),
		"--export", "type=nbd,id=origin,node-name=cbw,name=origin,writable=on",
		"--export", "type=nbd,id=snap,node-name=access,name=snap")
}

// makeOverlay makes a qcow2 image that has nothing of its own yet, with clusters as large as they are by default.
func makeOverlay(ctx context.Context, overlay, image string) error {
	return tool(ctx, "qemu-img", "create", "-q", "-f", "qcow2", "-b", image, "-F", "raw", overlay)
}

// tool runs a program that a server is set up with.
func tool(ctx context.Context, program string, args ...string) error {
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.SysProcAttr = apart()
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", program, err, tail(out))
	}
	return nil
}

// spawnQemuNBD starts qemu-nbd for as many clients as there are, and one more that looks whether it is there. It stays
// when they leave.
func (s *server) spawnQemuNBD(ctx context.Context, program string, args ...string) error {
	clients := fmt.Sprint(slices.Max(connections) + 1)
	return s.spawn(ctx, program, append([]string{"--persistent", "--shared", clients, "--socket", s.socket()}, args...)...)
}

func startQemuNBD(ctx context.Context, s *server, program, image string) error {
	s.exports[live] = s.uri("")
	return s.spawnQemuNBD(ctx, program, "--format", "raw", image)
}

// startQemuNBDSnapshot starts qemu-nbd with a temporary overlay, an unlinked qcow2 image in TMPDIR, which is the server's
// directory.
func startQemuNBDSnapshot(ctx context.Context, s *server, program, image string) error {
	s.exports[snapshot] = s.uri("")
	return s.spawnQemuNBD(ctx, program, "--snapshot", "--format", "raw", image)
}

// cloneQemuNBD starts qemu-nbd with an overlay of the image, which it cannot hydrate.
func cloneQemuNBD(ctx context.Context, s *server, program, image string) error {
	overlay := s.path("overlay.qcow2")
	if err := makeOverlay(ctx, overlay, image); err != nil {
		return err
	}
	s.exports[live] = s.uri("")
	return s.spawnQemuNBD(ctx, program, "--format", "qcow2", overlay)
}

// startNBDServer starts nbd-server, which knows its export from a file only, and takes the size of an image in memory for
// zero if that does not say it.
func startNBDServer(ctx context.Context, s *server, program, image string) error {
	info, err := os.Stat(image)
	if err != nil {
		return err
	}
	config := s.path("config")
	text := fmt.Sprintf("[generic]\nunixsock = %s\n[image]\nexportname = %s\nfilesize = %d\n", s.socket(), image, info.Size())
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		return err
	}
	s.exports[live] = s.uri("image")
	if s.process, err = spawnAdopted(s.dir, program, "-C", config, "-p", s.path("pid")); err != nil {
		return err
	}
	return s.process.waitListening(ctx, s.socket())
}

// cloneQSD starts qemu-storage-daemon with a qcow2 overlay of the image, which a job fills from the image (block-stream)
// and then needs no more.
func cloneQSD(ctx context.Context, s *server, program, image string) error {
	overlay, monitor := s.path("overlay.qcow2"), s.path("qmp.sock")
	if err := makeOverlay(ctx, overlay, image); err != nil {
		return err
	}
	s.exports[live] = s.uri("clone")
	err := s.spawn(ctx, program,
		"--chardev", "socket,id=qmp,server=on,wait=off,path="+monitor, "--monitor", "chardev=qmp",
		"--blockdev", "driver=file,node-name=image,read-only=on,filename="+image,
		"--blockdev", "driver=qcow2,node-name=clone,backing=image,file.driver=file,file.filename="+overlay,
		"--nbd-server", "addr.type=unix,max-connections=0,addr.path="+s.socket(),
		"--export", "type=nbd,id=clone,node-name=clone,name=clone,writable=on")
	if err != nil {
		return err
	}
	q, err := openQMP(ctx, monitor)
	if err != nil {
		return err
	}
	s.closers = append(s.closers, q.close)
	s.hydrate = func(ctx context.Context) error {
		return q.execute(ctx, "block-stream", map[string]string{"job-id": "hydration", "device": "clone"})
	}
	s.hydrated = func(ctx context.Context) error { return q.jobEnded(ctx, "hydration") }
	return nil
}

// startCowherd starts the daemon and attaches the image. The snapshot's COW space is an unlinked file in the state
// directory, which is below the server's.
func startCowherd(ctx context.Context, s *server, program, image string) error {
	command, err := serveCowherd(ctx, s, program)
	if err != nil {
		return err
	}
	if _, err := command(ctx, "attach", "vm", image); err != nil {
		return err
	}
	s.exports = [2]string{live: s.uri("vm"), snapshot: s.uri("vm@s")}
	s.freeze = func(ctx context.Context) error {
		_, err := command(ctx, "snapshot", "vm@s", "--chunk", fmt.Sprint(blockBytes))
		return err
	}
	s.check = func(ctx context.Context, chunks int64) error {
		text, err := command(ctx, "status", "--json", "vm@s")
		if err != nil {
			return err
		}
		return checkStatus(text, chunks)
	}
	return nil
}

// cloneCowherd starts the daemon and makes a clone, with the regions and the limits that it has by default.
func cloneCowherd(ctx context.Context, s *server, program, image string) error {
	command, err := serveCowherd(ctx, s, program)
	if err != nil {
		return err
	}
	if _, err := command(ctx, "clone", "vm", "--from", image, s.path("clone"), "--no-hydration"); err != nil {
		return err
	}
	s.exports[live] = s.uri("vm")
	s.hydrate = func(ctx context.Context) error {
		_, err := command(ctx, "hydrate", "vm", "--start")
		return err
	}
	s.hydrated = func(ctx context.Context) error {
		_, err := command(ctx, "hydrate", "vm", "--wait")
		return err
	}
	return nil
}

// serveCowherd starts the daemon, and returns how to have it do something.
func serveCowherd(ctx context.Context, s *server, program string) (
	command func(ctx context.Context, args ...string) ([]byte, error), err error) {
	control := s.path("control.sock")
	state := s.path("state")
	if err := os.Mkdir(state, 0o700); err != nil {
		return nil, err
	}
	err = s.spawn(ctx, program, "serve", "--control", control, "--nbd", "unix:"+s.socket(), "--state", state)
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context, args ...string) ([]byte, error) {
		cmd := exec.CommandContext(ctx, program, args...)
		cmd.Env = append(os.Environ(), "COWHERD_CONTROL="+control)
		cmd.SysProcAttr = apart()
		out, err := cmd.CombinedOutput()
		if err != nil {
			return nil, fmt.Errorf("cowherd %s: %w: %s", strings.Join(args, " "), err, tail(out))
		}
		return out, nil
	}, s.process.waitConnecting(ctx, control)
}

// checkStatus tells from what "cowherd status --json" says of a snapshot whether that is valid and has this many chunks
// of its own. Else not a snapshot was measured, but the lack of one.
func checkStatus(text []byte, chunks int64) error {
	var d api.Device
	if err := json.Unmarshal(text, &d); err != nil {
		return fmt.Errorf("cowherd status: %w", err)
	}
	if d.State != api.StateValid || d.Snapshot == nil {
		return fmt.Errorf("cowherd status: %s is %s instead of a valid snapshot: %s", d.Name, d.State, tail(text))
	}
	if n := d.Snapshot.CopiedChunks + d.Snapshot.OverwrittenChunks; n != uint64(chunks) {
		return fmt.Errorf("cowherd status: %s has %d chunks of its own instead of %d", d.Name, n, chunks)
	}
	return nil
}
