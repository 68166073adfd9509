package logwrites

import "encoding/binary"

// The log, in sectors of the size of the device's logical block (512 bytes at least). All numbers are little-endian.
//
//	sector 0        the super: magic u64, version u64, entries u64, sector size u32
//	from sector 1   entries, one behind the other:
//	                one sector: sector u64, sectors u64, flags u64, data length u64 (the header);
//	                of a mark, its text follows in the same sector
//	                then the data that was written: none of a flush, a mark or a discard
const (
	magic       = 0x6a736677736872
	version     = 1
	headerBytes = 32
)

// Flags of an entry.
const (
	flagFlush   = 1 << 0
	flagFUA     = 1 << 1
	flagDiscard = 1 << 2
	flagMark    = 1 << 3
)

// entry is one thing that happened, and the Completer of its request.
type entry struct {
	t        *Target
	sector   int64 // in sectors of the log
	sectors  int64
	flags    uint64
	textLen  int      // of a mark
	contents []byte   // as it lies in the log: a sector with the header, then the data
	covered  []*entry // of a flush: what it makes durable
	// It is about to be logged because of an entry that overwrites it.
	overwritten bool
	logged      chan<- error // of a mark: told when it is in the log; else nil
}

// encode puts the header in front of the contents, which are sectorBytes long at least.
func (e *entry) encode() {
	p := e.contents
	clear(p[:headerBytes])
	binary.LittleEndian.PutUint64(p[0:], uint64(e.sector))
	binary.LittleEndian.PutUint64(p[8:], uint64(e.sectors))
	binary.LittleEndian.PutUint64(p[16:], e.flags)
	binary.LittleEndian.PutUint64(p[24:], uint64(e.textLen))
}

// encodeSuper fills a sector with the super.
func encodeSuper(p []byte, entries uint64) {
	clear(p)
	binary.LittleEndian.PutUint64(p[0:], magic)
	binary.LittleEndian.PutUint64(p[8:], version)
	binary.LittleEndian.PutUint64(p[16:], entries)
	binary.LittleEndian.PutUint32(p[24:], uint32(len(p)))
}
