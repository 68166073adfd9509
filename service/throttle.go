package service

import (
	"syscall"

	"cowherd/api"
	"cowherd/kcopyd"
)

// Throttle tells what the copies of all engines are limited to, class by class.
func (d *Daemon) Throttle() api.Throttle {
	t := api.Throttle{Yields: d.throttle.Yields()}
	for _, c := range d.throttle.Stats() {
		t.Classes = append(t.Classes, describeThrottle(&c))
	}
	return t
}

func describeThrottle(c *kcopyd.ThrottleStats) api.ThrottleClass {
	return api.ThrottleClass{
		Class: c.Class, RateBytes: c.Limit.Rate, BurstBytes: c.Limit.Burst, SharePercent: c.Limit.Share,
		Waiting: c.Waiting, Waits: c.Waits,
	}
}

// SetThrottle changes the limits of one class; what the request does not name stays. EINVAL: there is no such class, or
// a limit is out of range. It holds until the daemon stops.
func (d *Daemon) SetThrottle(class string, r api.ThrottleRequest) (api.ThrottleClass, error) {
	c, err := classNamed(class)
	if err != nil {
		return api.ThrottleClass{}, err
	}
	d.throttling.Lock() // two that each change a part must not undo each other
	defer d.throttling.Unlock()
	limit := d.throttle.Stats()[c].Limit
	if r.RateBytes != nil {
		limit.Rate = *r.RateBytes
	}
	if r.BurstBytes != nil {
		limit.Burst = *r.BurstBytes
	}
	if r.SharePercent != nil {
		limit.Share = *r.SharePercent
	}
	if limit.Rate < 0 || limit.Burst < 0 || limit.Share < 0 || limit.Share > 100 {
		return api.ThrottleClass{}, api.Errorf(syscall.EINVAL,
			"throttle %s: a rate of %d bytes/s, a burst of %d bytes and a share of %d %%: none may be negative, and a share "+
				"is at most 100", class, limit.Rate, limit.Burst, limit.Share)
	}
	if err := d.throttle.Set(c, limit); err != nil {
		return api.ThrottleClass{}, err
	}
	stats := d.throttle.Stats()
	return describeThrottle(&stats[c]), nil
}

// classNamed is the class of jobs with a name.
func classNamed(name string) (kcopyd.Class, error) {
	for c := range kcopyd.Class(kcopyd.ClassCount) {
		if c.String() == name {
			return c, nil
		}
	}
	return 0, api.Errorf(syscall.EINVAL, "there is no class of copies %q: cow, hydration, merge or bulk is wanted", name)
}

// describeEngine is the counters of a copy engine.
func (d *Daemon) describeEngine(e kcopyd.Engine) api.Kcopyd {
	stats := e.Stats()
	k := api.Kcopyd{
		Engine:          d.config.Engine,
		Jobs:            stats.Jobs,
		ReadBytes:       stats.BytesRead,
		WrittenBytes:    stats.BytesWritten,
		Errors:          stats.Errors,
		JobsInFlight:    stats.JobsInFlight,
		JobsWaiting:     stats.JobsWaiting,
		BufferWaits:     stats.BufferWaits,
		BuffersBytes:    stats.BuffersInUse,
		BuffersMaxBytes: stats.BufferCeiling,
	}
	for i := range stats.Methods {
		m := &stats.Methods[i]
		us := func(q float64) float64 { return float64(m.Latency.Quantile(q)) / 1000 }
		k.Methods = append(k.Methods, api.KcopydMethod{
			Class: m.Class, Method: m.Method, Operations: m.Operations, Bytes: m.Bytes, Errors: m.Errors,
			MeanMicroseconds: float64(m.Latency.Mean()) / 1000, P50Microseconds: us(0.5), P99Microseconds: us(0.99),
		})
	}
	for _, f := range stats.Fallbacks {
		k.Fallbacks = append(k.Fallbacks, api.KcopydFallback{Reason: f.Reason, Count: f.Count})
	}
	for _, r := range stats.Routes {
		k.Routes = append(k.Routes, api.KcopydRoute{
			Source: r.Source, Destination: r.Destination, Method: r.Method, Absent: r.Absent,
			ThresholdBytes: r.Threshold, Waiting: r.Waiting,
		})
	}
	return k
}
