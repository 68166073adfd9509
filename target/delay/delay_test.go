package delay_test

import (
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"cowherd/backend/mem"
	"cowherd/block"
	"cowherd/target"
	"cowherd/target/delay"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// call is a request and when it was done.
type call struct {
	r    block.Request
	done chan error
	at   time.Time
}

func (c *call) Complete(_ *block.Request, err error) {
	c.at = time.Now()
	c.done <- err
}

// send maps a request.
func send(t *delay.Target, op block.Op, offset int64, data []byte) *call {
	c := &call{done: make(chan error, 1)}
	c.r = block.Request{Op: op, Offset: offset, Length: int64(len(data)), Data: data}
	c.r.Push(c)
	if d := t.Map(&c.r); d != nil {
		d.Submit(&c.r)
	}
	return c
}

// newTarget delays reads by 10 ms, writes by 30 ms and flushes not at all.
func newTarget(t *testing.T) (*delay.Target, *mem.Device) {
	d, err := mem.New(mem.Config{Size: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	l := target.Lower{Device: d, Name: target.Name("d")}
	return delay.New(1<<16, delay.Path{Lower: l, Start: 4096, Delay: 10 * time.Millisecond},
		delay.Path{Lower: l, Start: 4096, Delay: 30 * time.Millisecond}, delay.Path{Lower: l}), d
}

func TestDelays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x, lower := newTarget(t)
		start := time.Now()
		write := send(x, block.OpWrite, 512, append([]byte("hello"), make([]byte, 507)...))
		zero := send(x, block.OpWriteZeroes, 0, nil)
		read := send(x, block.OpRead, 512, make([]byte, 512))
		flush := send(x, block.OpFlush, 0, nil)
		if got := x.StatusLine(); got != "1 2 0" {
			t.Errorf("status %q", got)
		}
		for _, c := range []struct {
			call *call
			want time.Duration
		}{{flush, 0}, {read, 10 * time.Millisecond}, {write, 30 * time.Millisecond}, {zero, 30 * time.Millisecond}} {
			if err := <-c.call.done; err != nil {
				t.Error(err)
			}
			if got := c.call.at.Sub(start); got != c.want {
				t.Errorf("%v took %v, want %v", c.call.r.Op, got, c.want)
			}
		}
		got := make([]byte, 512)
		c := &call{done: make(chan error, 1)} // block.Read keeps channels from one bubble to the next
		c.r = block.Request{Op: block.OpRead, Offset: 4096 + 512, Length: 512, Data: got}
		c.r.Push(c)
		lower.Submit(&c.r)
		if err := <-c.done; err != nil || string(got[:5]) != "hello" {
			t.Errorf("%q, %v", got[:5], err)
		}
		if got := x.StatusLine(); got != "0 0 0" {
			t.Errorf("status %q", got)
		}
		if got := x.TableLine(); got != "d 8 10 d 8 30 d 0 0" {
			t.Errorf("table %q", got)
		}
	})
}

// TestOrder: many requests with pauses between them go on in order, each at its time, and the queue takes no memory for
// them in the end.
func TestOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x, _ := newTarget(t)
		var calls []*call
		var sent []time.Time
		for range 500 {
			calls, sent = append(calls, send(x, block.OpRead, 0, make([]byte, 512))), append(sent, time.Now())
			time.Sleep(300 * time.Microsecond)
		}
		for i, c := range calls {
			if err := <-c.done; err != nil {
				t.Fatal(err)
			}
			if late := c.at.Sub(sent[i]); late != 10*time.Millisecond {
				t.Fatalf("request %d took %v", i, late)
			}
		}
	})
}

// TestSuspend: what waits goes on at once, and nothing waits until the device is resumed.
func TestSuspend(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x, _ := newTarget(t)
		start := time.Now()
		waiting := send(x, block.OpWrite, 0, make([]byte, 512))
		x.Presuspend()
		late := send(x, block.OpWrite, 0, make([]byte, 512))
		x.Postsuspend()
		for _, c := range []*call{waiting, late} {
			if err := <-c.done; err != nil || c.at != start {
				t.Errorf("%v after %v", err, c.at.Sub(start))
			}
		}
		if err := x.Preresume(); err != nil {
			t.Fatal(err)
		}
		x.Resume()
		again := send(x, block.OpWrite, 0, make([]byte, 512))
		if err := <-again.done; err != nil || again.at.Sub(start) != 30*time.Millisecond {
			t.Errorf("%v after %v", err, again.at.Sub(start))
		}
	})
}
