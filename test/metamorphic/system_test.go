package metamorphic

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"cowherd/api"
	"cowherd/backend/file"
	"cowherd/backend/mem"
	"cowherd/backend/nbd"
	"cowherd/block"
	"cowherd/cowstore"
	"cowherd/dm"
	"cowherd/internal/fault"
	"cowherd/kcopyd"
	"cowherd/service"
	"cowherd/target/snapshot"
)

// opLimit bounds what is done to a system beside I/O.
const opLimit = 30 * time.Second

// system is an origin that snapshots can be taken of.
type system interface {
	// device is the origin (0) or a snapshot. It is called from many goroutines, though not while the same snapshot is
	// taken or dropped.
	device(number int) block.Device
	take(o op) error
	drop(number int) error
	// close ends everything.
	close() error
}

// place is what both systems need: where files are, and how they are to be set up.
type place struct {
	config config
	dir    string
	size   int64
}

// image is the path of the origin's file.
func (p *place) image() string { return filepath.Join(p.dir, "origin.img") }

// makeImage makes the origin's file.
func (p *place) makeImage() error {
	return errors.Join(os.WriteFile(p.image(), nil, 0o600), os.Truncate(p.image(), p.size))
}

// store is the path of a snapshot's COW device where that is a file.
func (p *place) store(number int) string { return filepath.Join(p.dir, fmt.Sprintf("cow%d", number)) }

// chunkSize is that of a snapshot of a class.
func (p *place) chunkSize(class int) cowstore.ChunkSize {
	return cowstore.ChunkSize(p.config.chunk << (2 * class))
}

// room is the COW space in bytes that a snapshot needs at most.
func (p *place) room(chunk cowstore.ChunkSize) int64 {
	return int64(chunk.ChunkCeil(p.size)) * int64(chunk)
}

// stack is the targets without a daemon.
type stack struct {
	place
	leaf    closer
	late    []*fault.Async // in front of leaf and COW devices
	engine  kcopyd.Engine
	target  *snapshot.Origin
	devices map[int]*dm.Device
	snaps   map[int]*layer
}

// layer is a snapshot of a stack.
type layer struct {
	*snapshot.Snapshot
	cow closer
}

type closer interface {
	block.Device
	Close() error
}

// openStack makes a stack, whose origin is all zeroes.
func openStack(p place) (s *stack, err error) {
	s = &stack{place: p, devices: map[int]*dm.Device{}, snaps: map[int]*layer{}}
	c := kcopyd.Config{BufferCeiling: p.config.buffers}
	if s.engine = kcopyd.NewScaled(c); p.config.engine == service.EngineSerialised {
		err = s.engine.Close()
		s.engine = kcopyd.NewSerialised(c)
	}
	if err != nil {
		return nil, err
	}
	if p.config.origin == "mem" {
		s.leaf, err = mem.New(mem.Config{Size: p.size})
	} else if err = p.makeImage(); err == nil {
		s.leaf, err = file.Open(p.image(), file.Options{})
	}
	if err != nil {
		return nil, errors.Join(err, s.engine.Close())
	}
	s.target = snapshot.NewOrigin(s.behind(s.leaf))
	s.devices[0] = dm.NewDevice("origin", s.target, false)
	return s, nil
}

// behind puts a device behind goroutines that complete its requests later and in any order, if so configured.
func (s *stack) behind(d block.Device) block.Device {
	if s.config.route != routeLater {
		return d
	}
	a := fault.NewAsync(d, 3, uint64(len(s.late)))
	s.late = append(s.late, a)
	return a
}

func (s *stack) device(number int) block.Device { return s.devices[number] }

func (s *stack) take(o op) (err error) {
	chunk := s.chunkSize(o.class)
	x := &layer{}
	switch s.config.store {
	case "mem":
		x.cow, err = mem.New(mem.Config{Size: s.room(chunk)})
	case "file":
		x.cow, err = file.Create(s.store(o.on), s.room(chunk), file.Options{})
	default:
		x.cow, err = file.TempStriped(s.dir, s.room(chunk), cowstore.StripeBytes(chunk), cowstore.Shards())
	}
	if err != nil {
		return err
	}
	x.Snapshot, err = snapshot.New(snapshot.Config{
		Name: fmt.Sprint(o.on), Origin: s.target, COW: s.behind(x.cow), ChunkSize: chunk, Engine: s.engine,
		Store: cowstore.NewTransient(x.cow.Size(), 0, chunk), DiscardZeroesCOW: o.discards,
	})
	if err != nil {
		return errors.Join(err, x.cow.Close())
	}
	s.snaps[o.on] = x
	if err := s.change(func() error { return s.target.Add(x.Snapshot) }); err != nil {
		return err
	}
	s.devices[o.on] = dm.NewDevice(fmt.Sprint(o.on), x, false)
	return nil
}

