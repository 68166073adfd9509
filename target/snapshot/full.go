package snapshot

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"cowherd/block"
)

// OnFull is what happens when an exception finds no room on the COW device.
type OnFull uint8

const (
	// FullInvalidate: the snapshot becomes invalid, as the kernel's does.
	FullInvalidate OnFull = iota
	// FullGrow: the COW device is made larger, up to Config.COWMax; then as FullInvalidate.
	FullGrow
	// FullThrottle: who needs the exception waits, until there is room (Resize) or the snapshot is about to be removed
	// (Unstall), for Config.StallMax at the most since the first began to wait; then as FullInvalidate.
	FullThrottle
	// FullOverflow: a write to the snapshot fails, and every later one, while reads go on; the kernel's option O. A write
	// to the origin makes the snapshot invalid all the same.
	FullOverflow
)

// growMin is the least in bytes that a COW device grows by.
const growMin = 64 << 20

// fullness is what a snapshot knows and does about the room on its COW device.
//
// Lock order: growing, then mu. growing is held across the system call that makes the COW device larger: who comes
// meanwhile wants that room and has to wait for it.
type fullness struct {
	policy     OnFull
	max        int64
	step       int64 // bytes: growMin, but for tests
	stallMax   time.Duration
	overflowed atomic.Bool
	tell       func(cause error) // of an overflow; may be nil
	tellStall  func()            // may be nil
	rounds     atomic.Uint64     // how often the room has grown

	growing sync.Mutex

	mu sync.Mutex
	// Requests that wait for room, in FullThrottle.
	waiting block.List // +checklocks:mu
	// Ends the waiting; nil: nobody waits.
	timer *time.Timer // +checklocks:mu
	// Nobody is to wait any more: that costs the snapshot,
	over bool // +checklocks:mu
	// or the request.
	refuse bool // +checklocks:mu
	// The newest round in which there was no room.
	fullRound uint64 // +checklocks:mu
}

// resizer is a store that can take over more room on its device.
type resizer interface{ Resize(size int64) error }

// warner is a store that tells how full it is.
type warner interface {
	Warn(percents []int, warned func(percent int))
}

func (f *fullness) init(s *Snapshot, c *Config) {
	f.policy, f.max, f.step, f.stallMax, f.tell = c.OnFull, c.COWMax, growMin, c.StallMax, c.Overflowed
	f.tellStall = c.Stalled
	if w, ok := s.store.(warner); ok && c.Warned != nil && len(c.WarnAt) > 0 {
		w.Warn(c.WarnAt, c.Warned)
	}
}

// claimant is who needs an exception.
type claimant uint8

const (
	forOrigin   claimant = iota // a write to the origin, or to another device that must not change the view
	forSnapshot                 // a write to the snapshot
)

// room is the result of looking for room.
type room uint8

const (
	roomFound   room = iota // or there may be some now
	roomLater               // wait for it
	roomRefused             // nor may it be waited for
	roomNever               // the snapshot is invalid, or has overflowed
)

// noRoom decides what becomes of an allocation that has failed. round is what rounds was before it.
func (s *Snapshot) noRoom(err error, who claimant, round uint64) room {
	f := &s.full
	if errors.Is(err, syscall.ENOSPC) {
		switch {
		case f.rounds.Load() != round:
			return roomFound
		case f.policy == FullGrow && s.growCOW(round):
			return roomFound
		case f.policy == FullThrottle:
			if got := f.mayStall(round); got != roomNever {
				return got
			}
		case f.policy == FullOverflow && who == forSnapshot:
			if !f.overflowed.Swap(true) && f.tell != nil {
				f.tell(err)
			}
			return roomNever
		}
	}
	s.invalidate(err)
	return roomNever
}

// overflowError is what a write to a snapshot that has overflowed fails with.
func (s *Snapshot) overflowError(r *block.Request) error {
	return &block.Error{
		Op: r.Op, Offset: r.Offset, Length: r.Length, Errno: syscall.ENOSPC,
		Err: fmt.Errorf("snapshot %q has overflowed: its COW device had no room for a write", s.name),
	}
}

// growCOW makes the COW device larger by a quarter, unless somebody has done it since round. false: it cannot be.
func (s *Snapshot) growCOW(round uint64) bool {
	f := &s.full
	f.growing.Lock()
	defer f.growing.Unlock()
	if f.rounds.Load() != round {
		return true
	}
	_, total, _ := s.store.Usage()
	now := total.Bytes()
	want := now + max(now/4, f.step, int64(s.chunkSize))
	if f.max > 0 {
		want = min(want, f.max)
	}
	return want > now && s.resizeLocked(want) == nil
}

