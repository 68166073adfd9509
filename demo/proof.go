package demo

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"time"

	"cowherd/backend/nbd"
	"cowherd/block"
	"cowherd/internal/size"
)

const (
	quietName = "vm@demo"
	flowName  = "vm@flow"
)

// trial is the first half of the demo: writers that never stop, and what is proven meanwhile.
type trial struct {
	*stage
	n       *narrator
	writers *writers
	proofs  []Proof
}

// prove attaches the image, sets the writers going and proves what a snapshot is.
func (s *stage) prove(ctx context.Context, n *narrator) (proofs []Proof, err error) {
	ctx, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	d := s.scaled
	if err := d.attach(ctx, s.image); err != nil {
		return nil, err
	}
	device, err := d.open(ctx, "vm", s.config.Connections)
	if err != nil {
		return nil, err
	}
	t := &trial{stage: s, n: n}
	t.writers = newWriters(device, len(s.before), s.config.Connections, s.config.Depth, fail)
	n.watch(t.live())
	err = t.run(ctx)
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx) // a writer's failure rather than what came of it
	}
	n.quiet()
	t.writers.hold()
	if err == nil {
		err = t.final(ctx, device)
	}
	err = errors.Join(err, device.Close())
	if err == nil {
		err = d.client.Detach(ctx, "vm")
	}
	return t.proofs, err
}

// run takes the snapshots while the writers write.
func (t *trial) run(ctx context.Context) error {
	t.writers.release()
	if err := t.writers.wrote(ctx, t.config.Pace, 1); err != nil {
		return err
	}
	if err := t.quietMoment(ctx); err != nil {
		return err
	}
	return t.fullFlow(ctx)
}

// claim notes the outcome of a proof.
func (t *trial) claim(ok bool, claim string, evidence ...string) {
	t.proofs = append(t.proofs, Proof{Claim: claim, OK: ok, Evidence: evidence})
}

// take takes a snapshot.
func (t *trial) take(ctx context.Context, name string) (stall time.Duration, err error) {
	stall, err = t.scaled.snapshot(ctx, name)
	if err == nil && t.config.taken != nil {
		err = t.config.taken(ctx, t.scaled, name)
	}
	return stall, err
}

// drop removes a snapshot under the writers' hands.
func (t *trial) drop(ctx context.Context, name string) error {
	if err := t.scaled.client.RemoveSnapshot(ctx, name, false); err != nil {
		return err
	}
	t.n.step("Snapshot %q is dropped. The writers do not notice.", name)
	return nil
}

// quietMoment is the main proof: the writers hold still while the image file is hashed and the snapshot is taken, so
// that the file's checksum is the truth about the frozen view.
func (t *trial) quietMoment(ctx context.Context) error {
	begun := time.Now()
	t.writers.hold()
	truth, err := hashFile(ctx, t.image)
	if err != nil {
		return err
	}
	stall, err := t.take(ctx, quietName)
	if err != nil {
		return err
	}
	mark := t.writers.count.Load()
	t.writers.release()
	t.n.step("The writers hold still for %s: the image file is read and hashed, and the snapshot %q is taken, which "+
		"takes %s of it. The writers go on.", short(time.Since(begun)), quietName, short(stall))
	ok, evidence := true, []string{"sha256 of the image file at that moment:  " + abbreviated(truth)}
	for _, blocks := range []int{len(t.before) / 2, len(t.before)} {
		if err := t.writers.wrote(ctx, t.config.Pace, int64(blocks)); err != nil {
			return err
		}
		after := size.Human((t.writers.count.Load() - mark) * blockSize)
		t.n.step("%s have been written since. %s is read through NBD and hashed.", after, quietName)
		sum, err := t.hashExport(ctx, quietName)
		if err != nil {
			return err
		}
		ok = ok && sum == truth
		what := "of " + quietName + ", " + after + " of writes later:"
		evidence = append(evidence, fmt.Sprintf("%-40s  %s", what, abbreviated(sum)))
	}
	now, err := hashFile(ctx, t.image)
	if err != nil {
		return err
	}
	t.claim(ok, quietName+" is the image of the moment when it was taken", evidence...)
	t.claim(now != truth, "the disk itself has moved on", "sha256 of the image file afterwards:      "+abbreviated(now))
	return t.drop(ctx, quietName)
}

// fullFlow is the second proof: a snapshot is taken while the writers run, and each block of it compared with their
// books.
func (t *trial) fullFlow(ctx context.Context) error {
	acknowledged := t.writers.acknowledged()
	stall, err := t.take(ctx, flowName)
	if err != nil {
		return err
	}
	t.writers.later.Store(true)
	t.n.step("Snapshot %q is taken in full flow: new writes wait %s for it.", flowName, short(stall))
	if err := t.writers.wrote(ctx, t.config.Pace, int64(len(t.before))); err != nil {
		return err
	}
	t.n.step("%s is read through NBD, and each block compared with the writers' books.", flowName)
	var a audit
	err = t.readExport(ctx, flowName, func(i int, p []byte) { a.frozen(t.stage, i, p, acknowledged[i]) })
	if err != nil {
		return err
	}
	t.claim(a.bad() == 0, flowName+", taken in full flow, has all writes before it and none after",
		fmt.Sprintf("%s blocks hold their last write acknowledged before it, or one in flight while it was taken (%s of"+
			" them); %s were never written", count(a.written), count(a.between), count(a.untouched)),
		fmt.Sprintf("%s hold an older write, %s one issued afterwards, %s anything else", count(a.lost), count(a.later),
			count(a.damaged)))
	return t.drop(ctx, flowName)
}

