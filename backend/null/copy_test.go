package null

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"syscall"
	"testing"
	"time"

	"cowherd/backend/devicetest"
	"cowherd/block"
)

func newController(t testing.TB, c ControllerConfig) *Controller {
	t.Helper()
	controller, err := NewController(c)
	if err != nil {
		t.Fatal(err)
	}
	return controller
}

func TestCopyOffers(t *testing.T) {
	one := newController(t, ControllerConfig{RangeMax: 1<<20 + 700, CommandMax: 2 << 20})
	other := newController(t, ControllerConfig{Method: block.CopyServer, Concurrency: 9, Granularity: 4096})
	a := newDevice(t, Config{Size: 1 << 20, Controller: one})
	b := newDevice(t, Config{Size: 1 << 20, Controller: one, LogicalBlock: 4096})
	c := newDevice(t, Config{Size: 1 << 20, Controller: other})
	plain := newDevice(t, Config{Size: 1 << 20})
	want := block.CopyOffer{Method: block.CopyDevice, Granularity: 4096, LengthMax: 1 << 20, Concurrency: 4}
	if got := b.CopyOffers(a); len(got) != 1 || got[0] != want {
		t.Errorf("offers %+v, want %+v", got, want)
	}
	want = block.CopyOffer{Method: block.CopyServer, Granularity: 4096, LengthMax: 1 << 20, Concurrency: 9}
	if got := c.CopyOffers(c); len(got) != 1 || got[0] != want {
		t.Errorf("offers %+v, want %+v", got, want)
	}
	for _, pair := range [][2]*Device{{a, c}, {a, plain}, {plain, a}, {plain, plain}} {
		if got := pair[0].CopyOffers(pair[1]); got != nil {
			t.Errorf("offers %+v between different controllers", got)
		}
		if n, err := pair[0].Copy(block.CopyDevice, pair[1], 0, 0, 512); n != 0 || !errors.Is(err, syscall.ENOTSUP) {
			t.Errorf("copy between different controllers: %d, %v", n, err)
		}
	}
}

func TestControllerChecks(t *testing.T) {
	for _, c := range []ControllerConfig{
		{Granularity: -1}, {Granularity: 3}, {Granularity: 4096, RangeMax: 512}, {RangeMax: -1}, {CommandMax: -1},
		{Latency: -1}, {Bandwidth: -1}, {Concurrency: -1},
	} {
		if _, err := NewController(c); !errors.Is(err, syscall.EINVAL) {
			t.Errorf("%+v: got %v, want EINVAL", c, err)
		}
	}
	if _, err := NewLink(0); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("link without bandwidth: %v", err)
	}
	link, err := NewLink(1)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := New(Config{Size: 512, Link: link}); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("link without latency: %v", err)
	}
}

// TestCopyModel copies random ranges between devices with and without memory, and checks all bytes.
func TestCopyModel(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	const size = 300 << 10
	controller := newController(t, ControllerConfig{})
	var devices []*Device
	var models [][]byte
	for i := range 3 {
		devices = append(devices, newDevice(t, Config{Size: size, Controller: controller, MemoryBacked: i < 2}))
		models = append(models, make([]byte, size))
	}
	for range 300 {
		from, to := rng.IntN(3), rng.IntN(3)
		length := (rng.Int64N(size/512) + 1) * 512
		at, place := rng.Int64N(size/512-length/512+1)*512, rng.Int64N(size/512-length/512+1)*512
		if from == to {
			p := bytes.Repeat([]byte{byte(rng.Uint32())}, int(length))
			if err := block.Write(devices[to], p, place); err != nil {
				t.Fatal(err)
			}
			if to < 2 {
				copy(models[to][place:], p)
			}
			continue
		}
		if n, err := devices[to].Copy(block.CopyDevice, devices[from], at, place, length); n != length || err != nil {
			t.Fatalf("copied %d of %d: %v", n, length, err)
		}
		if to < 2 {
			copy(models[to][place:], models[from][at:at+length])
		}
	}
	have := make([]byte, size)
	for i, d := range devices {
		if err := block.Read(d, have, 0); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(have, models[i]) {
			t.Errorf("device %d holds other bytes than its model", i)
		}
	}
}

