package clone

import (
	"testing"
	"time"
)

// link is a source behind a network: what it is asked for comes one after the other at a rate, and later by a latency.
type link struct {
	rate    float64 // bytes a second
	latency time.Duration
	free    time.Time
}

// copyOver copies over l for some time, with what w, a threshold of 16 MiB and a batch of 1 MiB let be in flight. It returns
// how many bytes a second came in the second half of the time, and the longest that a copy took then.
func copyOver(w *window, l *link, began time.Time, long time.Duration) (rate float64, longest time.Duration) {
	const shift, threshold, batch = 16, 16 << 20, 1 << 20
	type flight struct {
		began, done time.Time
		bytes       int64
	}
	var flights []flight
	now, sum, inflight := began, int64(0), int64(0)
	for now.Sub(began) < long {
		limit := min(threshold, int64(w.regions(shift))<<shift)
		for inflight < limit {
			n := min(batch, limit-inflight)
			if l.free.Before(now) {
				l.free = now
			}
			l.free = l.free.Add(time.Duration(float64(n) / l.rate * float64(time.Second)))
			flights = append(flights, flight{now, l.free.Add(l.latency), n})
			inflight += n
		}
		f := flights[0]
		flights, inflight, now = flights[1:], inflight-f.bytes, f.done
		w.copied(f.bytes, windowMin, f.began, now, len(flights) == 0)
		if now.Sub(began) > long/2 {
			sum += f.bytes
			longest = max(longest, now.Sub(f.began))
		}
	}
	return float64(sum) / (long / 2).Seconds(), longest
}

// TestWindow: a source is used to its rate, and no copy takes much longer than it must.
func TestWindow(t *testing.T) {
	const mega = 1 << 20
	for _, test := range []struct {
		name    string
		rate    float64
		latency time.Duration
		longest time.Duration
		share   float64 // of the rate
	}{
		{"memory", 4000 * mega, 20 * time.Microsecond, 20 * time.Millisecond, 0.99},
		{"a local network", 100 * mega, time.Millisecond, 150 * time.Millisecond, 0.99},
		{"slow", mega, 0, 400 * time.Millisecond, 0.99},
		{"very slow", mega / 8, time.Millisecond, 1100 * time.Millisecond, 0.99}, // 64 KiB take half a second
		{"far away", 50 * mega, 150 * time.Millisecond, 350 * time.Millisecond, 0.8},
		{"far away and slow", mega, 200 * time.Millisecond, 700 * time.Millisecond, 0.4},
	} {
		t.Run(test.name, func(t *testing.T) {
			w, l, start := &window{}, &link{rate: test.rate, latency: test.latency}, time.Unix(1, 0)
			rate, longest := copyOver(w, l, start, 40*time.Second)
			if rate < test.share*test.rate || longest > test.longest {
				t.Errorf("%.2f MiB/s of %.2f, copies took up to %v, want at most %v", rate/mega, test.rate/mega, longest, test.longest)
			}
			// It becomes another source.
			l.rate, l.latency = 20*mega, 30*time.Millisecond
			rate, longest = copyOver(w, l, start.Add(time.Hour), 40*time.Second)
			if rate < 0.3*l.rate || longest > 900*time.Millisecond { // it is judged by what the other one took for small copies
				t.Errorf("then: %.2f MiB/s of %.2f, copies took up to %v", rate/mega, l.rate/mega, longest)
			}
		})
	}
}

// TestWindowBegins: what is fast is not held back for long.
func TestWindowBegins(t *testing.T) {
	w, now, copied := window{}, time.Unix(1, 0), int64(0)
	for count := range 100 {
		n := min(1<<20, int64(w.regions(12))<<12)
		w.copied(n, windowMin, now, now.Add(time.Millisecond), true)
		if copied += n; w.regions(12) >= 16<<20>>12 {
			t.Logf("the window is open after %d copies", count+1)
			return
		}
	}
	t.Errorf("after %d bytes it lets %d regions be in flight", copied, w.regions(12))
}
