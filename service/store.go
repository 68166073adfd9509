package service

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"syscall"

	"cowherd/api"
	"cowherd/backend/file"
	"cowherd/backend/mem"
	"cowherd/block"
	"cowherd/cowstore"
	"cowherd/internal/size"
	"cowherd/target/snapshot"
)

// storeSuffix is the end of the names of files that the daemon makes for persistent stores.
const storeSuffix = ".cow"

// growStart is the size in bytes, at most, that a file begins with that is to grow.
const growStart = 64 << 20

// openTransient opens the COW device of a transient snapshot and makes a store for it.
func (d *Daemon) openTransient(s *snap) (snapshot.Store, error) {
	r := &s.request
	if err := cowstore.CheckNewChunkSize(r.ChunkBytes, s.origin.target.Limits().LogicalBlock); err != nil {
		return nil, invalid(err)
	}
	chunk := cowstore.ChunkSize(r.ChunkBytes)
	length, err := cowLength(s.origin.target.Size(), r.MaxCOWBytes, chunk)
	if err != nil {
		return nil, err
	}
	if s.cow, err = d.openTransientCOW(s, length); err != nil {
		return nil, fmt.Errorf("COW space %q: %w", r.Store, err)
	}
	if s.cow.Size() < int64(chunk) {
		return nil, api.Errorf(syscall.EINVAL, "COW device %s has %d bytes: not even one chunk", r.Store, s.cow.Size())
	}
	return cowstore.NewTransient(s.cow.Size(), r.MaxCOWBytes, chunk), nil
}

// openTransientCOW opens a COW device with room for length bytes where that can be chosen.
func (d *Daemon) openTransientCOW(s *snap, length int64) (*backing, error) {
	r := &s.request
	switch r.Store {
	case storeTemp:
		return openTemp(d.state.path, length, r.ChunkBytes)
	case storeMem:
		// It cannot grow: so it has all the room that there may be one day, and the store keeps the limit.
		length, err := cowLength(s.origin.target.Size(), 0, cowstore.ChunkSize(r.ChunkBytes))
		if err != nil {
			return nil, err
		}
		made, err := mem.New(mem.Config{Size: length})
		if err != nil {
			return nil, err
		}
		return &backing{leaf: made}, nil
	}
	if info, err := os.Stat(r.Store); err == nil && info.IsDir() && filepath.IsAbs(r.Store) {
		return openTemp(r.Store, length, r.ChunkBytes)
	}
	return d.openFile(s.name, r.Store, file.Options{})
}

// createPersistent makes the store of a new persistent snapshot. The state file says so before anything is written, so
// that a store that was being made when the daemon died is never taken for one of a snapshot.
func (d *Daemon) createPersistent(s *snap) (snapshot.Store, error) {
	r := &s.request
	if isVolatile(s.origin.request.Device) {
		return nil, api.Errorf(syscall.EINVAL, "what %s holds ends with the daemon: a snapshot of it cannot be persistent",
			s.origin.name)
	}
	if err := cowstore.CheckNewChunkSize(r.ChunkBytes, s.origin.target.Limits().LogicalBlock); err != nil {
		return nil, invalid(err)
	}
	length, err := storeLength(s.origin.target.Size(), r.MaxCOWBytes, cowstore.ChunkSize(r.ChunkBytes))
	if err != nil {
		return nil, err
	}
	if r.OnFull == api.OnFullGrow {
		length = min(length, max(growStart, storeChunksMin*r.ChunkBytes))
	}
	if err := d.openNewStore(s, length); err != nil {
		return nil, fmt.Errorf("store %s: %w", r.Store, err)
	}
	s.store, err = cowstore.CreatePersistent(s.cow.leaf, cowstore.ChunkSize(r.ChunkBytes), cowstore.PersistentConfig{})
	if err != nil {
		return nil, fmt.Errorf("store %s: %w", r.Store, err)
	}
	return s.store, nil
}

// openNewStore opens the device of a store that is to be made: a file of length bytes that is made for it, or what is
// there, if that is empty or may be overwritten. The state file says that the snapshot is being taken.
func (d *Daemon) openNewStore(s *snap, length int64) (err error) {
	r := &s.request
	if _, err := os.Stat(r.Store); errors.Is(err, fs.ErrNotExist) {
		return d.createFile(s, length)
	}
	if s.cow, err = d.openFile(s.name, r.Store, file.Options{}); err != nil {
		return err
	}
	if s.cow.Size() == 0 { // a file that somebody has made for us
		if err := s.cow.leaf.(block.Grower).Grow(length); err != nil {
			return err
		}
	}
	if r.MaxCOWBytes > 0 && r.MaxCOWBytes < s.cow.Size() {
		return api.Errorf(syscall.EINVAL, "it has %d bytes, and a persistent store takes all of them: a limit of %d cannot "+
			"be kept", s.cow.Size(), r.MaxCOWBytes)
	}
	if !r.Overwrite {
		if err := checkEmpty(s.cow.leaf); err != nil {
			return err
		}
	}
	return d.remember(s, phaseTaking)
}

