package kcopyd

import "cowherd/block"

// plan finds a method for the next part of the job of s. It is true when s is the caller's still: in phaseStart with a
// piece to read and write, or in phaseEnd. Otherwise a lane has it. No lock is held while layers and devices are asked,
// so that somebody else may have taken the part meanwhile; then the next one is tried.
func (s *subJob) plan() bool {
	for {
		at, left := s.untaken()
		if left == 0 {
			s.length, s.rest, s.bad, s.phase = 0, 0, 0, phaseEnd
			return true
		}
		n, why := s.resolve(at, left)
		if s.claim(at, n) {
			return s.dispatch(why)
		}
		s.release()
	}
}

// untaken is what of the job s may take next; no length: nothing.
func (s *subJob) untaken() (at, left int64) {
	if s.isWhole() {
		return s.offset + s.length, s.rest
	}
	j := s.job
	st := &j.state
	st.mu.Lock()
	defer st.mu.Unlock()
	if s.rest > 0 {
		if j.stoppedLocked() {
			j.WriteBad |= j.everyDestination()
			return 0, 0
		}
		return s.offset + s.length, s.rest
	}
	if !j.moreLocked() {
		return 0, 0
	}
	return st.taken, j.Length - st.taken
}

// claim takes [at, at+n) of the job for s; false when somebody else was faster.
func (s *subJob) claim(at, n int64) bool {
	if s.rest > 0 {
		s.rest -= n
	} else {
		j := s.job
		st := &j.state
		st.mu.Lock()
		defer st.mu.Unlock()
		if st.taken != at || j.stoppedLocked() {
			return false
		}
		st.taken += n
	}
	s.unread, s.cut, s.bad = false, false, 0
	s.offset, s.length = at, n
	return true
}

// resolve finds out how the part of the job from at on, of left bytes at most, is best copied. It returns how many of
// them s is to take; by what, if by offload at all, is in s.passage, whose layers are held then. Without a passage the
// reason tells why; reasonNone: to read and write is faster.
func (s *subJob) resolve(at, left int64) (n int64, why reason) {
	j := s.job
	if at < s.avoid {
		return s.around(at, left)
	}
	c := j.state.core
	x := c.passages.Get().(*passage)
	why = x.open(j, at, left)
	if why == reasonNone {
		r, head, body, reason := c.pairs.get(x.source.device, x.target.device).choose(j, c.allowed(j), x)
		switch {
		case r == nil:
			why = reason
			if head > 0 {
				left = head // what is behind it may be better aligned
			}
		case head > 0: // read and written, up to where the method can begin
			left = head
			if j.insists() {
				why = reasonAlignment
			}
		default:
			x.route = r
			s.passage = x
			return s.portion(r, body), reasonNone
		}
	}
	x.close(j.Queue)
	c.passages.Put(x)
	if s.gentle {
		left = min(left, gentlePiece)
	}
	return min(left, SubJobSize), why
}

// around is resolve for a part that a method made no progress with, which was counted: it is read and written.
func (s *subJob) around(at, left int64) (n int64, why reason) {
	left = min(left, s.avoid-at, SubJobSize)
	if s.job.insists() {
		return left, reasonStuck
	}
	if s.gentle {
		left = min(left, gentlePiece)
	}
	return left, reasonNone
}

// portion is how many of body bytes s is to offload at a time.
func (s *subJob) portion(r *route, body int64) int64 {
	if s.admitted && r.offer.Method != block.CopyClone {
		return min(body, max(SubJobSize, r.offer.Granularity)) // the throttle has been paid for no more
	}
	return min(body, offloadMax)
}

// dispatch sends s, which has a piece, on its way. See plan.
func (s *subJob) dispatch(why reason) bool {
	j := s.job
	switch {
	case s.passage != nil:
		j.state.note(offloaded, s.length)
		s.phase, s.method = phaseOffload, methodOf(s.passage.route.offer.Method)
		s.began, s.weight = j.state.core.now(), 1
		if c := j.state.core; c.inline {
			s.offload()
			return true
		}
		s.passage.lane().push(s)
		return false
	case j.insists():
		s.refuse(why)
		return true
	}
	if why != reasonNone {
		j.state.shard.fellBack(why)
	}
	j.state.note(readWritten, s.length)
	s.phase, s.method = phaseStart, methodReadWrite
	return true
}

