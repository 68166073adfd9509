package bench

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"

	"cowherd/backend/mem"
	"cowherd/block"
	"cowherd/clonemeta"
	"cowherd/cowstore"
	"cowherd/kcopyd"
	"cowherd/target/snapshot"
	"cowherd/transfer"
)

// sampled is one run of a cell.
type sampled struct {
	elapsed time.Duration
	count   int64 // operations that were measured
	bytes   int64 // of them
	latency *hdrhistogram.Histogram
	cpu     time.Duration // of the process, less what the harness took
	harness float64       // nanoseconds of it for each operation
	written int64         // bytes that the jobs wrote, the warm-up included
	writes  int64         // and requests
	sent    int64         // all requests of the jobs, the warm-up included; 0: as count
	stats   kcopyd.Stats  // of all engines together; only what is counted up
	queues  []uint64      // jobs of engines by the queue that issued them, or requests by job where there is no engine
	io      []ioCount     // by leaf, see roles
	roles   []string
	profile *profiled // nil: it was not profiled

	foreground *hdrhistogram.Histogram // latencies of the foreground beside copies; nil: there is none
	further    map[string]float64      // what only this stack tells
}

// once is a sample of a run that is one operation.
func once(took, cpu time.Duration, count, bytes int64) *sampled {
	h := hdrhistogram.New(1, latencyMax, 3)
	_ = h.RecordValue(min(max(int64(took), 1), latencyMax))
	return &sampled{elapsed: took, count: count, bytes: bytes, latency: h, cpu: cpu}
}

// drivers run the stacks that have no jobs.
func drivers() map[string]func(context.Context, *Cell, *kit, *rand.Rand) (*sampled, error) {
	return map[string]func(context.Context, *Cell, *kit, *rand.Rand) (*sampled, error){
		stackTransfer:  runTransfer,
		stackHydration: runHydration,
		stackStoreOpen: runStoreOpen,
		stackCommit:    runCommits,
		stackAftermath: runAftermath,
	}
}

// isSparse tells whether what is copied has holes.
func isSparse(c *Cell) bool {
	return c.Device == deviceFile && onStack(stackTransfer, stackHydration)(c) && c.Data < 100
}

// source is what is copied, of which Data percent hold data, in pieces of 1 MiB.
func source(c *Cell, k *kit) (block.Device, error) {
	d, err := k.device(roleDevice, 0, c.Size)
	if err != nil || !isSparse(c) {
		return d, err
	}
	const piece = 1 << 20
	p := make([]byte, piece)
	for i := range p {
		p[i] = byte(i>>9) | 1
	}
	for at, credit := int64(0), 0; at < c.Size && err == nil; at += piece {
		if credit += c.Data; credit >= 100 {
			credit -= 100
			err = block.Write(d, p[:min(piece, c.Size-at)], at)
		}
	}
	return d, errors.Join(err, block.Flush(d))
}

// runTransfer copies a whole device to another one, up to the flush, as "cowherd copy" does.
func runTransfer(ctx context.Context, c *Cell, k *kit, _ *rand.Rand) (*sampled, error) {
	from, err := source(c, k)
	if err != nil {
		return nil, err
	}
	to, err := k.device(roleOther, 0, c.Size)
	if err != nil {
		return nil, err
	}
	method := map[string]transfer.Method{offloadOff: transfer.ReadWrite, offloadOnly: transfer.Offload}[c.Offload]
	cpu, began := processorTime(), time.Now()
	r, err := transfer.Run(ctx, transfer.Options{
		Source: from, Destination: to, Zeroed: c.Device == deviceFile, Sparse: transfer.SparseDefault, Queues: c.Jobs,
		InFlight: c.Depth, PieceSize: min(c.Block, transfer.PieceSizeMax), Method: method, Flush: true,
	})
	s := once(time.Since(began), processorTime()-cpu, 1, c.Size)
	for _, m := range []struct {
		name  string
		bytes int64
	}{
		{"clone", r.Clone}, {"device", r.Device}, {"server", r.Server}, {"readwrite", r.ReadWrite}, {"zero", r.Zeroes}, {"skipped", r.Skipped},
	} {
		if m.bytes > 0 {
			s.stats.Methods = append(s.stats.Methods, kcopyd.MethodStats{Class: "bulk", Method: m.name, Operations: 1, Bytes: uint64(m.bytes)})
		}
	}
	return s, err
}

