package nbd

import (
	"bytes"
	"errors"
	"slices"
	"strings"
	"syscall"
	"testing"

	"cowherd/block"
)

// TestViolations has a server break the protocol in its reply to a request: the request fails with EIO and the cause,
// and so does the next one.
func TestViolations(t *testing.T) {
	const offset, length = 4096, 1024
	page := make([]byte, length)
	read := func(d *Device) error { return block.Read(d, make([]byte, length), offset) }
	write := func(d *Device) error { return block.Write(d, page, offset) }
	status := func(d *Device) error {
		return d.Extents(offset, length, func(block.Extent) bool { return true })
	}
	tests := []struct {
		name   string
		simple bool
		ask    func(*Device) error
		answer func(*session, *wireRequest)
		want   string
	}{
		{"no magic number", false, read, func(s *session, r *wireRequest) { s.send(make([]byte, 64)) }, "begins with 0x0"},
		{"structured, not agreed", true, write,
			func(s *session, r *wireRequest) { s.chunk(r, replyFlagDone, chunkNone); s.send(page) }, "begins with 0x668e33ef"},
		{"simple reply to a structured read", false, read,
			func(s *session, r *wireRequest) { s.ok(r); s.send(page) }, "simple reply to command 0"},
		{"simple reply to block status", false, status,
			func(s *session, r *wireRequest) { s.ok(r) }, "simple reply to command 7"},
		{"cookie out of the table", false, write,
			func(s *session, r *wireRequest) { r.cookie |= 0xffff; s.ok(r) }, "never sent"},
		{"cookie of the future", false, write,
			func(s *session, r *wireRequest) { r.cookie += 1 << 16; s.ok(r) }, "not in flight"},
		{"cookie of nobody", false, write,
			func(s *session, r *wireRequest) { r.cookie ^= 1; s.ok(r) }, "not in flight"},
		{"answered twice", false, func(d *Device) error { return errors.Join(write(d), write(d)) },
			func(s *session, r *wireRequest) { s.ok(r); s.ok(r) }, "not in flight"},
		{"end without the done flag", false, write,
			func(s *session, r *wireRequest) { s.chunk(r, 0, chunkNone) }, "a chunk of type 0"},
		{"end with a payload", false, write,
			func(s *session, r *wireRequest) { s.chunk(r, replyFlagDone, chunkNone, page) }, "a chunk of type 0"},
		{"unknown chunk", false, write,
			func(s *session, r *wireRequest) { s.chunk(r, replyFlagDone, 99, page) }, "a chunk of type 99"},
		{"data to a write", false, write,
			func(s *session, r *wireRequest) { s.chunk(r, replyFlagDone, chunkData, r.offset, page) }, "a chunk of type 1"},
		{"hole to a write", false, write,
			func(s *session, r *wireRequest) { s.chunk(r, replyFlagDone, chunkHole, r.offset, r.length) }, "a chunk of type 2"},
		{"status to a read", false, read, func(s *session, r *wireRequest) {
			s.chunk(r, replyFlagDone, chunkStatus, uint32(fakeContext), r.length, uint32(0))
		}, "a chunk of type 5"},
		{"data of no bytes", false, read,
			func(s *session, r *wireRequest) { s.chunk(r, replyFlagDone, chunkData, r.offset) }, "data chunk of 8 bytes"},
		{"data before the range", false, read,
			func(s *session, r *wireRequest) { s.chunk(r, 0, chunkData, r.offset-1, page) }, "1024 bytes at offset 4095"},
		{"data behind the range", false, read,
			func(s *session, r *wireRequest) { s.chunk(r, 0, chunkData, r.offset+1, page) }, "1024 bytes at offset 4097"},
		{"data far away", false, read,
			func(s *session, r *wireRequest) { s.chunk(r, 0, chunkData, ^uint64(0), page) },
			"1024 bytes at offset 18446744073709551615"},
		{"a huge length", false, read,
			func(s *session, r *wireRequest) {
				s.send(uint32(magicStructured), uint16(0), uint16(chunkData), r.cookie, ^uint32(0), r.offset)
			}, "4294967287 bytes at offset 4096"},
		{"data twice", false, read, func(s *session, r *wireRequest) {
			s.chunk(r, 0, chunkData, r.offset, page[:512])
			s.chunk(r, 0, chunkData, r.offset+256, page[:512])
		}, "came twice"},
		{"data missing", false, read, func(s *session, r *wireRequest) {
			s.chunk(r, replyFlagDone, chunkData, r.offset, page[:512])
		}, "some never came"},
		{"data missing in the middle", false, read, func(s *session, r *wireRequest) {
			s.chunk(r, 0, chunkData, r.offset, page[:256])
			s.chunk(r, replyFlagDone, chunkData, r.offset+512, page[:512])
		}, "some never came"},
		{"hole of a wrong size", false, read,
			func(s *session, r *wireRequest) { s.chunk(r, 0, chunkHole, r.offset) }, "hole chunk of 8 bytes"},
		{"hole of no bytes", false, read,
			func(s *session, r *wireRequest) { s.chunk(r, 0, chunkHole, r.offset, uint32(0)) }, "0 bytes at offset 4096"},
		{"hole behind the range", false, read,
			func(s *session, r *wireRequest) { s.chunk(r, 0, chunkHole, r.offset, r.length+1) }, "1025 bytes at offset 4096"},
		{"short error", false, write,
			func(s *session, r *wireRequest) { s.chunk(r, replyFlagDone, chunkError, uint32(5)) }, "error chunk of 4 bytes"},
		{"long error", false, write, func(s *session, r *wireRequest) {
			s.chunk(r, replyFlagDone, chunkError, uint32(5), uint16(0), make([]byte, errorPayloadMax))
		}, "error chunk of"},
		{"error of no errno", false, write,
			func(s *session, r *wireRequest) { s.chunk(r, replyFlagDone, chunkError, uint32(0), uint16(0)) }, "error 0"},
		{"message longer than its chunk", false, write,
			func(s *session, r *wireRequest) {
				s.chunk(r, replyFlagDone, chunkError, uint32(5), uint16(9), "too short")
			}, ""},
		{"message far longer than its chunk", false, write,
			func(s *session, r *wireRequest) {
				s.chunk(r, replyFlagDone, chunkError, uint32(5), uint16(10), "too short")
			},
			"a message of 10 bytes in 15"},
		{"status of a wrong size", false, status,
			func(s *session, r *wireRequest) { s.chunk(r, 0, chunkStatus, uint32(fakeContext), r.length) },
			"block status of 8 bytes"},
		{"status of nothing", false, status,
			func(s *session, r *wireRequest) { s.chunk(r, replyFlagDone, chunkNone) }, "without an extent"},
		{"status of another context", false, status, func(s *session, r *wireRequest) {
			s.chunk(r, 0, chunkStatus, uint32(1), r.length, uint32(0))
		}, "context 1"},
		{"status of no bytes", false, status, func(s *session, r *wireRequest) {
			s.chunk(r, 0, chunkStatus, uint32(fakeContext), uint32(0), uint32(0))
		}, "extent of no bytes"},
		{"status of 4 GiB", false, status, func(s *session, r *wireRequest) {
			s.send(uint32(magicStructured), uint16(0), uint16(chunkStatus), r.cookie, ^uint32(3))
		}, "block status of 4294967292 bytes"},
		{"extents smaller than a block", false, func(d *Device) error {
			return d.Extents(offset+100, 1, func(block.Extent) bool { return true })
		}, func(s *session, r *wireRequest) {
			s.chunk(r, replyFlagDone, chunkStatus, uint32(fakeContext), uint32(50), uint32(0))
			s.next()
		}, "smaller than its minimum block"},
		{"status twice", false, status, func(s *session, r *wireRequest) {
			s.chunk(r, 0, chunkStatus, uint32(fakeContext), r.length, uint32(0))
			s.chunk(r, 0, chunkStatus, uint32(fakeContext), r.length, uint32(0))
		}, "second block status"},
		{"end in a reply", false, read, func(s *session, r *wireRequest) {
			s.send(uint32(magicStructured), uint16(0))
		}, "in the middle of a reply"},
		{"end in the data", true, read, func(s *session, r *wireRequest) { s.ok(r); s.send(page[:100]) },
			"in the middle of a reply"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			f := &fake{size: 1 << 20, flags: fakeFlags, simple: test.simple}
			f.serve = func(s *session) {
				if r := s.next(); r != nil {
					test.answer(s, r)
				}
			}
			f.start(t)
			d := f.open(t)
			err := test.ask(d)
			wantText(t, err, test.want)
			if block.Errno(err) != syscall.EIO {
				t.Errorf("got error %v, want EIO", err)
			}
			wantErrno(t, block.Flush(d), syscall.EIO)
		})
	}
}

