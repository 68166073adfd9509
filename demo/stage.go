package demo

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"cowherd/api"
	"cowherd/backend/nbd"
	"cowherd/internal/size"
	"cowherd/service"
)

const (
	// stopTimeout is how long a daemon has to end.
	stopTimeout = 20 * time.Second
	// spare is the room in bytes that must be left beside the image and its COW space.
	spare = 64 << 20
	// pieceSize is the unit in bytes of reading and writing whole images.
	pieceSize = 1 << 20
)

// stage is everything that the demo needs; close removes it.
type stage struct {
	config Config
	dir    string // temporary, the demo's own
	image  string // path of the image file
	origin string // where its contents come from, in words
	size   int64  // of the image in bytes, a multiple of blockSize
	seed   maphash.Seed
	before []uint64 // a hash of each block before anything was written
	// A daemon with each copy engine. The image is attached to one at a time.
	scaled, serialised *daemon
}

// openStage makes the stage. What it has made when it fails is removed.
func openStage(ctx context.Context, c Config, n *narrator) (*stage, error) {
	s := &stage{config: c, seed: maphash.MakeSeed()}
	if err := s.open(ctx, n); err != nil {
		return nil, errors.Join(err, s.close())
	}
	return s, nil
}

func (s *stage) open(ctx context.Context, n *narrator) error {
	source, err := s.source()
	if err != nil {
		return err
	}
	defer source.Close()
	parent, err := s.parent()
	if err != nil {
		return err
	}
	if s.dir, err = os.MkdirTemp(parent, "cowherd-demo-"); err != nil {
		return err
	}
	s.image = filepath.Join(s.dir, "disk.img")
	n.state("makes the image")
	if err := s.copyImage(ctx, source); err != nil {
		return fmt.Errorf("make the image: %w", err)
	}
	if s.scaled, err = startDaemon(s.dir, service.EngineScaled); err != nil {
		return err
	}
	s.serialised, err = startDaemon(s.dir, service.EngineSerialised)
	return err
}

// close ends the daemons and removes all files.
func (s *stage) close() error {
	var errs []error
	for _, d := range []*daemon{s.scaled, s.serialised} {
		if d != nil {
			errs = append(errs, d.stop())
		}
	}
	if s.dir != "" {
		errs = append(errs, os.RemoveAll(s.dir))
	}
	return errors.Join(errs...)
}

// source opens what the image is made of and sets its size: a file, or random bytes.
func (s *stage) source() (io.ReadCloser, error) {
	if s.config.Image == "" {
		if s.config.Size < pieceSize || s.config.Size%blockSize != 0 {
			return nil, fmt.Errorf("size %d is not a multiple of %d from 1 MiB on: %w", s.config.Size, blockSize, syscall.EINVAL)
		}
		s.size, s.origin = s.config.Size, "random bytes"
		return io.NopCloser(io.LimitReader(&noise{rand.NewPCG(1, 2)}, s.size)), nil
	}
	f, err := os.Open(s.config.Image)
	if err != nil {
		return nil, err
	}
	length, err := f.Seek(0, io.SeekEnd) // a block device has no size in its inode
	if err == nil {
		_, err = f.Seek(0, io.SeekStart)
	}
	if err == nil && length < pieceSize {
		err = fmt.Errorf("%s has %s: 1 MiB or more is wanted", s.config.Image, size.Human(length))
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	s.size, s.origin = (length+blockSize-1)/blockSize*blockSize, "a copy of "+s.config.Image
	return f, nil
}

// noise is random bytes without end.
type noise struct{ source *rand.PCG }

func (n *noise) Read(p []byte) (int, error) {
	whole := len(p) &^ 7
	for i := 0; i < whole; i += 8 {
		binary.LittleEndian.PutUint64(p[i:], n.source.Uint64())
	}
	return max(whole, min(len(p), 1)), nil
}

// parent is the directory that the temporary one is made in: one with room for the image and for COW space of the
// same size.
func (s *stage) parent() (string, error) {
	candidates := []string{s.config.Dir}
	if s.config.Dir == "" {
		candidates = []string{"/dev/shm", os.TempDir()}
	}
	need := 2*s.size + spare
	for _, dir := range candidates {
		var st unix.Statfs_t
		if unix.Access(dir, unix.W_OK) == nil && unix.Statfs(dir, &st) == nil && int64(st.Bavail)*int64(st.Bsize) >= need {
			return dir, nil
		}
	}
	return "", fmt.Errorf("%s of room are needed; none in %q: %w", size.Human(need), candidates, syscall.ENOSPC)
}

// copyImage writes the image file and hashes its blocks.
func (s *stage) copyImage(ctx context.Context, source io.Reader) error {
	f, err := os.OpenFile(s.image, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	s.before = make([]uint64, 0, s.size/blockSize)
	piece := make([]byte, pieceSize)
	for err == nil && int64(len(s.before))*blockSize < s.size && ctx.Err() == nil {
		part := piece[:min(pieceSize, s.size-int64(len(s.before))*blockSize)]
		var count int
		count, err = io.ReadFull(source, part)
		if errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) {
			err = nil // the last block is filled up with zeroes
		}
		clear(part[count:])
		if err == nil {
			_, err = f.Write(part)
		}
		for ; len(part) > 0; part = part[blockSize:] {
			s.before = append(s.before, s.hash(part[:blockSize]))
		}
	}
	return errors.Join(err, ctx.Err(), f.Close())
}

func (s *stage) hash(p []byte) uint64 { return maphash.Bytes(s.seed, p) }

// unchanged tells whether p, block number i, is what it was before the demo.
func (s *stage) unchanged(i int, p []byte) bool { return s.hash(p) == s.before[i] }

// daemon is a running daemon and its control API.
type daemon struct {
	*service.Daemon
	client *api.Client
	engine string
	socket string // of its exports
}

func startDaemon(dir, engine string) (*daemon, error) {
	control := filepath.Join(dir, engine+".control")
	d := &daemon{engine: engine, socket: filepath.Join(dir, engine+".nbd"), client: api.NewClient(control)}
	var err error
	d.Daemon, err = service.New(service.Config{
		StateDir: filepath.Join(dir, engine+".state"), Control: control, NBD: []string{"unix:" + d.socket}, Engine: engine,
	})
	if err != nil {
		return nil, fmt.Errorf("daemon: %w", err)
	}
	d.Serve()
	return d, nil
}

// stop ends the daemon, whether the demo was broken off or not.
func (d *daemon) stop() error {
	d.client.Close()
	ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
	defer cancel()
	return d.Stop(ctx)
}

// attach makes the image "vm".
func (d *daemon) attach(ctx context.Context, image string) error {
	_, err := d.client.Attach(ctx, api.AttachRequest{Name: "vm", Device: image})
	return err
}

// snapshot takes a snapshot and tells how long new requests waited for it.
func (d *daemon) snapshot(ctx context.Context, name string) (time.Duration, error) {
	taken, err := d.client.TakeSnapshot(ctx, api.SnapshotRequest{Name: name, ChunkBytes: blockSize})
	return time.Duration(taken.StallMicroseconds) * time.Microsecond, err
}

// open connects to an export.
func (d *daemon) open(ctx context.Context, export string, connections int) (*nbd.Device, error) {
	return nbd.Open(ctx, nbd.Config{Network: "unix", Address: d.socket, Export: export, Connections: connections})
}

// isUniform tells whether p repeats its first eight bytes.
func isUniform(p []byte) bool { return bytes.Equal(p[8:], p[:len(p)-8]) }