// runHydration fills a clone, up to the last commit.
func runHydration(ctx context.Context, c *Cell, k *kit, _ *rand.Rand) (*sampled, error) {
	from, err := source(c, k)
	if err != nil {
		return nil, err
	}
	s := &stack{}
	r, err := s.clone(c, k, from)
	if err != nil {
		return nil, errors.Join(err, s.close())
	}
	cpu, began := processorTime(), time.Now()
	r.clone.SetHydration(true)
	select {
	case <-r.hydrated:
	case <-r.stopped:
		return nil, errors.Join(errors.New("hydration has stopped"), s.check(), s.close())
	case <-ctx.Done():
		return nil, errors.Join(ctx.Err(), s.close())
	}
	m := once(time.Since(began), processorTime()-cpu, 1, c.Size)
	m.stats, m.queues = statsOf(s.engines)
	return m, errors.Join(s.check(), s.close())
}

// opensDefault is how many exceptions a store has that is opened, and commitsDefault how many commits are made, where the
// plan says nothing.
const (
	opensDefault   = 100_000
	commitsDefault = 1000
)

// runStoreOpen opens a persistent store in memory, of Count exceptions of random chunks, as a snapshot. An operation is
// an exception.
func runStoreOpen(_ context.Context, c *Cell, _ *kit, r *rand.Rand) (_ *sampled, err error) {
	records := int(c.Count)
	if records == 0 {
		records = opensDefault
	}
	chunk := cowstore.ChunkSize(c.Chunk)
	layout := cowstore.NewLayout(1<<62, chunk)
	d, err := mem.New(mem.Config{Size: chunk.Offset(layout.AreaChunk(uint64(records/layout.AreaRecords() + 2)))})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	x := &storeRig{config: StoreConfig{Records: records}, rand: r}
	if err := x.fillStore(d, chunk); err != nil {
		return nil, fmt.Errorf("fill a store: %w", err)
	}
	below := snapshot.NewOrigin(blank{int64(records) * 16 * c.Chunk})
	cpu, began := processorTime(), time.Now()
	p, err := cowstore.OpenPersistent(d, cowstore.PersistentConfig{})
	if err != nil {
		return nil, err
	}
	if _, err := snapshot.New(snapshot.Config{Name: "bench@open", Origin: below, COW: d, Store: p}); err != nil {
		return nil, err
	}
	return once(time.Since(began), processorTime()-cpu, int64(records), int64(records)*16), nil
}

// runCommits makes Count commits of a clone's metadata in memory, each of one word at random.
func runCommits(_ context.Context, c *Cell, _ *kit, r *rand.Rand) (_ *sampled, err error) {
	commits := c.Count
	if commits == 0 {
		commits = commitsDefault
	}
	params := clonemeta.Params{RegionSize: block.SectorFloor(c.Region), TargetSize: block.SectorFloor(c.Size)}
	d, err := mem.New(mem.Config{Size: clonemeta.Size(params)})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	meta, err := clonemeta.Format(d, params)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, meta.Close()) }()
	words := params.Regions() / 64
	if words == 0 {
		return nil, errors.New("a clone of less than 64 regions has no whole word")
	}
	s := once(1, 0, commits, commits*8)
	s.latency.Reset()
	cpu, began := processorTime(), time.Now()
	last := began
	for range commits {
		word := r.Uint64N(words)
		err := meta.SetWords(func(yield func(uint64, uint64) bool) { yield(word, r.Uint64()) })
		if err == nil {
			err = meta.Commit()
		}
		if err != nil {
			return nil, err
		}
		now := time.Now()
		_ = s.latency.RecordValue(min(int64(now.Sub(last)), latencyMax))
		last = now
	}
	s.elapsed, s.cpu = last.Sub(began), processorTime()-cpu
	return s, nil
}