func TestErrors(t *testing.T) {
	tests := []struct {
		code uint32
		want syscall.Errno
	}{
		{1, syscall.EPERM}, {5, syscall.EIO}, {12, syscall.ENOMEM}, {22, syscall.EINVAL}, {28, syscall.ENOSPC},
		{75, syscall.EOVERFLOW}, {95, syscall.ENOTSUP}, {7, syscall.EINVAL}, {1 << 31, syscall.EINVAL},
	}
	for _, simple := range []bool{true, false} {
		for _, test := range tests {
			f := &fake{size: 1 << 20, flags: fakeFlags, simple: simple}
			f.serve = func(s *session) {
				for r := s.next(); r != nil; r = s.next() {
					if simple {
						s.send(uint32(magicSimple), test.code, r.cookie)
						continue
					}
					if r.command == cmdRead { // an error in the middle of it, and an offset behind the message
						s.chunk(r, 0, chunkData, r.offset, make([]byte, 512))
						s.chunk(r, 0, chunkErrorOffset, test.code, uint16(3), "bad", r.offset+512)
						s.chunk(r, 0, chunkHole, r.offset+512, uint32(512))
						s.chunk(r, replyFlagDone, chunkNone)
						continue
					}
					s.chunk(r, replyFlagDone, chunkErrorBit+77, test.code, uint16(2), "\xff!", "more fields")
				}
			}
			f.start(t)
			d := f.open(t)
			for _, op := range []block.Op{block.OpRead, block.OpWrite} {
				err := block.Do(d, op, 0, 4096, 1024, make([]byte, 1024))
				wantErrno(t, err, test.want)
				e, ok := errors.AsType[*block.Error](err)
				if !ok || e.Op != op || e.Offset != 4096 || e.Length != 1024 {
					t.Errorf("the error does not tell its request: %v", err)
				}
				if want := map[block.Op]string{block.OpRead: "bad", block.OpWrite: "\uFFFD!"}[op]; !simple &&
					!strings.Contains(err.Error(), want) {
					t.Errorf("the message is missing: %v", err)
				}
			}
		}
	}
}

