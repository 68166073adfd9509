package persistentdata

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"syscall"
)

// BlockSize is the size of a metadata block in bytes.
const BlockSize = 4096

// BlocksMax is how many blocks a space map can have: 255 entries of an index block, 16320 blocks each. What a device has
// beyond that is not used.
const BlocksMax = indexEntries * bitmapEntries

var le = binary.LittleEndian

// castagnoli is the table of CRC-32C. It is made at its first use, which takes 0.15 ms: not at the start of every command.
func castagnoli() *crc32.Table { return crc32.MakeTable(crc32.Castagnoli) }

// A Kind is a kind of block: how it is called, and how it is sealed. The checksum stands in its first four bytes.
type Kind struct {
	Name string
	// XOR goes into the checksum, so that a block of one kind is never taken for one of another.
	XOR uint32
	// BlockAt is the offset in bytes of the block's own number, 64 bits.
	BlockAt int
}

// The kinds of blocks of this package. A superblock is its owner's.
var (
	KindNode   = &Kind{"btree node", 121107, 8}
	KindArray  = &Kind{"array block", 595846735, 16}
	KindIndex  = &Kind{"space map index", 160478, 8}
	KindBitmap = &Kind{"space map bitmap", 240779, 8}
)

// checksum is that of a block of this kind: CRC-32C of all but its own field, not inverted at the end.
func (k *Kind) checksum(p []byte) uint32 {
	return ^crc32.Checksum(p[4:BlockSize], castagnoli()) ^ k.XOR
}

// Seal makes p block number n: its number and checksum are written into it.
func (k *Kind) Seal(p []byte, n uint64) {
	le.PutUint64(p[k.BlockAt:], n)
	le.PutUint32(p, k.checksum(p))
}

// Verify tells whether p was sealed as block n of this kind: nil or a *CorruptError.
func (k *Kind) Verify(p []byte, n uint64) error {
	if want, got := k.checksum(p), le.Uint32(p); want != got {
		return &CorruptError{Block: n, Kind: k.Name, Rule: RuleChecksum, What: "checksum", Expected: uint64(want), Found: uint64(got)}
	}
	if got := le.Uint64(p[k.BlockAt:]); got != n {
		return &CorruptError{Block: n, Kind: k.Name, Rule: RuleBlockNumber, What: "its own number", Expected: n, Found: got}
	}
	return nil
}

// Rule is the name of a rule of the formats.
type Rule string

// The rules. docs/formats/clone-metadata.md explains each.
const (
	RuleChecksum     Rule = "checksum"
	RuleBlockNumber  Rule = "block-number"
	RuleBlockRange   Rule = "block-range"
	RuleUnreadable   Rule = "unreadable"
	RuleNodeFlags    Rule = "node-flags"
	RuleNodeSize     Rule = "node-size"
	RuleNodeKeys     Rule = "node-keys"
	RuleTreeDepth    Rule = "tree-depth"
	RuleReachedTwice Rule = "reached-twice"
	RuleArraySize    Rule = "array-size"
	RuleArrayIndex   Rule = "array-index"
	RuleSpaceMapSize Rule = "space-map-size"
	RuleFreeCount    Rule = "free-count"
	RuleFreeHint     Rule = "free-hint"
	RuleRefCount     Rule = "ref-count"
	RuleInUse        Rule = "in-use"
	RuleLeak         Rule = "leak"
)

// Values of CorruptError.Want.
const (
	atLeast = "at least"
	atMost  = "at most"
	inRange = "more than 0 and less than" // a block that something points to
)

// CorruptError says that metadata breaks a rule of its format, and where. Its errno is EUCLEAN.
type CorruptError struct {
	Block           uint64
	Kind            string // of the block
	Rule            Rule
	What            string // what is wrong about the block: the thing that was compared
	Want            string // how it is to compare with Expected: "at most"; "": it is to be that
	Expected, Found uint64
}

// Error tells block, kind, and what was expected and found.
func (e *CorruptError) Error() string {
	format := "block %d (%s): %s is %d, want %s%d"
	if e.Rule == RuleChecksum {
		format = "block %d (%s): %s is %#08x, want %s%#08x"
	}
	want := e.Want
	if want != "" {
		want += " "
	}
	return fmt.Sprintf(format, e.Block, e.Kind, e.What, e.Found, want, e.Expected)
}

// Unwrap gives the errno.
func (e *CorruptError) Unwrap() error { return syscall.EUCLEAN }
