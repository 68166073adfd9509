// Package nbd is the NBD server: it serves block devices to clients of the Network Block Device protocol
// (NetworkBlockDevice/nbd, doc/proto.md), fixed newstyle, with structured replies, block status, TLS and socket
// activation. What it serves comes from an Exports; it knows nothing of where devices come from.
//
// # The life of a connection
//
//	accept      Server.serve: a goroutine for each connection, which is given a block.Queue and keeps it
//	negotiate   options, one by one, within HandshakeTimeout (negotiate.go, options.go, tls.go)
//	transmit    conn: commands until the client disconnects, breaks the protocol, or the server stops
//	release     everything in flight is answered, the helpers end, the export's reference goes back
//
// # The life of a request
//
// The connection's goroutine reads what has arrived, up to a few dozen requests at a time, and takes one after the
// other from its input buffer:
//
//	small, quick device   submitted at once: a write from where it was received, a read to where its reply stands in
//	                      the output buffer. If it completes in Submit, the reply is done
//	completes later       it goes "apart": its slot and what it uses stay as they are, and the sender, another
//	                      goroutine, answers it
//	slow device           handed to a worker, which submits it (pace.go finds out which devices are slow)
//	large, or several     handed to a worker, which moves it in pieces of 256 KiB
//	device requests
//
// Replies gather in the output buffer. They are sent when the input is used up, and when there are many: half of what a
// client has in flight is worth sending while the rest is worked on.
//
// The arithmetic, for 4 KiB requests at depth 32 over a unix socket, a device in memory: one receive for about 8
// writes (32 KiB) or 32 reads, one send for 16 replies, one pread or pwrite each; no lock, no allocation, no hand-over.
// A write's bytes are copied twice (socket to buffer, buffer to device), a read's too. A system call for each message
// would quadruple the cost.
//
// # Limits
//
// Connections, requests in flight of a connection, payload memory of a connection and of all together, the length of
// names, options and requests, the number of extents in a reply and the time of the handshake are bounded (Config, and
// the constants beside their use). Each connection has a reserve that the others cannot take, and one that does not
// read its replies holds up its own requests only. Every length from the wire is checked before memory is taken
// (conn.check, negotiation.option).
//
// # Lock order
//
//	conn.sendMu        held while a reply is written: replies must not mix
//	  conn.mu
//	Server.mu          never held together with a connection's
//	socket.mu          a leaf
package nbd
