// Package percpu keeps state in shards, one for each CPU or so, so that CPUs do not share cache lines. A shard is
// picked by a queue's number: any shard is correct for any caller, and locality is only a hint.
package percpu

import (
	"math/bits"
	"runtime"
)

// countMax bounds the shards, so that who sums over all of them stays cheap.
const countMax = 64

// pad keeps neighbours on different cache lines; two lines, because CPUs fetch lines in pairs.
const pad = 128

// Pad stands at the end of a struct that is allocated one by one and written by one CPU at a time, so that what the
// allocator puts beside it is not on the same cache line.
type Pad [pad]byte

// Shards holds one T for each shard. The zero value has none: use New.
type Shards[T any] struct {
	slots []slot[T]
	mask  uint
}

type slot[T any] struct {
	value T
	_     [pad]byte
}

// Count is the number of shards that New makes: a power of two, at least GOMAXPROCS, at most 64.
func Count() int {
	n := runtime.GOMAXPROCS(0)
	return min(1<<bits.Len(uint(n-1)), countMax)
}

// New makes zeroed shards.
func New[T any]() Shards[T] {
	n := Count()
	// One slot more, in front: whatever lies before the array must not share a cache line with the first shard.
	return Shards[T]{slots: make([]slot[T], n+1)[1:], mask: uint(n - 1)}
}

// At is the shard for queue.
func (s *Shards[T]) At(queue uint) *T { return &s.slots[queue&s.mask].value }

// Len is the number of shards.
func (s *Shards[T]) Len() int { return len(s.slots) }

// Index is the shard numbered i, 0 <= i < Len.
func (s *Shards[T]) Index(i int) *T { return &s.slots[i].value }