// TestPieces has the data of one read come in many pieces and holes, in a strange order.
func TestPieces(t *testing.T) {
	const pieces, size = 256, 512
	f := &fake{size: 1 << 20, flags: fakeFlags}
	f.serve = func(s *session) {
		for r := s.next(); r != nil; r = s.next() {
			for i := range pieces {
				i = i * 77 % pieces
				at := r.offset + uint64(i*size)
				if i%3 == 0 {
					s.chunk(r, 0, chunkHole, at, uint32(size))
				} else {
					s.chunk(r, 0, chunkData, at, bytes.Repeat([]byte{byte(i)}, size))
				}
			}
			s.chunk(r, replyFlagDone, chunkNone)
		}
	}
	f.start(t)
	d := f.open(t)
	for range 3 {
		got := bytes.Repeat([]byte{0xaa}, pieces*size)
		if err := block.Read(d, got, 4096); err != nil {
			t.Fatal(err)
		}
		for i, b := range got {
			want := byte(i / size)
			if i/size%3 == 0 {
				want = 0
			}
			if b != want {
				t.Fatalf("byte %d is %d, want %d", i, b, want)
			}
		}
	}
}

func TestCoverage(t *testing.T) {
	type step struct {
		start, end int64
		ok         bool
	}
	tests := []struct {
		name  string
		steps []step
		full  int64 // -1: nothing is
	}{
		{"nothing", nil, 0},
		{"in order", []step{{0, 4, true}, {4, 8, true}}, 8},
		{"backwards", []step{{4, 8, true}, {0, 4, true}}, 8},
		{"the middle last", []step{{0, 2, true}, {6, 8, true}, {2, 6, true}}, 8},
		{"a gap", []step{{0, 2, true}, {3, 8, true}}, -1},
		{"the first twice", []step{{0, 4, true}, {0, 4, false}}, 4},
		{"a later one twice", []step{{4, 8, true}, {4, 8, false}}, -1},
		{"over the end of a later one", []step{{4, 8, true}, {6, 10, false}}, -1},
		{"over the start of a later one", []step{{4, 8, true}, {2, 5, false}}, -1},
		{"around a later one", []step{{4, 8, true}, {2, 9, false}}, -1},
		{"inside of a later one", []step{{4, 8, true}, {5, 6, false}}, -1},
		{"from the front over a later one", []step{{4, 8, true}, {0, 5, false}}, -1},
		{"between two", []step{{1, 2, true}, {5, 6, true}, {2, 5, true}, {0, 1, true}}, 6},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			var v coverage
			for _, s := range test.steps {
				if got := v.add(s.start, s.end); got != s.ok {
					t.Errorf("add [%d, %d): %v", s.start, s.end, got)
				}
			}
			for length := range int64(10) {
				if got := v.full(length); got && len(test.steps) > 0 && length != test.full && test.full >= 0 {
					t.Errorf("full(%d): %v", length, got)
				}
			}
			if test.full >= 0 && !v.full(test.full) {
				t.Errorf("full(%d): false", test.full)
			}
			if test.full < 0 && v.full(8) {
				t.Error("full(8) with something missing")
			}
		})
	}
	t.Run("scattered", func(t *testing.T) {
		var v coverage
		for i := range int64(scatteredMax) {
			if !v.add(2*i+1, 2*i+2) {
				t.Fatalf("piece %d was refused", i)
			}
		}
		if v.add(1<<40, 1<<40+1) {
			t.Error("more than the limit was taken")
		}
	})
}