// final compares the origin with the writers' books, when they have stopped.
func (t *trial) final(ctx context.Context, d *nbd.Device) error {
	acknowledged := t.writers.acknowledged()
	var a audit
	err := readAll(ctx, d, func(i int, p []byte) { a.current(t.stage, i, p, acknowledged[i]) })
	if err != nil {
		return err
	}
	t.claim(a.bad() == 0, "the disk lost nothing while snapshots came and went",
		fmt.Sprintf("%s writes, none of which failed: %s blocks hold their last one, %s were never written",
			count(int(t.writers.count.Load())), count(a.written), count(a.untouched)),
		fmt.Sprintf("%s hold an older write, %s anything else", count(a.lost), count(a.damaged)))
	return nil
}

// audit counts what blocks were found to hold.
type audit struct {
	written   int // a write that they should hold
	between   int // of these, one that was acknowledged while the snapshot was being taken
	untouched int // what was there before the demo, rightly
	lost      int // something older than they should
	later     int // a write issued after the snapshot had been taken
	damaged   int // something that nobody wrote
}

func (a *audit) bad() int { return a.lost + a.later + a.damaged }

// frozen looks at block i of a snapshot that was asked for when its first acknowledged writes had been acknowledged.
func (a *audit) frozen(s *stage, i int, p []byte, acknowledged uint32) {
	found, stamped := stampOf(i, p)
	switch {
	case !stamped && !s.unchanged(i, p):
		a.damaged++
	case !stamped && acknowledged == 0:
		a.untouched++
	case stamped && found.later():
		a.later++
	case !stamped || found.sequence() < acknowledged:
		a.lost++
	default:
		a.written++
		if found.sequence() > acknowledged {
			a.between++
		}
	}
}

// current looks at block i of the origin when all its writes have been acknowledged.
func (a *audit) current(s *stage, i int, p []byte, acknowledged uint32) {
	found, stamped := stampOf(i, p)
	switch {
	case !stamped && !s.unchanged(i, p), stamped && found.sequence() > acknowledged:
		a.damaged++
	case !stamped && acknowledged == 0:
		a.untouched++
	case !stamped || found.sequence() < acknowledged:
		a.lost++
	default:
		a.written++
	}
}

// live makes a function that tells the state of things for the last line of a terminal.
func (t *trial) live() func(context.Context) string {
	seen, at := int64(0), time.Now()
	return func(ctx context.Context) string {
		now, writes := time.Now(), t.writers.count.Load()
		rate := float64(writes-seen) / now.Sub(at).Seconds()
		seen, at = writes, now
		text := fmt.Sprintf("%s writes/s, %s written", count(int(rate)), size.Human(writes*blockSize))
		devices, err := t.scaled.client.Devices(ctx)
		if err != nil {
			return text // the daemon will be heard of where it is needed
		}
		for _, d := range devices {
			if d.Snapshot != nil {
				text += fmt.Sprintf(", %s has copied %s", d.Name, size.Human(d.Snapshot.AllocatedBytes))
			}
		}
		return text
	}
}

// hashFile is the sha256 of a file, read without cowherd.
func hashFile(ctx context.Context, path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h, piece := sha256.New(), make([]byte, pieceSize)
	for ctx.Err() == nil {
		count, err := f.Read(piece)
		h.Write(piece[:count])
		if errors.Is(err, io.EOF) {
			return sum(h), nil
		}
		if err != nil {
			return "", err
		}
	}
	return "", context.Cause(ctx)
}

func sum(h hash.Hash) string { return hex.EncodeToString(h.Sum(nil)) }

// hashExport is the sha256 of an export, read through NBD.
func (t *trial) hashExport(ctx context.Context, name string) (string, error) {
	h := sha256.New()
	err := t.readExport(ctx, name, func(_ int, p []byte) { h.Write(p) })
	return sum(h), err
}

// readExport reads an export over a connection of its own, and gives it to visit block by block.
func (t *trial) readExport(ctx context.Context, name string, visit func(i int, p []byte)) error {
	d, err := t.scaled.open(ctx, name, 1)
	if err != nil {
		return err
	}
	return errors.Join(readAll(ctx, d, visit), d.Close())
}

// piece is a read in flight.
type piece struct {
	r    block.Request
	done chan error
}

// Complete tells readAll.
func (x *piece) Complete(_ *block.Request, err error) { x.done <- err }

// readAll reads a whole device, some pieces ahead, and gives it to visit block by block.
func readAll(ctx context.Context, d *nbd.Device, visit func(i int, p []byte)) error {
	var ahead [4]piece
	submit := func(x *piece, offset int64) {
		x.r.Op, x.r.Offset, x.r.Length = block.OpRead, offset, min(pieceSize, d.Size()-offset)
		x.r.Data = x.r.Data[:x.r.Length]
		x.r.Push(x)
		d.Submit(&x.r)
	}
	next := int64(0)
	for i := range ahead {
		ahead[i].done, ahead[i].r.Data = make(chan error, 1), make([]byte, pieceSize)
		if next < d.Size() {
			submit(&ahead[i], next)
			next += pieceSize
		}
	}
	var failed error
	for i, offset := 0, int64(0); offset < next; i, offset = i+1, offset+pieceSize {
		x := &ahead[i%len(ahead)]
		if err := <-x.done; err != nil && failed == nil {
			failed = err
		}
		if err := context.Cause(ctx); failed == nil {
			failed = err
		}
		if failed != nil {
			continue // what is in flight is waited for
		}
		for at := 0; at < len(x.r.Data); at += blockSize {
			visit(int((offset+int64(at))/blockSize), x.r.Data[at:at+blockSize])
		}
		if next < d.Size() {
			submit(x, next)
			next += pieceSize
		}
	}
	return failed
}