// refuse ends the job of s with an error, because it insists on offload.
func (s *subJob) refuse(why reason) {
	s.unread = true
	s.phase = phaseEnd
	s.job.failOffload(s, s.job.refusal(why, s.offset, s.length))
}

// release lets go of the layers that s holds, if it does.
func (s *subJob) release() {
	x := s.passage
	if x == nil {
		return
	}
	s.passage = nil
	x.close(s.job.Queue)
	s.job.state.core.passages.Put(x)
}

// offload copies the piece of s by the method of its passage, and leaves s in phaseEnd: with the part that was copied as
// its piece, and the rest to be planned anew where the method turned out to be absent.
func (s *subJob) offload() {
	x, j := s.passage, s.job
	r := x.route
	s.prepare()
	done, why, err := x.copy(s.length)
	s.release()
	switch {
	case err != nil:
		j.failOffload(s, err)
	case why == reasonStuck:
		r.stall()
		s.avoid = s.offset + done + SubJobSize
		j.state.shard.fellBack(why)
	case why != reasonNone:
		r.vanish(why)
		j.state.shard.fellBack(why)
	}
	s.rest += s.length - done
	s.length = done
	s.phase = phaseEnd
}

// A holding is the way from a device down to the leaf that a range lies on. Each layer on it counts the holder as a
// request in flight.
type holding struct {
	device block.Device // the leaf
	at     int64        // bytes from its start
	layers [layersMax]block.Remapper
	count  int
}

// layersMax bounds how deep a stack an offload can see through.
const layersMax = 8

// descend finds the leaf that has the bytes of d from offset on, and how many of them, length at most, lie there side by
// side. It is false when a layer cannot tell. Whether or not, ascend must be called.
func (h *holding) descend(d block.Device, q block.Queue, offset, length int64) (int64, bool) {
	for {
		layer, ok := d.(block.Remapper)
		if !ok {
			h.device, h.at = d, offset
			return length, true
		}
		if h.count == layersMax {
			return 0, false
		}
		to, at, n, ok := layer.Remap(q, offset, length)
		if !ok {
			return 0, false
		}
		h.layers[h.count] = layer
		h.count++
		d, offset, length = to, at, min(n, length)
	}
}

// ascend lets go of all layers, the lowest first.
func (h *holding) ascend(q block.Queue) {
	for h.count > 0 {
		h.count--
		h.layers[h.count].Release(q)
		h.layers[h.count] = nil
	}
	h.device = nil
}

// A passage is the way of one part of a job: the leaves of both sides, and the route between them. It is pooled.
type passage struct {
	source, target holding
	length         int64 // bytes that lie side by side on both leaves
	route          *route
}

// open finds the leaves below the part of j from at on, of left bytes at most. Whether or not, close must be called.
func (x *passage) open(j *Job, at, left int64) reason {
	n, ok := x.source.descend(j.From.Device, j.Queue, j.From.Offset+at, left)
	if !ok || n <= 0 {
		return reasonLayer
	}
	n, ok = x.target.descend(j.To[0].Device, j.Queue, j.To[0].Offset+at, n)
	if !ok || n <= 0 {
		return reasonLayer
	}
	x.length = n
	return reasonNone
}

// close lets go of what open holds. It comes before any plain request for the same range is submitted: a layer that is
// being suspended waits for those who hold it, and makes requests wait.
func (x *passage) close(q block.Queue) {
	x.target.ascend(q)
	x.source.ascend(q)
	x.route = nil
}

// lane is where the passage's calls are made.
func (x *passage) lane() *lane { return x.route.lane }

// copy makes the calls for length bytes. It returns how many bytes from the start were copied, and what ended it early:
// an error of I/O, or that the method is absent.
func (x *passage) copy(length int64) (done int64, why reason, err error) {
	r := x.route
	for done < length {
		n, err := r.copier.Copy(r.offer.Method, x.source.device, x.source.at+done, x.target.at+done, length-done)
		n = max(min(n, length-done), 0)
		if done+n < length {
			n -= n % r.offer.Granularity // the next call must be aligned; a little is copied twice
		}
		done += n
		if n > 0 {
			r.found()
		}
		switch {
		case err != nil && block.Errno(err) == absentErrno:
			return done, reasonAbsent, nil
		case err != nil:
			return done, reasonNone, err
		case n == 0:
			return done, reasonStuck, nil
		}
	}
	return done, reasonNone, nil
}
