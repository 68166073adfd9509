package clone

import "time"

// window bounds what is in flight in the background by the time that it takes. A write to a region that is being copied
// waits for the copy, and a slow source, or a throttle, may keep as many bytes as the threshold allows for seconds. So the
// first copy is a small one, the window grows by what is copied in time, and is halved when a copy takes much longer than
// small ones do that nothing else is in flight with: then copies wait for each other. That is told from a source that is
// only far away, which takes long for each and is none the slower for many. From then on it grows slowly, as those of TCP do.
type window struct {
	bytes  int64
	alone  time.Duration // what small copies take by themselves, as of late; 0: not known
	shrunk time.Time     // copies that began before tell nothing new
}

const (
	// windowMin is the least that may be in flight, if a region is not larger, and what counts as a small copy.
	windowMin = activeBytes
	// windowMax is where it stops to matter: the threshold bounds what is in flight, too.
	windowMax = 1 << 40
	// windowLate is how much longer a copy may take for others, if half as long again is not more.
	windowLate = 50 * time.Millisecond
)

// regions is the most regions in flight, at least one.
func (w *window) regions(shift uint) Region { return max(1, Region(max(w.bytes, windowMin)>>shift)) }

// copied is told of a copy of so many bytes that went well. byItself: nothing else was in flight when it ended.
func (w *window) copied(bytes, least int64, began, now time.Time, byItself bool) {
	took := now.Sub(began)
	if bytes <= least && (byItself || w.alone == 0) {
		if w.alone == 0 {
			w.alone = took
		}
		w.alone += (took - w.alone) / 4
	}
	inTime := took <= w.alone+max(w.alone/2, windowLate)
	switch {
	case inTime && w.shrunk.IsZero():
		w.bytes = min(max(w.bytes, windowMin)+bytes, windowMax)
	case inTime: // by one small copy for each window that is full
		w.bytes = min(w.bytes+max(1, windowMin*bytes/w.bytes), windowMax)
	case began.After(w.shrunk):
		w.bytes, w.shrunk = max(w.bytes/2, windowMin), now
	}
}
