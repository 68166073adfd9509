package bench

import (
	"math"
	"math/rand/v2"
	"sync/atomic"
	"time"

	"cowherd/block"
	"cowherd/kcopyd"
)

// copies makes jobs of an engine out of the requests of a job: each copies its range of one device to the same range of
// another one, as hydration does, or behind what was copied before, as chunks go to a COW device.
type copies struct {
	engine   kcopyd.Engine
	from, to block.Device
	offload  kcopyd.Offload
	class    kcopyd.Class
	packed   *packing // nil: each copy goes to where it comes from
}

// packing lays copies one behind the other.
type packing struct {
	next atomic.Int64 // bytes
	from []int64      // offset of the source, by the number of the copy
}

// place gives the next copy its place, which is for length bytes from offset from of the source.
func (p *packing) place(from, length int64) int64 {
	to := p.next.Add(length) - length
	p.from[to/length] = from
	return to
}

// submit starts the copy of o.
func (c *copies) submit(o *op) {
	k := &o.copy
	if k.Done == nil {
		k.Done = func(k *kcopyd.Job) { o.Complete(nil, k.Err()) }
		k.To = o.to[:]
	}
	k.From = kcopyd.Region{Device: c.from, Offset: o.r.Offset}
	o.to[0] = kcopyd.Region{Device: c.to, Offset: o.r.Offset}
	if c.packed != nil {
		o.to[0].Offset = c.packed.place(o.r.Offset, o.r.Length)
	}
	k.Length, k.Queue, k.Class, k.Offload = o.r.Length, o.r.Queue, c.class, c.offload
	c.engine.Submit(k)
}

// load makes the jobs of a cell over a stack. Each has a range of its own, as fio's jobs in the tests of dm-snapshot.
type load struct {
	cell *Cell
	rand *rand.Rand
}

// jobs makes jobs that go over d as the cell says, or over what copies copies. once: without pace, warm-up and reads,
// each unit is written once, to prepare what follows.
func (l *load) jobs(d block.Device, copies *copies, once bool) []*job {
	c := l.cell
	list := make([]*job, c.Jobs)
	units := c.Range / max(c.unit(), c.Block)
	units -= foregroundUnits(c, units)
	for i := range list {
		first, end := units*int64(i)/int64(c.Jobs), units*int64(i+1)/int64(c.Jobs)
		j := newJob(d, block.Queue(i), c.Depth, block.OpWrite, c.Block, c.Block, l.offsets(first, end, once))
		j.copies = copies
		list[i] = j
		if once {
			continue
		}
		endless := !isCopyOnWrite(c) || c.Writes == writesLater || c.Pattern == patternZipf || c.Read == 100
		if endless && (c.Time > 0 || c.Count > 0) {
			j.limit = math.MaxInt
		}
		if c.Count > 0 {
			j.limit = min(j.limit, int(max(1, c.Count*int64(i+1)/int64(c.Jobs)-c.Count*int64(i)/int64(c.Jobs))))
		}
		j.from = int64(c.Warmup)
		if c.Time > 0 {
			j.until.Store(int64(c.Warmup + c.Time))
		}
		if c.Rate > 0 {
			j.interval = float64(time.Second) / c.Rate
		}
		if c.Read > 0 {
			j.reads, j.random = uint64(c.Read)<<32/100, l.rand.Uint64()|1
		}
	}
	return list
}

// offsets are where a job goes that has the units [first, end), in blocks.
func (l *load) offsets(first, end int64, once bool) []uint32 {
	c := l.cell
	each := max(c.unit()/c.Block, 1) // blocks of a unit
	strided := c.Pattern == patternStrided && !once
	sparse := each > 1 && isCopyOnWrite(c) && (once || c.Writes == writesFirst && c.Pattern == patternRandom && c.Read < 100)
	if sparse || strided { // one block of each unit
		list := make([]uint32, end-first)
		for i := range list {
			list[i] = uint32((first+int64(i))*each + l.rand.Int64N(each))
		}
		if !strided {
			l.shuffle(list)
		}
		return list
	}
	list := make([]uint32, (end-first)*each)
	for i := range list {
		list[i] = uint32(first*each + int64(i))
	}
	if c.Pattern == patternSequential && !once {
		return list
	}
	l.shuffle(list)
	if c.Pattern == patternZipf && !once {
		z := newZipf(c.Theta, len(list))
		drawn := make([]uint32, len(list))
		for i := range drawn {
			drawn[i] = list[z.rank(l.rand)-1]
		}
		return drawn
	}
	return list
}

func (l *load) shuffle(list []uint32) {
	l.rand.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
}

// zipf draws ranks from 1 to n, rank k with a probability in proportion to k to the power of -theta, by rejection from
// the integral of that curve (W. Hörmann and G. Derflinger, Rejection-inversion to generate variates from monotone
// discrete distributions, 1996).
type zipf struct {
	theta      float64
	n          float64
	low, high  float64 // of the integral
	acceptable float64 // so close to the rank that no test is needed
}

func newZipf(theta float64, n int) *zipf {
	z := &zipf{theta: theta, n: float64(n)}
	z.low = z.integral(1.5) - 1
	z.high = z.integral(z.n + 0.5)
	z.acceptable = 2 - z.inverse(z.integral(2.5)-math.Pow(2, -theta))
	return z
}

// integral is that of the curve, but for a constant.
func (z *zipf) integral(x float64) float64 {
	if z.theta == 1 {
		return math.Log(x)
	}
	return math.Expm1((1-z.theta)*math.Log(x)) / (1 - z.theta)
}

// inverse is the inverse of integral.
func (z *zipf) inverse(y float64) float64 {
	if z.theta == 1 {
		return math.Exp(y)
	}
	return math.Exp(math.Log1p(max(y*(1-z.theta), -1)) / (1 - z.theta))
}

// rank draws one.
func (z *zipf) rank(r *rand.Rand) int {
	for {
		u := z.high + r.Float64()*(z.low-z.high)
		x := z.inverse(u)
		k := min(max(math.Floor(x+0.5), 1), z.n)
		if k-x <= z.acceptable || u >= z.integral(k+0.5)-math.Pow(k, -z.theta) {
			return int(k)
		}
	}
}
