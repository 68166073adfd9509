// Package service is the daemon: devices with names, their snapshots, the exports that serve them and the control API
// that manages them. Everything below it is wired together here and nowhere else.
//
// # What a name stands for
//
//	"vm"          backend (file, mem, null) -> snapshot.Origin -> dm.Device "vm"         -> NBD export "vm"
//	"vm@nightly"  COW device -> cowstore.Transient -> snapshot.Snapshot -> dm.Device     -> NBD export "vm@nightly"
//	"vm@stable"   COW device -> cowstore.Persistent -> ...
//
//	"big"         whatever its table says      -> dm.Mapper's device             -> NBD export "big"
//
// While "vm@stable" is merged into "vm", both mapped devices have one snapshot.Merge in place of their targets.
//
// Each snapshot has a copy engine of its own, as the kernel has a kcopyd client for each: one COW device that hangs
// does not take the buffers of the others, and closing the engine proves that nothing is copied any more.
//
// Mapped devices (dm.go) are made of tables, by the device mapper's verbs. They are not in the state file. A table that
// lies on an attached device or a snapshot is one of its users, as a client is; files and block devices are shared by
// all tables that name them (dmhost.go), but with nothing else.
//
// # A snapshot is taken
//
//	lock the origin's operations
//	open the COW device, make store, engine, target and mapped device       I/O goes on
//	suspend the origin's mapped device                                      new requests wait, those in flight end
//	origin.Add(snapshot)                                                    the frozen view is this moment's
//	resume                                                                  the stall is measured from suspend to here
//
// It is dropped the other way round: nobody may use its export, then snapshot and origin are suspended, it is taken
// out, and the origin is resumed before anything is closed. Whatever fails leaves things as they were: a suspend that
// does not end in time (Config.SuspendTimeout) because requests in flight hang is undone and is the operation's error.
//
// # What outlives the daemon
//
// The state file (statefile.go) says what is attached and which snapshots there are. It is changed, durably, before an
// operation is answered, and Restore brings back what it says. The one thing that must never happen, whenever the
// daemon dies, is that a persistent store is opened again after its origin was written without it. Therefore
//
//   - a snapshot is taken:    state: taking; make the store; add it to the origin; state: kept; answer
//   - it is removed:          state: removing; suspend; take it out; make the store invalid; resume; remove the file;
//     state: forget
//   - the daemon starts:      kept: open it before anybody can use the origin. It cannot be opened: state: lost, before
//     the origin is used. Taking, removing, lost: make the store invalid, and do not open it
//   - the daemon stops:       close the origin, then its snapshots; the state stays as it is
//   - it is merged:           merge.go
//
// # States of a name
//
//	opening --> live --> closing --> gone
//	   |          ^         |
//	   v          +---------+  in use, or could not be suspended
//	  gone
//
// A live name can be opened by clients; a live or closing one is listed. An origin's name is taken from opening to
// gone, so that two attaches never work on the same name.
//
// # Events
//
// Whatever happens is published as an event on the bus, which never blocks: not a completion that finds a snapshot
// invalid, not an operation. The daemon's log is one reader of the bus among others.
//
// # Lock order
//
//	dm's verbs          of one mapped device: opening what its table lies on comes below
//	  mappedHost.mu     held while a file is opened, so that it is opened once
//	    registry.mu
//	  entry.mu
//	origin.operation    a semaphore held for a whole operation on an origin or one of its snapshots, device I/O
//	                    included: waiting for it ends with the waiter's context, and what runs under it is bounded by
//	                    SuspendTimeout, but for opening, flushing and closing files
//	  stateFile.writing   a semaphore held while the state file is written
//	  registry.mu       names, and files in use
//	  origin.snapsMu    the origin's snapshots
//	  cloned.mu         the source of a clone
//	  entry.mu          state and users of a name
//	    bus.mu          events
//	Daemon.throttling   alone
//
// The mutexes are held for moments, never across I/O. NBD connections take them, but never the semaphore; a snapshot's
// Invalidated callback takes bus.mu only. A merge that has finished is ended by a task of the daemon, which takes the
// semaphore as any operation does.
package service
