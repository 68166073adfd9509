package block

// A Stage is a point in the life of a request that a Tracer is told of.
type Stage uint8

const (
	// StageQueued: the request has come to the device that is traced.
	StageQueued Stage = iota
	// StageHeld: the device is suspended; the request waits until it is resumed. StageQueued comes before it.
	StageHeld
	// StageAdmitted: the device takes a request that it had held.
	StageAdmitted
	// StageWaiting: the request waits for a copy, or for who reads what it overwrites.
	StageWaiting
	// StageIssued: the request is submitted to the device below. It may come more than once: a request that has waited
	// is mapped anew. The last one counts.
	StageIssued
	// StageCompleted: the device below is done with it.
	StageCompleted
)

// A Tracer is told of the stages of requests that carry its Span. Stage is called by whoever owns the request, possibly
// on many goroutines at a time; it must not wait, and must not keep r.
type Tracer interface {
	Stage(r *Request, s Stage)
}

// A Span ties a request to who traces it. The zero value: nobody does.
type Span struct {
	Tracer Tracer
	ID     uint64 // of the Tracer's making
}

// Trace makes the request carry a span from now on, until it is completed by who gave it the span, which then passes the
// zero value.
func (r *Request) Trace(s Span) { r.span = s }

// Span is what the request carries.
func (r *Request) Span() Span { return r.span }

// Mark tells of a stage, if the request is traced. If it is not, a Mark is one branch that is never taken.
func (r *Request) Mark(s Stage) {
	if r.span.Tracer != nil {
		r.span.Tracer.Stage(r, s)
	}
}
