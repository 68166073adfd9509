package block

import "sync"

// waiter is the Completer of Do.
type waiter struct {
	r    Request
	done chan error
}

func (w *waiter) Complete(_ *Request, err error) { w.done <- err }

var waiters = sync.Pool{New: func() any { return &waiter{done: make(chan error, 1)} }}

// Do submits one operation to d and waits for it. data is nil but for OpRead and OpWrite. For tests, tools and rare
// work: a data path submits its own requests.
func Do(d Device, op Op, flags Flags, offset, length int64, data []byte) error {
	w := waiters.Get().(*waiter)
	w.r.Op, w.r.Flags, w.r.Offset, w.r.Length, w.r.Data = op, flags, offset, length, data
	w.r.Push(w)
	d.Submit(&w.r)
	err := <-w.done
	w.r.Reset()
	waiters.Put(w)
	return err
}

// Read fills p from d at offset.
func Read(d Device, p []byte, offset int64) error {
	return Do(d, OpRead, 0, offset, int64(len(p)), p)
}

// Write puts p on d at offset.
func Write(d Device, p []byte, offset int64) error {
	return Do(d, OpWrite, 0, offset, int64(len(p)), p)
}

// Flush makes durable what was completed before.
func Flush(d Device) error { return Do(d, OpFlush, 0, 0, 0, nil) }
