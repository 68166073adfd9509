package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"cowherd/backend/file"
	"cowherd/block"
	"cowherd/internal/size"
	"cowherd/transfer"
)

// journalSuffix is behind the name of a destination in the name of its journal.
const journalSuffix = ".cowherd-copy"

// cloneMax is the longest clone of one call, in bytes: nobody else uses the destination, or writes to the source. An
// interruption waits for the end of the call, which may have to write as much that is dirty back.
const cloneMax = 1 << 30

// pair is both ends of a copy, open.
type pair struct {
	source, destination *copyEnd
	journalPath         string            // where a journal is looked for; "": nowhere
	journal             *transfer.Journal // nil: there is none
	start               int64             // all before has been copied earlier, in bytes
	zeroed              bool              // the destination reads as zeroes
	created             bool              // the destination was made
}

// openPair opens both ends. What would destroy something is refused. armed is closed when interruptions end ctx: before,
// nothing is made.
func (c *copyCmd) openPair(ctx context.Context, s *session, armed <-chan struct{}) (p *pair, err error) {
	p = &pair{}
	if p.source, err = c.findEnd(ctx, s, c.Source, false); err != nil {
		return nil, err
	}
	if p.destination, err = c.findEnd(ctx, s, c.Destination, true); err != nil {
		return nil, err
	}
	switch is, err := same(p.source, p.destination); {
	case err != nil:
		return nil, err
	case is:
		return nil, fmt.Errorf("%s and %s are the same: %w", c.Source, c.Destination, syscall.EINVAL)
	}
	p.journalPath = c.Journal
	if p.journalPath == "" && p.destination.identity.Kind == kindFile {
		p.journalPath = p.destination.path + journalSuffix
	}
	if c.Resume && p.journalPath == "" {
		return nil, usagef("--resume needs --journal where the destination is no file")
	}
	if err := c.openSource(ctx, p.source); err != nil {
		return nil, err
	}
	<-armed
	if err := c.openDestination(ctx, p); err != nil {
		return nil, errors.Join(err, p.close())
	}
	return p, nil
}

// openDestination opens, or makes, where the copy goes.
func (c *copyCmd) openDestination(ctx context.Context, p *pair) (err error) {
	e := p.destination
	switch e.identity.Kind {
	case kindFile:
		return c.openImage(p)
	case kindNBD:
		err = c.openExport(ctx, e)
	default:
		var d *file.Device
		if d, err = file.Open(e.path, file.Options{Direct: c.Direct}); err == nil {
			e.device, e.close = d, d.Close
			e.identity, err = identify(kindDevice, e.path, d.Size())
		} else if errors.Is(err, syscall.EBUSY) {
			err = fmt.Errorf("%s is mounted, or another program holds it: %w", e.name, err)
		}
	}
	if err == nil {
		err = p.fits()
	}
	if err == nil && e.identity.Kind == kindDevice && !c.Force && !(c.Resume && exists(p.journalPath)) {
		err = checkBlank(e)
	}
	if err == nil && c.Resume {
		err = p.openJournal(false)
	}
	return err
}

// fits refuses a destination that cannot take the copy, before anything is written to it.
func (p *pair) fits() error {
	to, need := p.destination.device, p.source.device.Size()
	switch {
	case to.Limits().ReadOnly:
		return fmt.Errorf("%s is read-only: %w", p.destination.name, syscall.EROFS)
	case to.Size() < need:
		return fmt.Errorf("%s is too small: it has %d bytes, and %s %d: %w", p.destination.name, to.Size(), p.source.name, need,
			syscall.ENOSPC)
	}
	return nil
}

// exists tells whether there is something of that name.
func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// blankSize is how many bytes are looked at on each end of a block device.
const blankSize = 1 << 20

// checkBlank refuses a block device on which something seems to be. File systems, swap, volume managers, encryption,
// partition tables and the metadata of snapshots and clones all have what they are known by in the first or the last
// mebibyte; that this is zero also holds for what is not known here.
func checkBlank(e *copyEnd) error {
	size := e.device.Size()
	p := make([]byte, min(blankSize, size))
	for _, at := range []int64{0, size - int64(len(p))} {
		if err := block.Read(e.device, p, at); err != nil {
			return fmt.Errorf("look for data on %s: %w; --force does not look", e.name, err)
		}
		if i := bytes.IndexFunc(p, func(r rune) bool { return r != 0 }); i >= 0 {
			return fmt.Errorf("%s holds data, at byte %d: --force overwrites it: %w", e.name, at+int64(i), syscall.EEXIST)
		}
	}
	return nil
}

// openImage opens or makes the file that the copy goes to. It is locked before anything is done to it.
func (c *copyCmd) openImage(p *pair) (err error) {
	e := p.destination
	flags := os.O_RDWR | os.O_CREATE | os.O_EXCL
	if c.Direct {
		flags |= unix.O_DIRECT
	}
	f, err := os.OpenFile(e.path, flags, p.source.mode())
	p.created = err == nil
	mine := !errors.Is(err, os.ErrExist)
	if !mine {
		f, err = os.OpenFile(e.path, flags&^(os.O_CREATE|os.O_EXCL), 0)
	}
	if errors.Is(err, syscall.EINVAL) && c.Direct {
		if mine {
			_ = os.Remove(e.path) // O_CREATE leaves it there
		}
		return fmt.Errorf("the file system has no direct I/O: %w", err)
	}
	if err != nil {
		return err
	}
	if err := c.prepareImage(p, f); err != nil {
		return errors.Join(err, f.Close(), p.uncreate())
	}
	d, err := file.New(f, file.Options{CloneMax: cloneMax}) // takes f over, with its lock
	if err != nil {
		return errors.Join(err, p.uncreate())
	}
	e.device, e.close = d, d.Close
	return nil
}