// Resize gives the snapshot size bytes on the COW device, which grows if need be. Requests that wait for room go on, and
// an overflow is over. EINVAL: it has as much or more. ENOTSUP: the device or the store cannot grow.
func (s *Snapshot) Resize(size int64) error {
	f := &s.full
	f.growing.Lock()
	err := s.resizeLocked(size)
	f.growing.Unlock()
	if err != nil {
		return fmt.Errorf("snapshot %q: resize to %d bytes: %w", s.name, size, err)
	}
	f.overflowed.Store(false)
	s.wakeStalled()
	return nil
}

// resizeLocked does it.
// +checklocks:s.full.growing
func (s *Snapshot) resizeLocked(size int64) error {
	store, ok := s.store.(resizer)
	if !ok {
		return fmt.Errorf("the store cannot grow: %w", syscall.ENOTSUP)
	}
	if _, total, _ := s.store.Usage(); size <= total.Bytes() {
		return fmt.Errorf("it has %d bytes, and cannot shrink: %w", total.Bytes(), syscall.EINVAL)
	}
	if size > s.cow.Size() {
		device, ok := s.cow.(block.Grower)
		if !ok {
			return fmt.Errorf("the COW device has %d bytes and cannot grow: %w", s.cow.Size(), syscall.ENOTSUP)
		}
		if err := device.Grow(size); err != nil {
			return err
		}
	}
	if err := store.Resize(size); err != nil {
		return err
	}
	s.full.rounds.Add(1)
	return nil
}

// mayStall tells whether requests may wait for room, of which there was none in round.
func (f *fullness) mayStall(round uint64) room {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.fullRound = max(f.fullRound, round)
	switch {
	case f.refuse:
		return roomRefused
	case f.over || f.stallMax <= 0:
		return roomNever
	}
	return roomLater
}

// stall keeps r until there is room, for waker. The first that waits sets the time.
func (s *Snapshot) stall(r *block.Request, waker block.Waker) {
	f := &s.full
	r.SetWaker(waker)
	f.mu.Lock()
	f.waiting.PushBack(r)
	ended := f.over || f.refuse
	first := f.timer == nil && !ended
	if first {
		f.timer = time.AfterFunc(f.stallMax, s.stallExpired)
	}
	// Room, or the end of the snapshot, that came since the allocation failed saw nobody waiting.
	again := ended || f.rounds.Load() != f.fullRound
	f.mu.Unlock()
	if first && f.tellStall != nil {
		f.tellStall()
	}
	if again || s.invalidCause() != nil {
		s.wakeStalled()
	}
}

// stallExpired ends a wait that took too long.
func (s *Snapshot) stallExpired() {
	f := &s.full
	f.mu.Lock()
	late := f.timer == nil // they were woken at the same moment
	f.mu.Unlock()
	if !late {
		s.invalidate(fmt.Errorf("no room came within %v: %w", f.stallMax, syscall.ENOSPC))
	}
}

// wakeStalled maps anew all that wait for room.
func (s *Snapshot) wakeStalled() {
	f := &s.full
	f.mu.Lock()
	waiting := f.waiting.Take()
	if f.timer != nil {
		f.timer.Stop()
		f.timer = nil
	}
	f.mu.Unlock()
	s.origin.retry.add(waiting)
}

// Unstall lets the requests go on that wait for room, at the price of the snapshot, and keeps nobody waiting from now
// on: to be called before a snapshot is removed, which waits for them.
func (s *Snapshot) Unstall() {
	s.full.close()
	s.wakeStalled()
}

// Refuse lets the requests fail, with ESHUTDOWN, that wait for room, and all that would: to be called before the
// snapshot is taken down, to be opened again later. It stays as it is.
func (s *Snapshot) Refuse() {
	s.full.mu.Lock()
	s.full.refuse = true
	s.full.mu.Unlock()
	s.wakeStalled()
}

// refusal is what a request fails with that may not wait for room.
func (s *Snapshot) refusal(r *block.Request) error {
	return &block.Error{
		Op: r.Op, Offset: r.Offset, Length: r.Length, Errno: syscall.ESHUTDOWN,
		Err: fmt.Errorf("snapshot %q has no room for what this write would overwrite, and is being taken down", s.name),
	}
}

// close ends all waiting for room; wakeStalled is to follow if anybody waits.
func (f *fullness) close() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.over = true
	if f.timer != nil {
		f.timer.Stop()
		f.timer = nil
	}
}

// stalled is the number of requests that wait for room.
func (f *fullness) stalled() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.waiting.Len()
}
