package cowstore

import (
	"encoding/binary"
	"errors"
	"fmt"
	"syscall"

	"cowherd/block"
)

// FormatVersion is the version of the persistent format.
const FormatVersion = 1

// The persistent format, version 1, of dm-snap-persistent.c; all numbers are little-endian. The COW device is divided in
// chunks of one size, C bytes:
//
//	chunk   0        1        2 ... 1+E    2+E      3+E ... 2+2E   3+2E
//	       +--------+--------+------------+--------+--------------+----
//	       | header | area 0 | data       | area 1 | data         | ...
//	       +--------+--------+------------+--------+--------------+----
//
//	header  0        4       8         12           16
//	       +--------+-------+---------+------------+-------------------+
//	       | magic  | valid | version | chunk size | zeroes            |    u32 each; chunk size in sectors
//	       +--------+-------+---------+------------+-------------------+
//
//	area    0        8         16                                      C
//	       +--------+---------+--------+---------+--------------------+
//	       | old    | new     | old    | new     | ...                |    E = C/16 records of two u64
//	       +--------+---------+--------+---------+--------------------+
//
// A record says that chunk old of the origin is found at chunk new of the COW device. The table is the records of area
// 0, 1, 2, ... up to the first whose new is zero; an area that is full to its last record is followed by the next. A
// record may name a data chunk of any area.
const (
	headerMagic   = 0x70416e53 // "SnAp"
	headerVersion = FormatVersion
	headerBytes   = 16
	recordBytes   = 16
)

// ErrNoStore is the error of a device that begins with four zero bytes: it holds no store, and a new one may be made.
var ErrNoStore = errors.New("there is no exception store: the device begins with zeroes")

// CorruptError says that a store breaks a rule of the format, and where. Its errno is EUCLEAN.
type CorruptError struct {
	Area   uint64 // of the record; meaningless when Slot is negative
	Slot   int    // the record's place in its area; -1: the rule is about the header or the area as a whole
	Record Record // when Slot is not negative
	What   string // the rule that is broken, with the values
}

// Error tells place, values and rule.
func (e *CorruptError) Error() string {
	if e.Slot < 0 {
		return "the exception store is corrupt: " + e.What
	}
	return fmt.Sprintf("the exception store is corrupt: area %d, slot %d, old chunk %d, new chunk %d: %s", e.Area, e.Slot,
		e.Record.Old, e.Record.New, e.What)
}

// Unwrap gives the errno.
func (e *CorruptError) Unwrap() error { return syscall.EUCLEAN }

// corruptHeader is an error about the header.
func corruptHeader(format string, args ...any) error {
	return &CorruptError{Slot: -1, What: fmt.Sprintf(format, args...)}
}

// Header is chunk 0 of a persistent store.
type Header struct {
	Valid     bool // the snapshot has not become invalid
	ChunkSize ChunkSize
}

// ReadHeader reads the header of the store on d. ErrNoStore: there is none. *CorruptError: it is not a store, or of an
// unknown version, or its chunk size is one that d cannot have.
func ReadHeader(d block.Device) (Header, error) {
	p := make([]byte, max(block.SectorSize, d.Limits().LogicalBlock))
	if d.Size() < int64(len(p)) {
		return Header{}, fmt.Errorf("the COW device has %d bytes: there is no room for a header: %w", d.Size(), syscall.EINVAL)
	}
	if err := block.Read(d, p, 0); err != nil {
		return Header{}, fmt.Errorf("read the header: %w", err)
	}
	h, err := parseHeader(p)
	if err != nil {
		return h, err
	}
	if err := CheckChunkSize(int64(h.ChunkSize), d.Limits().LogicalBlock); err != nil {
		return h, corruptHeader("header: %v", err)
	}
	return h, nil
}

// parseHeader reads a header from p, which holds at least headerBytes.
func parseHeader(p []byte) (Header, error) {
	le := binary.LittleEndian
	magic, valid, version, sectors := le.Uint32(p), le.Uint32(p[4:]), le.Uint32(p[8:]), le.Uint32(p[12:])
	switch {
	case magic == 0:
		return Header{}, ErrNoStore
	case magic != headerMagic:
		return Header{}, corruptHeader("header: magic %#08x, want %#08x", magic, uint32(headerMagic))
	case version != headerVersion:
		return Header{}, corruptHeader("header: version %d, want %d", version, headerVersion)
	}
	h := Header{Valid: valid != 0, ChunkSize: ChunkSize(sectors) * block.SectorSize}
	if err := CheckChunkSize(int64(h.ChunkSize)); err != nil {
		return h, corruptHeader("header: %v", err)
	}
	return h, nil
}

