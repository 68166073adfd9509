package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"cowherd/api"
)

// Names of stacks.
const (
	ours       = "cowherd"
	nbdkitFile = "nbdkit-file"
	nbdkitCow  = "nbdkit-cow"
	qsdCBW     = "qsd-cbw"
	qsdStream  = "qsd-stream"
)

func peerNames() []string { return []string{nbdkitFile, nbdkitCow, qsdCBW, qsdStream} }

// stack is a server and the way it is set up.
type stack struct {
	name    string
	program string // that is run, a path or a name to be looked up in PATH
	label   string // what it is, for people
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
		{name: nbdkitCow, program: "nbdkit", label: "nbdkit cow 4k", start: startNbdkitCow},
		{name: qsdCBW, program: "qemu-storage-daemon", label: "qsd copy-before-write", start: startQSD},
		{name: qsdStream, program: "qemu-storage-daemon", label: "qsd block-stream", clone: cloneQSD},
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

// cloneQSD starts qemu-storage-daemon with a qcow2 overlay of the image, which a job fills from the image (block-stream)
// and then needs no more.
func cloneQSD(ctx context.Context, s *server, program, image string) error {
	overlay, monitor := s.path("overlay.qcow2"), s.path("qmp.sock")
	create := exec.CommandContext(ctx, "qemu-img", "create", "-q", "-f", "qcow2", "-b", image, "-F", "raw", overlay)
	create.SysProcAttr = apart()
	if out, err := create.CombinedOutput(); err != nil {
		return fmt.Errorf("qemu-img create: %w: %s", err, tail(out))
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