func TestCopyFaults(t *testing.T) {
	tests := []struct {
		name   string
		faults CopyFaults
		n      [3]int64 // of commands of 8192 bytes to 0, 8192 and 16384
		err    [3]error
	}{
		{"none", CopyFaults{}, [3]int64{8192, 8192, 8192}, [3]error{}},
		{"absent", CopyFaults{Absent: true}, [3]int64{}, [3]error{syscall.ENOTSUP, syscall.ENOTSUP, syscall.ENOTSUP}},
		{"absent later", CopyFaults{Absent: true, AbsentFrom: 1}, [3]int64{8192}, [3]error{nil, syscall.ENOTSUP, syscall.ENOTSUP}},
		{"short", CopyFaults{ShortMax: 1000}, [3]int64{1000, 1000, 1000}, [3]error{}},
		{"bad range", CopyFaults{FailAt: 8192 + 512, FailLength: 512}, [3]int64{8192, 512, 8192}, [3]error{nil, syscall.EIO, nil}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			controller := newController(t, ControllerConfig{Faults: test.faults})
			a := newDevice(t, Config{Size: 1 << 20, MemoryBacked: true, Controller: controller})
			b := newDevice(t, Config{Size: 1 << 20, MemoryBacked: true, Controller: controller})
			var sum int64
			for i := range 3 {
				n, err := b.Copy(block.CopyDevice, a, 0, int64(i)*8192, 8192)
				if n != test.n[i] || !errors.Is(err, test.err[i]) {
					t.Errorf("command %d: %d, %v, want %d, %v", i, n, err, test.n[i], test.err[i])
				}
				sum += n
			}
			if commands, bytes := controller.Commands(); commands != 3 || bytes != sum {
				t.Errorf("%d commands, %d bytes", commands, bytes)
			}
		})
	}
}

// TestTimes: a command takes its latency and the controller's bandwidth, and requests of all devices on a link share each
// of its directions, which do not wait for each other. Only lower bounds: the machine may be busy.
func TestTimes(t *testing.T) {
	devicetest.Leaks(t)
	controller := newController(t, ControllerConfig{Latency: time.Millisecond, Bandwidth: 100 << 20})
	link, err := NewLink(100 << 20)
	if err != nil {
		t.Fatal(err)
	}
	c := Config{Size: 4 << 20, Controller: controller, Link: link, Latency: time.Millisecond, Queues: 2}
	a, b := newDevice(t, c), newDevice(t, c)
	start := time.Now()
	if _, err := b.Copy(block.CopyDevice, a, 0, 0, 1<<20); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(start); took < 11*time.Millisecond {
		t.Errorf("a command took %v", took)
	}
	done := make(token, 8)
	data := make([]byte, 1<<20)
	start = time.Now()
	for i, d := range []*Device{a, b, a, b} {
		r := &block.Request{Op: block.OpWrite, Length: 1 << 20, Data: data, Queue: block.Queue(i)}
		r.Push(done)
		d.Submit(r)
	}
	for range 4 {
		<-done
	}
	if took := time.Since(start); took < 41*time.Millisecond {
		t.Errorf("4 MiB took %v", took)
	}
	if err := block.Read(a, data[:4096], 0); err != nil {
		t.Fatal(err)
	}
	if up, down := link.Bytes(); up != 4<<20 || down != 4096 {
		t.Errorf("%d bytes up, %d down", up, down)
	}
}

func TestReserve(t *testing.T) {
	for _, test := range []struct {
		n, rate int64
		want    time.Duration
	}{
		{0, 1, 0}, {1, 1, time.Second}, {1 << 30, 1 << 30, time.Second}, {3, 2, 1500 * time.Millisecond},
		{1 << 40, 1 << 30, 1024 * time.Second}, {1, 1 << 30, 0}, {1 << 20, 1e9, 1048576}, {4096, 0, 0},
	} {
		l := newTimeline(test.rate)
		before := l.reserve(0)
		if got := l.reserve(test.n).Sub(before); got < test.want || got > test.want+10*time.Second {
			t.Errorf("%d bytes at %d: %v, want %v", test.n, test.rate, got, test.want)
		}
	}
}
