package block

import "context"

// A Relayer is a device that can be written to with what another device sends, without the data passing through this
// program's memory. It is an optional power of a leaf. Unlike a Copier's, the way leads through this program, which
// sees the beginning of each range, and may take a range into memory after all.
type Relayer interface {
	// OpenRelay makes a relay from source to this device, both of which stay open for as long as it does. length is the
	// most that it is to move at a time, in bytes. ENOTSUP: there is none for this pair. It blocks for as long as it takes
	// to connect, or until ctx ends; the relay is broken when ctx ends later.
	OpenRelay(ctx context.Context, source Device, length int64) (Relay, error)
}

// A Relay moves ranges from one device to the same place on another, one at a time: Begin, then Pass or Take. It is used
// by one goroutine at a time. After an error it is broken, and only Close may be called: nothing is known of the range
// then, which is to be copied in another way, and all that were passed before are as they were.
//
// What was passed is durable after the destination's next flush, like any write.
type Relay interface {
	// Begin asks for length bytes at offset, at least 1, and waits for them. It returns how they begin, some bytes, which
	// belong to the relay.
	Begin(offset, length int64) (head []byte, err error)
	// Pass writes the range to the destination. It returns when that has acknowledged it.
	Pass() error
	// Take fills p, as long as the range, with it. The destination sees nothing of it.
	Take(p []byte) error
	// Close ends the relay, in whatever state. What a broken one had begun to write may take a while to be ended.
	Close() error
}