// createFile makes the file of a store. The state file says so before, lest a file be left of which nobody knows.
func (d *Daemon) createFile(s *snap, length int64) error {
	path := s.request.Store
	s.made = true
	if err := d.remember(s, phaseTaking); err != nil {
		s.made = false
		return err
	}
	made, err := file.Create(path, length, file.Options{})
	if err != nil {
		s.made = false // what may be there is another's
		return err
	}
	s.cow = &backing{leaf: made}
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	id := idOf(info)
	if err := d.names.hold(id, s.name, path); err != nil {
		return err
	}
	s.cow.release = func() { d.names.letGo(id) }
	return syncDir(filepath.Dir(path))
}

// emptyBytes is how much of a device must be zero for it to count as empty, as lvm has it.
const emptyBytes = 4 << 10

// checkEmpty tells whether a device holds nothing that would be lost: EEXIST.
func checkEmpty(d block.Device) error {
	p := make([]byte, min(emptyBytes, d.Size()/int64(d.Limits().LogicalBlock)*int64(d.Limits().LogicalBlock)))
	if err := block.Read(d, p, 0); err != nil {
		return err
	}
	if len(bytes.Trim(p, "\x00")) == 0 {
		return nil
	}
	h, err := cowstore.ReadHeader(d)
	switch {
	case err != nil:
		return api.Errorf(syscall.EEXIST, "it is not empty: let it be overwritten if that may be lost")
	case h.Valid:
		return api.Errorf(syscall.EEXIST, "it holds the store of a snapshot: reopen that, or let it be overwritten")
	}
	return api.Errorf(syscall.EEXIST, "it holds the store of a snapshot that is invalid: let it be overwritten")
}

// reopenPersistent opens a store that is there, for a new snapshot.
func (d *Daemon) reopenPersistent(s *snap) (snapshot.Store, error) {
	if err := d.openPersistent(s); err != nil {
		return nil, fmt.Errorf("store %s: %w", s.request.Store, err)
	}
	if !s.store.Valid() {
		return nil, api.Errorf(syscall.EINVAL, "store %s: it is invalid: its snapshot is lost", s.request.Store)
	}
	return s.store, nil
}

// openPersistent opens the store of s, and takes its chunk size unless another is asked for, which is an error.
func (d *Daemon) openPersistent(s *snap) (err error) {
	if s.cow, err = d.openFile(s.name, s.request.Store, file.Options{}); err != nil {
		return err
	}
	if s.store, err = cowstore.OpenPersistent(s.cow.leaf, cowstore.PersistentConfig{}); err != nil {
		return err
	}
	has, wanted := int64(s.store.ChunkSize()), s.request.ChunkBytes
	if wanted != 0 && wanted != has {
		return api.Errorf(syscall.EINVAL, "it has chunks of %s, not of %s", size.Exact(has), size.Exact(wanted))
	}
	s.request.ChunkBytes = has
	return nil
}

// storeChunksMin is the least that a store can be made of: header, area and a chunk of data.
const storeChunksMin = 3

// storeLength is the size in bytes of a store with room for all that an origin of the given size can need, within limit
// (0: none): the header, a chunk for each of the origin, and an area for as many records and one behind.
func storeLength(origin, limit int64, chunk cowstore.ChunkSize) (int64, error) {
	if limit < 0 || limit > 0 && limit < storeChunksMin*int64(chunk) {
		return 0, api.Errorf(syscall.EINVAL, "a store of at most %d bytes does not hold %d chunks of %s, which is the least",
			limit, storeChunksMin, size.Exact(int64(chunk)))
	}
	data := max(1, origin/int64(chunk))
	if origin > data*int64(chunk) {
		data++
	}
	chunks := 2 + data + data/int64(cowstore.NewLayout(0, chunk).AreaRecords())
	if limit > 0 {
		chunks = min(chunks, limit/int64(chunk))
	}
	return min(chunks, math.MaxInt64/int64(chunk)) * int64(chunk), nil
}

// removeFile removes a file for good.
func removeFile(path string) error {
	if err := os.Remove(path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

// destroyStore makes the store of a persistent snapshot that is not open invalid, and removes the file if the daemon
// made it. Nothing needs to be done where there is no store any more.
func (d *Daemon) destroyStore(saved *savedSnapshot) error {
	path := saved.Request.Store
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	cow, err := d.openFile(saved.Request.Name, path, file.Options{})
	if err != nil {
		return fmt.Errorf("its store could not be made invalid: %w", err)
	}
	if cow.Size() == 0 { // the daemon died between making the file and giving it its length
		return errors.Join(cow.close(), d.forgetStore(saved))
	}
	store, err := cowstore.OpenPersistent(cow.leaf, cowstore.PersistentConfig{})
	switch {
	case errors.Is(err, cowstore.ErrNoStore) || errors.As(err, new(*cowstore.CorruptError)):
		err = nil // nobody will take it for a store
	case err == nil && store.Valid():
		err = store.Invalidate()
	}
	if err = errors.Join(err, cow.close()); err != nil {
		return fmt.Errorf("store %s: %w", path, err)
	}
	return d.forgetStore(saved)
}

// forgetStore removes the file of a store that nobody will take for one, if the daemon made it.
func (d *Daemon) forgetStore(saved *savedSnapshot) error {
	if !saved.Made {
		return nil
	}
	if err := removeFile(saved.Request.Store); err != nil {
		return fmt.Errorf("store %s: %w", saved.Request.Store, err)
	}
	return nil
}
