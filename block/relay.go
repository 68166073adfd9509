package block

import "context"

// A Relayer is a device that can be written to with what another device sends, without the data passing through this
// program's memory. It is an optional power of a leaf. Unlike a Copier's, the way leads through this program, which
// sees the beginning of each range, and may take a range into memory after all.
type Relayer interface {
	// OpenRelay makes a relay from source to this device, both of which stay open for as long as it does. length is the
	// most that it is to move at a time, in bytes. ENOTSUP: there is none for this pair. It blocks for as long as it takes
	// to connect, or until ctx ends; the relay breaks when ctx ends later.
	OpenRelay(ctx context.Context, source Device, length int64) (Relay, error)
}

// RelayMin is the shortest range that is relayed, in bytes, and how many bytes of a range are looked at.
const RelayMin = 4096

// A Relay moves ranges from one device to the same place on another. It is used by several goroutines at a time.
type Relay interface {
	// Move moves length bytes at offset, at least RelayMin, and returns when the destination has acknowledged them: then
	// they are durable after its next flush, like any write. take is called before that with the first RelayMin bytes,
	// which are lent to it, by a goroutine that must not wait. If it returns memory, of length bytes, that is filled
	// with the range instead, and the destination sees nothing of it. After an error the relay is broken, and every
	// other Move fails, too: nothing is known of the range then, which is to be copied in another way, and nobody is at
	// work on it any more, as far as that can be had.
	Move(offset, length int64, take func(head []byte) []byte) error
	// Close ends the relay, in whatever state. No Move is under way.
	Close() error
}