// extentsFake is a server whose export is a list of extents that repeats, answered with at most most descriptors.
func extentsFake(pattern []descriptor, size int64, most int) *fake {
	f := &fake{size: uint64(size), flags: fakeFlags}
	f.serve = func(s *session) {
		for r := s.next(); r != nil; r = s.next() {
			var payload []any
			payload = append(payload, uint32(fakeContext))
			at, i, told := int64(0), 0, 0
			for at < int64(r.offset)+int64(r.length) && told < most {
				e := pattern[i%len(pattern)]
				i++
				stop := at + e.length
				if stop > int64(r.offset) {
					payload = append(payload, uint32(stop-max(at, int64(r.offset))), e.state)
					told++
				}
				at = stop
			}
			s.chunk(r, replyFlagDone, chunkStatus, payload...)
		}
	}
	return f
}

func TestExtents(t *testing.T) {
	const size = 8 << 20
	pattern := []descriptor{
		{512, 0}, {1024, stateHole | stateZero}, {512, stateZero}, {512, 0}, {512, 0x80}, {1024, stateHole},
	}
	for _, most := range []int{1, 3, 1 << 20} {
		f := extentsFake(pattern, size, most)
		f.start(t)
		d := f.open(t)
		ranges := [][2]int64{{0, 64 << 10}, {512, 512}, {100, 5000}, {3, 1}, {size - 700, 700}, {4096, 0}}
		if most > 3 {
			ranges = append(ranges, [2]int64{0, size}) // more extents than one query takes
		}
		for _, r := range ranges {
			offset, length := r[0], r[1]
			at := offset
			var last *block.Extent
			err := d.Extents(offset, length, func(e block.Extent) bool {
				if e.Offset != at || e.Length <= 0 {
					t.Fatalf("extent %+v does not follow on %d", e, at)
				}
				if last != nil && last.Hole == e.Hole && last.Zero == e.Zero {
					t.Fatalf("extents %+v and %+v are one", *last, e)
				}
				for b := e.Offset / 512; b <= (e.Offset+e.Length-1)/512; b++ {
					if hole, zero := stateAt(pattern, b*512); hole != e.Hole || zero != e.Zero {
						t.Fatalf("extent %+v is wrong at %d", e, b*512)
					}
				}
				at += e.Length
				last = &e
				return true
			})
			if err != nil {
				t.Fatal(err)
			}
			if at != offset+length {
				t.Fatalf("extents of [%d, %d) end at %d", offset, offset+length, at)
			}
		}
		calls := 0
		if err := d.Extents(0, size, func(block.Extent) bool { calls++; return calls < 3 }); err != nil || calls != 3 {
			t.Errorf("%d calls after a stop (%v)", calls, err)
		}
	}
}

// stateAt is the state of a pattern at an offset.
func stateAt(pattern []descriptor, offset int64) (hole, zero bool) {
	for i := 0; ; i++ {
		e := pattern[i%len(pattern)]
		if offset < e.length {
			return e.state&stateHole != 0, e.state&stateZero != 0
		}
		offset -= e.length
	}
}

func TestExtentsWithoutStatus(t *testing.T) {
	for _, f := range []*fake{{simple: true}, {noContext: true}} {
		f.size, f.flags, f.serve = 1<<20, fakeFlags, memory(make([]byte, 1<<20))
		f.start(t)
		d := f.open(t)
		var got []block.Extent
		if err := d.Extents(512, 4096, func(e block.Extent) bool { got = append(got, e); return true }); err != nil {
			t.Fatal(err)
		}
		if want := []block.Extent{{Offset: 512, Length: 4096}}; !slices.Equal(got, want) {
			t.Errorf("got %v, want %v", got, want)
		}
	}
}