// change changes the origin's snapshots while the origin is suspended.
func (s *stack) change(what func() error) error {
	ctx, cancel := context.WithTimeout(context.Background(), opLimit)
	defer cancel()
	if err := s.devices[0].Suspend(ctx); err != nil {
		return err
	}
	defer s.devices[0].Resume()
	return what()
}

func (s *stack) drop(number int) error {
	ctx, cancel := context.WithTimeout(context.Background(), opLimit)
	defer cancel()
	x := s.snaps[number]
	if st := x.Status(); st.Invalid != nil {
		return fmt.Errorf("snapshot %d is invalid: %w", number, st.Invalid)
	}
	if err := s.devices[number].Suspend(ctx); err != nil {
		return err
	}
	err := s.change(func() error { s.target.Remove(x.Snapshot); return nil })
	if err = errors.Join(err, s.devices[number].Close(ctx)); err != nil {
		return err
	}
	delete(s.snaps, number)
	delete(s.devices, number)
	return x.cow.Close()
}

func (s *stack) close() error {
	var err error
	for number := range s.snaps {
		err = errors.Join(err, s.drop(number))
	}
	ctx, cancel := context.WithTimeout(context.Background(), opLimit)
	defer cancel()
	err = errors.Join(err, s.devices[0].Close(ctx), s.engine.Close())
	if st := s.engine.Stats(); st.BuffersInUse != 0 || st.JobsInFlight != 0 {
		err = errors.Join(err, fmt.Errorf("the copy engine is not empty: %+v", st))
	}
	for _, a := range s.late {
		a.Close()
	}
	return errors.Join(err, s.leaf.Close())
}

// served is a daemon and its NBD clients.
type served struct {
	place
	daemon  *service.Daemon
	socket  string
	clients map[int]*nbd.Device
}

// openServed starts a daemon and attaches an origin that is all zeroes.
func openServed(p place) (*served, error) {
	s := &served{place: p, socket: filepath.Join(p.dir, "nbd.sock"), clients: map[int]*nbd.Device{}}
	var err error
	s.daemon, err = service.New(service.Config{
		StateDir: filepath.Join(p.dir, "state"), NBD: []string{"unix:" + s.socket}, Engine: p.config.engine,
		BufferCeiling: p.config.buffers,
	})
	if err != nil {
		return nil, err
	}
	s.daemon.Serve()
	r := api.AttachRequest{Name: "origin", Device: fmt.Sprintf("mem:%d", p.size)}
	if p.config.origin == "file" {
		r.Device = p.image()
		err = p.makeImage()
	}
	if err == nil {
		_, err = s.daemon.Attach(r)
	}
	if err == nil {
		err = s.open(0)
	}
	if err != nil {
		return nil, errors.Join(err, s.close())
	}
	return s, nil
}

// name is what the daemon calls a device.
func name(number int) string {
	if number == 0 {
		return "origin"
	}
	return fmt.Sprintf("origin@%d", number)
}

// open connects to a device.
func (s *served) open(number int) error {
	ctx, cancel := context.WithTimeout(context.Background(), opLimit)
	defer cancel()
	client, err := nbd.Open(ctx, nbd.Config{
		Network: "unix", Address: s.socket, Export: name(number), Connections: s.config.connections(),
	})
	if err == nil {
		s.clients[number] = client
	}
	return err
}

func (s *served) device(number int) block.Device { return s.clients[number] }

func (s *served) take(o op) error {
	r := api.SnapshotRequest{
		Name: name(o.on), ChunkBytes: int64(s.chunkSize(o.class)), Store: s.config.store, DiscardZeroesCOW: o.discards,
	}
	if r.Store == "file" {
		r.Store = s.store(o.on)
		err := errors.Join(os.WriteFile(r.Store, nil, 0o600), os.Truncate(r.Store, s.room(s.chunkSize(o.class))))
		if err != nil {
			return err
		}
	}
	if _, err := s.daemon.TakeSnapshot(context.Background(), r); err != nil {
		return err
	}
	return s.open(o.on)
}

func (s *served) drop(number int) error {
	x, err := s.daemon.Device(name(number))
	if err != nil {
		return err
	}
	if x.State != api.StateValid {
		return fmt.Errorf("snapshot %d is %s: %s", number, x.State, x.Snapshot.Invalid)
	}
	err = s.clients[number].Close()
	delete(s.clients, number)
	for err == nil {
		err = s.daemon.RemoveSnapshot(context.Background(), name(number), false)
		if !errors.Is(err, syscall.EBUSY) { // the client may not have been counted off yet
			return err
		}
		err = nil
	}
	return err
}

func (s *served) close() error {
	var err error
	for _, client := range s.clients {
		err = errors.Join(err, client.Close())
	}
	for _, x := range s.daemon.Devices() {
		if x.State == api.StateInvalid {
			err = errors.Join(err, fmt.Errorf("%s is invalid: %s", x.Name, x.Snapshot.Invalid))
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), opLimit)
	defer cancel()
	return errors.Join(err, s.daemon.Stop(ctx))
}