// prepareImage decides what becomes of a file: it is gone on with, used as it is, or overwritten from its start.
func (c *copyCmd) prepareImage(p *pair, f *os.File) error {
	e, want := p.destination, p.source.device.Size()
	l := unix.Flock_t{Type: unix.F_WRLCK}
	err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &l)
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
		return fmt.Errorf("open %s: another program has it open: %w", e.name, syscall.EBUSY)
	}
	if e.identity, err = identify(kindFile, e.path, want); err != nil {
		return err
	}
	e.identity.Modified = 0 // it is written to
	_, err = unix.Seek(int(f.Fd()), 0, unix.SEEK_DATA)
	holdsData := !errors.Is(err, unix.ENXIO)
	unfinished := exists(p.journalPath)
	switch {
	case unfinished && c.Resume && !p.created:
		return p.goOn(f, want)
	case unfinished && c.Resume && c.Journal != "": // nothing but the journal of this very copy is replaced
		if err := p.openJournal(false); err != nil {
			return err
		}
		if err := p.journal.Close(); err != nil {
			return err
		}
		p.journal, p.start = nil, 0
	case unfinished && !c.Resume && !c.Force:
		return fmt.Errorf("%s tells of a copy to %s that was not finished: --resume goes on with it, --force starts anew: %w",
			p.journalPath, e.name, syscall.EEXIST)
	case holdsData && !c.Force:
		return fmt.Errorf("%s holds data: --force overwrites it: %w", e.name, syscall.EEXIST)
	}
	if holdsData || c.Resume || unfinished {
		if err := p.openJournal(true); err != nil { // from here on the file is known to be incomplete
			return err
		}
	}
	p.zeroed = true
	return p.empty(f, holdsData, want)
}

// goOn goes on with the copy to a file. Before anything is durable it may have a size of its own: the machine went down
// before it was emptied, or before that was durable.
func (p *pair) goOn(f *os.File, want int64) error {
	if err := p.openJournal(false); err != nil {
		return err
	}
	stat, err := f.Stat()
	switch {
	case err != nil:
		return err
	case p.start == 0:
		p.zeroed = true
		return p.empty(f, true, want)
	case stat.Size() != want:
		return fmt.Errorf("%s cannot be gone on with: it had %d bytes, and has %d now: %w", p.destination.name, want,
			stat.Size(), syscall.ESTALE)
	}
	return nil
}

// empty makes the file one hole of a size. A file that holds no data is not cut, for what room it has.
func (p *pair) empty(f *os.File, holdsData bool, want int64) error {
	if holdsData {
		if err := f.Truncate(0); err != nil {
			return fmt.Errorf("empty %s: %w", f.Name(), err)
		}
	}
	if err := f.Truncate(want); err != nil {
		return fmt.Errorf("give %s a size of %s: %w", f.Name(), size.Human(want), err)
	}
	return nil
}

// openJournal goes on with the journal that is there, or begins one. anew: one that is there is replaced.
func (p *pair) openJournal(anew bool) (err error) {
	from, to := p.source.identity, p.destination.identity
	if !anew {
		p.journal, err = transfer.OpenJournal(p.journalPath, from, to)
		if err == nil {
			p.start = p.journal.Done()
		}
		if err == nil || !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	if p.created {
		if err := syncDir(filepath.Dir(p.destination.path)); err != nil {
			return err
		}
	}
	p.journal, err = transfer.CreateJournal(p.journalPath, from, to, anew)
	return err
}

// uncreate removes a destination that was made, and its journal.
func (p *pair) uncreate() error {
	if !p.created {
		return nil
	}
	p.created = false
	err := os.Remove(p.destination.path)
	if p.journal != nil {
		err = errors.Join(err, p.journal.Remove())
		p.journal = nil
	}
	return err
}

// close closes what is open. A journal stays.
func (p *pair) close() error {
	var err error
	if p.journal != nil {
		err = p.journal.Close()
		p.journal = nil
	}
	for _, e := range []*copyEnd{p.destination, p.source} {
		if e.close != nil {
			err = errors.Join(err, e.close())
			e.close = nil
		}
	}
	return err
}

// keep ends a copy that is complete. durable: that it is there is to be, too.
func (p *pair) keep(durable bool) error {
	journal := p.journal
	p.journal = nil
	if err := p.close(); err != nil {
		return err
	}
	if p.created && durable {
		if err := syncDir(filepath.Dir(p.destination.path)); err != nil {
			return err
		}
	}
	if journal != nil {
		return journal.Remove()
	}
	return nil
}

// abandon ends a copy that is not complete, and says what is left of it.
func (p *pair) abandon(resume bool) (left string, err error) {
	name := p.destination.name
	switch {
	case resume:
		done := p.journal.Done()
		return fmt.Sprintf("%s of it can be gone on with, by the same command", size.Human(done)), p.close()
	case p.created:
		return name + " was removed", errors.Join(p.uncreate(), p.close())
	case p.journal != nil:
		return fmt.Sprintf("%s is incomplete, as %s tells", name, p.journalPath), p.close()
	}
	return name + " is incomplete", p.close()
}
