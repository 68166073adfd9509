package service

import (
	"context"
	"errors"
	"io"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"

	"cowherd/api"
)

func publishMany(b *bus, count int) {
	for range count {
		b.publish(api.Event{Type: api.EventDeviceAttached})
	}
}

func TestBusOrder(t *testing.T) {
	b := newBus()
	publishMany(b, 3)
	reader, err := b.after(1)
	if err != nil {
		t.Fatal(err)
	}
	events, err := reader.read(t.Context())
	if err != nil || len(events) != 2 || events[0].Seq != 2 || events[1].Seq != 3 {
		t.Fatalf("got %v, %v; want events 2 and 3", events, err)
	}
	if events[0].Time.IsZero() || events[0].Time.Location().String() != "UTC" {
		t.Errorf("time %v", events[0].Time)
	}
	if _, err := b.after(4); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("events after one that has not been: %v, want EINVAL", err)
	}
	if _, err := b.after(3); err != nil {
		t.Errorf("events after the newest: %v", err)
	}
}

// TestBusMissed: a reader that is too slow, or comes too late, is told how many events it has missed.
func TestBusMissed(t *testing.T) {
	for _, test := range []struct{ before, after, missed uint64 }{
		{0, eventsKept, 0}, {0, eventsKept + 1, 1}, {10, eventsKept + 5, 5}, {3, 5*eventsKept + 7, 4*eventsKept + 7},
	} {
		b := newBus()
		publishMany(b, int(test.before))
		reader, err := b.after(test.before)
		if err != nil {
			t.Fatal(err)
		}
		publishMany(b, int(test.after))
		next, missed := test.before+1, uint64(0)
		for next <= test.before+test.after {
			events, err := reader.read(t.Context())
			if err != nil || len(events) > eventBatch+1 {
				t.Fatalf("read %d events: %v", len(events), err)
			}
			for _, e := range events {
				if e.Type == api.EventMissed {
					missed += e.Missed
					next += e.Missed - 1
				}
				if e.Seq != next {
					t.Fatalf("got event %d, want %d", e.Seq, next)
				}
				next++
			}
		}
		if missed != test.missed {
			t.Errorf("%+v: missed %d", test, missed)
		}
	}
}

func TestBusWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBus()
		var done sync.WaitGroup
		for range 3 {
			done.Go(func() {
				reader := eventReader{bus: b, next: 1}
				for want := uint64(1); ; want++ {
					events, err := reader.read(context.Background())
					if errors.Is(err, io.EOF) {
						if want != 3 {
							t.Errorf("the end came before event %d", want)
						}
						return
					}
					if err != nil || len(events) != 1 || events[0].Seq != want {
						t.Errorf("got %v, %v; want event %d", events, err, want)
						return
					}
				}
			})
		}
		for range 2 {
			synctest.Wait() // all readers sleep
			b.publish(api.Event{})
		}
		synctest.Wait()
		b.close()
		done.Wait()
		b.publish(api.Event{})
		if b.newest() != 2 {
			t.Error("an event was added after the end")
		}
	})
}

func TestBusContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	reader := eventReader{bus: newBus(), next: 1}
	if _, err := reader.read(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want that the context has ended", err)
	}
}

func BenchmarkPublish(b *testing.B) {
	bus := newBus()
	b.ReportAllocs()
	for b.Loop() {
		bus.publish(api.Event{Type: api.EventSnapshotInvalid, Name: "vm@a"})
	}
}
