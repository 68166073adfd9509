package cowstore

import (
	"math"
	"slices"
	"sync"
	"sync/atomic"
)

// warning tells when an exception store fills: at each of some percentages of its room, once. While none is reached a
// check is one load of a word that is only read.
//
// Lock order: mu is a leaf, and not held while warned runs.
type warning struct {
	at     atomic.Uint64 // what must be in use for the next warning; 0 and MaxUint64: there is none
	warned func(percent int)

	mu sync.Mutex
	// +checklocks:mu
	percents []int // that were not reached, ascending
	// +checklocks:mu
	total uint64
}

// set says when to warn, and whom, before the first check.
func (w *warning) set(percents []int, warned func(percent int)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.percents, w.warned = slices.Sorted(slices.Values(percents)), warned
}

// measure takes over a new total.
func (w *warning) measure(total uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.total = total
	w.aimLocked()
}

// aimLocked sets what the next warning takes.
// +checklocks:w.mu
func (w *warning) aimLocked() {
	at := uint64(math.MaxUint64)
	if len(w.percents) > 0 {
		at = max(1, w.threshold(w.percents[0]))
	}
	w.at.Store(at)
}

// threshold is what percent of the total is, rounded up.
// +checklocks:w.mu
func (w *warning) threshold(percent int) uint64 {
	return w.total/100*uint64(percent) + (w.total%100*uint64(percent)+99)/100
}

// check warns if what is in use has reached the next percentage.
func (w *warning) check(used uint64) {
	at := w.at.Load()
	if at == 0 || used < at {
		return
	}
	w.mu.Lock()
	reached := 0
	for len(w.percents) > 0 && used >= w.threshold(w.percents[0]) {
		reached = w.percents[0]
		w.percents = w.percents[1:]
	}
	w.aimLocked()
	w.mu.Unlock()
	if reached > 0 {
		w.warned(reached)
	}
}