// put writes the header in front of p and zeroes behind it.
func (h Header) put(p []byte) {
	clear(p)
	le := binary.LittleEndian
	le.PutUint32(p, headerMagic)
	if h.Valid {
		le.PutUint32(p[4:], 1)
	}
	le.PutUint32(p[8:], headerVersion)
	le.PutUint32(p[12:], uint32(h.ChunkSize/block.SectorSize))
}

// Record is an exception as the table on disk holds it.
type Record struct {
	Old Chunk // of the origin
	New Chunk // of the COW device; 0 ends the table
}

// recordAt is the record in a slot of an area.
func recordAt(area []byte, slot int) Record {
	p := area[slot*recordBytes:][:recordBytes]
	return Record{Old: Chunk(binary.LittleEndian.Uint64(p)), New: Chunk(binary.LittleEndian.Uint64(p[8:]))}
}

// put writes the record to a slot of an area.
func (r Record) put(area []byte, slot int) {
	p := area[slot*recordBytes:][:recordBytes]
	binary.LittleEndian.PutUint64(p, uint64(r.Old))
	binary.LittleEndian.PutUint64(p[8:], uint64(r.New))
}

// Layout is where things lie on a COW device.
type Layout struct {
	ChunkSize ChunkSize
	Chunks    Chunk // whole chunks of the device
}

// NewLayout is the layout of a store on a device of size bytes.
func NewLayout(size int64, chunkSize ChunkSize) Layout {
	return Layout{ChunkSize: chunkSize, Chunks: chunkSize.ChunkFloor(size)}
}

// AreaRecords is the number of records of one area.
func (l Layout) AreaRecords() int { return int(l.ChunkSize / recordBytes) }

// stride is the distance from one area to the next, in chunks.
func (l Layout) stride() Chunk { return Chunk(l.AreaRecords()) + 1 }

// AreaChunk is the chunk that an area lies in.
func (l Layout) AreaChunk(area uint64) Chunk { return 1 + Chunk(area)*l.stride() }

// Areas is the number of areas that lie wholly on the device.
func (l Layout) Areas() uint64 {
	if l.Chunks < 2 {
		return 0
	}
	return uint64((l.Chunks-2)/l.stride()) + 1
}

// IsMetadata tells whether a chunk is the header or an area.
func (l Layout) IsMetadata(c Chunk) bool { return c == 0 || c%l.stride() == 1 }

// skipMetadata is c, or the next chunk when c is an area.
func (l Layout) skipMetadata(c Chunk) Chunk {
	if l.IsMetadata(c) {
		return c + 1
	}
	return c
}

// Check tells which rule r breaks by itself: its chunk must hold data of this device, and the old one must lie within an
// origin of the given number of chunks (0: not known). "" if none.
func (l Layout) Check(r Record, origin Chunk) string {
	if _, what := l.checkNew(r.New); what != "" {
		return what
	}
	_, what := l.checkOld(r.Old, origin)
	return what
}

// checkNew is Check for the new chunk, and names the rule.
func (l Layout) checkNew(c Chunk) (rule Rule, what string) {
	switch {
	case c >= l.Chunks:
		return RuleNewBehindEnd, fmt.Sprintf("the new chunk lies behind the end of the COW device, which has %d", l.Chunks)
	case l.IsMetadata(c):
		return RuleNewMetadata, "the new chunk is one of metadata"
	}
	return "", ""
}

// checkOld is Check for the old chunk, and names the rule.
func (l Layout) checkOld(c, origin Chunk) (rule Rule, what string) {
	switch {
	case origin > 0 && c >= origin:
		return RuleOldBehindEnd, fmt.Sprintf("the old chunk lies behind the end of the origin, which has %d", origin)
	case c > chunkMax:
		return RuleOldTooLarge, fmt.Sprintf("the old chunk is larger than %d", uint64(chunkMax))
	}
	return "", ""
}

// chunkMax is the largest number of a chunk: the kernel keeps the upper 8 bits of a number for the length of a run.
const chunkMax = 1<<56 - 1
