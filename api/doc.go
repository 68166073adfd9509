// Package api is the control API of the daemon: what goes over the wire, and a client. The protocol is JSON over HTTP
// on a unix socket; docs/api.md describes it for programs that are not written in Go.
//
// Sizes are whole numbers of bytes and names of such fields end in _bytes; durations are whole microseconds and end in
// _us; times are RFC 3339 in UTC. A server refuses fields that it does not know; a client ignores them, so that a newer
// server may add to its answers.
package api

import "time"

// Prefix is what every path of this version of the protocol starts with.
const Prefix = "/v1"

// BodyMax is the size in bytes of the largest request that a server reads.
const BodyMax = 64 << 10

// Kinds of a Device.
const (
	KindOrigin   = "origin"   // was attached; may have snapshots
	KindClone    = "clone"    // an origin that is a clone; see Device.Clone
	KindSnapshot = "snapshot" // was taken of an origin
)

// States of a Device.
const (
	StateLive     = "live"     // an origin that serves requests
	StateValid    = "valid"    // a snapshot that shows the frozen view
	StateInvalid  = "invalid"  // a snapshot that has lost it; see Snapshot.Invalid
	StateOverflow = "overflow" // a snapshot that shows it, but takes no writes any more: its store is full
	StateMerging  = "merging"  // a snapshot that is being merged into its origin; see Snapshot.Merge
	StateMerged   = "merged"   // a snapshot that has been: it shows the origin, and goes with its last user
	StateLost     = "lost"     // what the daemon remembers but could not open; see Device.Lost
)

// What becomes of a snapshot whose store is full: values of SnapshotRequest.OnFull.
const (
	OnFullInvalidate = "invalidate" // it becomes invalid, as in the kernel
	OnFullGrow       = "grow"       // the store grows, up to the limit; then as invalidate
	OnFullThrottle   = "throttle"   // writes to the origin wait for room, for a while; then as invalidate
	OnFullOverflow   = "overflow"   // a write to the snapshot fails and costs nothing else; of the origin: as invalidate
)

// AttachRequest asks for a device under a name.
type AttachRequest struct {
	Name string `json:"name"`
	// Device is the absolute path of an image file or a block device, mem:SIZE, or null:SIZE[,OPTION...].
	Device   string `json:"device"`
	ReadOnly bool   `json:"read_only,omitempty"`
	Direct   bool   `json:"direct,omitempty"` // past the page cache
	// Clone makes the device a clone, whose destination Device is: a file, which is made if there is none, or a block
	// device. The zero value: it is no clone.
	Clone CloneRequest `json:"clone,omitzero"`
}

// Orders of hydration: values of CloneRequest.Order.
const (
	OrderSequential = "sequential" // from the first region to the last
	OrderHottest    = "hottest"    // regions near those that were read first
)

// CloneRequest says what a clone is made of. It is comparable.
type CloneRequest struct {
	// Source is what is cloned: the absolute path of an image file or a block device, an NBD URI, or the name of a
	// snapshot, of a device that is attached read-only, or of a mapped device with a read-only table, of the same daemon;
	// the URI of one is taken for the name. It must not change.
	Source string `json:"source"`
	// Metadata is the absolute path of a file or block device that says which regions are hydrated; "": a file beside the
	// destination, NAME.clone-metadata. A clone that it holds already is gone on with.
	Metadata string `json:"metadata,omitempty"`
	// RegionBytes is the unit of copying, a power of two from 4 KiB to 1 GiB; 0: 64 KiB, or that of the metadata.
	RegionBytes int64 `json:"region_bytes,omitempty"`
	// Overwrite lets a new clone take the place of what the destination holds.
	Overwrite bool `json:"overwrite,omitempty"`
	// DestinationIsZero: what the destination holds are zeroes, so that holes of the source are left alone. A file that is
	// made for the clone is zero anyway.
	DestinationIsZero bool `json:"destination_is_zero,omitempty"`
	NoHydration       bool `json:"no_hydration,omitempty"`        // in the background, until it is asked for
	NoDiscardPassdown bool `json:"no_discard_passdown,omitempty"` // discards are not told to the destination
	NoPromoteOnRead   bool `json:"no_promote_on_read,omitempty"`  // what was read is not hydrated before the rest
	// Threshold is the most regions in flight in the background, Batch the most in one copy; 0: 16 MiB and 1 MiB.
	Threshold uint32 `json:"hydration_threshold,omitempty"`
	Batch     uint32 `json:"hydration_batch_size,omitempty"`
	Order     string `json:"order,omitempty"` // "": OrderSequential
}

// HydrationRequest changes how a clone is hydrated. What is not given stays.
type HydrationRequest struct {
	Running   *bool  `json:"running,omitempty"`
	Threshold uint32 `json:"hydration_threshold,omitempty"`
	Batch     uint32 `json:"hydration_batch_size,omitempty"`
	// Retry tries regions again that were given up.
	Retry bool `json:"retry,omitempty"`
}

// SnapshotRequest asks for a snapshot.
type SnapshotRequest struct {
	Name string `json:"name"` // ORIGIN@SNAPSHOT
	// ChunkBytes is the unit of copying, a power of two from 4 KiB to 1 GiB; 0: 4 KiB, or that of the store that is
	// reopened.
	ChunkBytes int64 `json:"chunk_bytes,omitempty"`
	// Store is where copied chunks go: "" or "temp" (an unlinked file in the state directory), "mem", or the absolute
	// path of a directory (an unlinked file there), of a file or of a block device (whose contents are lost).
	//
	// Where a persistent store is: the absolute path of a file (made if there is none), of a block device, or of a
	// directory (a file NAME.cow is made there); "": the state directory.
	Store string `json:"store,omitempty"`
	// Persistent makes a store in the kernel's format, which the daemon opens again when it is started anew.
	Persistent bool `json:"persistent,omitempty"`
	// Reopen opens a persistent store as it is, cowherd's or the kernel's, whose origin must not have changed since.
	Reopen bool `json:"reopen,omitempty"`
	// Overwrite lets a persistent store take the place of whatever a file or block device holds.
	Overwrite bool `json:"overwrite,omitempty"`
	// MaxCOWBytes is the most that the store may take; 0: as much as the origin can need.
	MaxCOWBytes int64 `json:"max_cow_bytes,omitempty"`
	// OnFull is what happens when the store is full; "": OnFullInvalidate.
	OnFull string `json:"on_full,omitempty"`
	// StallMaxMicroseconds is how long OnFullThrottle lets a write wait; 0: 30 s.
	StallMaxMicroseconds int64 `json:"stall_max_us,omitempty"`
	// WarnAt are shares of the store in percent, each of which gives an event when it is taken. nil: 80, if the store is
	// smaller than what the origin can need; empty: none.
	WarnAt                []int `json:"warn_at,omitzero"`
	ReadOnly              bool  `json:"read_only,omitempty"`
	DiscardZeroesCOW      bool  `json:"discard_zeroes_cow,omitempty"`
	DiscardPassdownOrigin bool  `json:"discard_passdown_origin,omitempty"`
}

// ResizeRequest asks for another size of a snapshot's store.
type ResizeRequest struct {
	// SizeBytes is what the store may take from now on, more than before. A file grows; a block device must be that
	// large already.
	SizeBytes int64 `json:"size_bytes"`
}

// MergeRequest asks for a merge to run or to stop.
type MergeRequest struct {
	Running bool `json:"running"`
}

// SnapshotTaken is the answer to a SnapshotRequest.
type SnapshotTaken struct {
	Device
	// StallMicroseconds is how long the origin kept new requests waiting.
	StallMicroseconds int64 `json:"stall_us"`
}

// DeviceList is all devices, by name.
type DeviceList struct {
	Devices []Device `json:"devices"`
}

// Device is an origin or a snapshot, and its state at the moment of the answer.
type Device struct {
	Name              string    `json:"name"`
	Kind              string    `json:"kind"`
	State             string    `json:"state"`
	SizeBytes         int64     `json:"size_bytes"`
	LogicalBlockBytes int       `json:"logical_block_bytes"`
	ReadOnly          bool      `json:"read_only"`
	Since             time.Time `json:"since"` // attached, or taken
	// Device is what was attached; empty for a snapshot.
	Device string `json:"device,omitempty"`
	Direct bool   `json:"direct,omitempty"`
	// Snapshots are the names of an origin's snapshots.
	Snapshots []string `json:"snapshots,omitempty"`
	// Snapshot is nil for an origin.
	Snapshot *Snapshot `json:"snapshot,omitempty"`
	// Clone is nil unless the device is a clone.
	Clone *Clone `json:"clone,omitempty"`
	// Lost is why the device is remembered but not there; empty while it is.
	Lost string `json:"lost,omitempty"`
	// Target and TargetStatus are what the device mapper's status would show of it, without the range.
	Target       string `json:"target,omitempty"`
	TargetStatus string `json:"target_status,omitempty"`
	// TargetTable is what its table would show, without the range and the type.
	TargetTable string `json:"target_table,omitempty"`
	Users       []User `json:"users"`
	// URIs are where the device is exported, one for each listening address.
	URIs []string `json:"uris,omitempty"`
}

// Snapshot is what a snapshot has beside other devices.
type Snapshot struct {
	Origin     string `json:"origin"`
	Store      string `json:"store"`
	Persistent bool   `json:"persistent"`
	OnFull     string `json:"on_full"`
	ChunkBytes int64  `json:"chunk_bytes"`
	// AllocatedBytes of TotalBytes are taken in the store.
	AllocatedBytes int64 `json:"allocated_bytes"`
	TotalBytes     int64 `json:"total_bytes"`
	MetadataBytes  int64 `json:"metadata_bytes"`
	// Invalid is why the snapshot has lost the frozen view; empty while it is valid.
	Invalid string `json:"invalid,omitempty"`
	// Overflowed: the store is full, and writes to the snapshot fail.
	Overflowed bool `json:"overflowed,omitempty"`
	// StalledRequests are waiting for room in the store.
	StalledRequests   int    `json:"stalled_requests,omitempty"`
	CopiedChunks      uint64 `json:"copied_chunks"`      // from the origin
	OverwrittenChunks uint64 `json:"overwritten_chunks"` // filled by writes to the snapshot, without a copy
	PendingExceptions int    `json:"pending_exceptions"`
	TableBytes        int64  `json:"table_bytes"` // memory of the exception table

	DiscardZeroesCOW      bool `json:"discard_zeroes_cow,omitempty"`
	DiscardPassdownOrigin bool `json:"discard_passdown_origin,omitempty"`

	// Merge is nil unless the snapshot is being merged.
	Merge *Merge `json:"merge,omitempty"`

	Kcopyd Kcopyd `json:"kcopyd"`
}

// Modes of a Clone.
const (
	CloneReadWrite = "rw"
	CloneReadOnly  = "ro"   // the metadata cannot be written: nothing is hydrated any more
	CloneFail      = "Fail" // nor read: all I/O fails
)

// Clone is what a clone has beside other devices.
type Clone struct {
	Source        string `json:"source"`
	SourceInUse   bool   `json:"source_in_use"` // not everything is hydrated and committed yet
	Detached      bool   `json:"detached"`      // that is so, and the source is closed
	Metadata      string `json:"metadata"`
	RegionBytes   int64  `json:"region_bytes"`
	Regions       uint64 `json:"regions"`
	Hydrated      uint64 `json:"hydrated"`
	Hydrating     uint64 `json:"hydrating"` // regions in flight in the background
	Running       bool   `json:"running"`   // hydration in the background is wanted
	Threshold     uint32 `json:"hydration_threshold"`
	Batch         uint32 `json:"hydration_batch_size"`
	PromoteOnRead bool   `json:"promote_on_read"`
	Order         string `json:"order"`
	Passdown      bool   `json:"discard_passdown"`
	Mode          string `json:"mode"`
	// Cause is why the mode is not CloneReadWrite.
	Cause string `json:"cause,omitempty"`
	// FailedRegions could not be copied and were given up; FirstError is of one of them. Stopped: they are too many, and
	// hydration stops.
	FailedRegions uint64 `json:"failed_regions,omitempty"`
	FirstError    string `json:"first_error,omitempty"`
	Stopped       bool   `json:"stopped,omitempty"`
	TableBytes    int64  `json:"table_bytes"` // memory of the regions' state
	Commits       uint64 `json:"commits"`     // of the metadata, since it was opened

	Kcopyd Kcopyd `json:"kcopyd"`
}

// Merge is how far a merge has come.
type Merge struct {
	Running      bool   `json:"running"`
	MergedChunks uint64 `json:"merged_chunks"`
	TotalChunks  uint64 `json:"total_chunks"`
	// Failed is why it cannot go on; empty: it can.
	Failed string `json:"failed,omitempty"`
}

// User is a client's connection to a device.
type User struct {
	Client   string    `json:"client"` // where it comes from, in words
	Since    time.Time `json:"since"`
	TLS      bool      `json:"tls"`
	Queue    uint16    `json:"queue"`     // that its requests run on
	InFlight int64     `json:"in_flight"` // requests
	// Commands counts what the client has asked for, by the command's name: read, write, flush, trim, write_zeroes,
	// cache, block_status, disconnect.
	Commands map[string]Command `json:"commands"`
}

// Command counts one kind of command.
type Command struct {
	Requests uint64 `json:"requests"`
	Bytes    uint64 `json:"bytes"`
	Errors   uint64 `json:"errors"`
}

// Kcopyd are the counters of a copy engine.
type Kcopyd struct {
	Engine          string `json:"engine"` // scaled or serialised
	Jobs            uint64 `json:"jobs"`
	ReadBytes       uint64 `json:"read_bytes"`
	WrittenBytes    uint64 `json:"written_bytes"`
	Errors          uint64 `json:"errors"`
	JobsInFlight    int64  `json:"jobs_in_flight"`
	JobsWaiting     int64  `json:"jobs_waiting"`
	BufferWaits     uint64 `json:"buffer_waits"`
	BuffersBytes    int64  `json:"buffers_bytes"`
	BuffersMaxBytes int64  `json:"buffers_max_bytes"`

	Methods   []KcopydMethod   `json:"methods,omitempty"`
	Fallbacks []KcopydFallback `json:"fallbacks,omitempty"`
	Routes    []KcopydRoute    `json:"routes,omitempty"`
}

// KcopydMethod tells what was copied by one method for one class of copies. An operation is a piece of a copy.
type KcopydMethod struct {
	Class      string `json:"class"`  // cow, hydration, merge, bulk
	Method     string `json:"method"` // readwrite, zero, clone, device, server
	Operations uint64 `json:"operations"`
	Bytes      uint64 `json:"bytes"`
	Errors     uint64 `json:"errors"`
	// Of an operation. Of small ones some are measured and stand for the others.
	MeanMicroseconds float64 `json:"mean_us"`
	P50Microseconds  float64 `json:"p50_us"`
	P99Microseconds  float64 `json:"p99_us"`
}

// KcopydFallback tells how many pieces were read and written that might have been offloaded, and why.
type KcopydFallback struct {
	Reason string `json:"reason"` // no-method, absent, no-progress, alignment, layer, flags
	Count  uint64 `json:"count"`
}

// KcopydRoute tells of a method of offload between two devices.
type KcopydRoute struct {
	Source      string `json:"source"`
	Destination string `json:"destination"`
	Method      string `json:"method"`
	// Absent is why it is not used any more; empty: it is.
	Absent string `json:"absent,omitempty"`
	// ThresholdBytes is the size from which on it is faster than reading and writing; 0: no size is.
	ThresholdBytes int64 `json:"threshold_bytes"`
	Waiting        int   `json:"waiting"` // pieces
}

// Throttle tells what copies are limited to.
type Throttle struct {
	Classes []ThrottleClass `json:"classes"`
	// Yields counts pieces in the background that had to wait because clients were busy.
	Yields uint64 `json:"yields"`
}

// ThrottleClass is the limits of one class of copies.
type ThrottleClass struct {
	Class        string `json:"class"`         // cow, hydration, merge, bulk
	RateBytes    int64  `json:"rate_bytes"`    // a second; 0: no limit
	BurstBytes   int64  `json:"burst_bytes"`   // that may be saved up; 0: those of 100 ms
	SharePercent int    `json:"share_percent"` // of time in which something is copied; 0 or 100: no limit
	Waiting      int    `json:"waiting"`       // pieces that wait for the limit
	Waits        uint64 `json:"waits"`         // pieces that had to
}

// ThrottleRequest changes the limits of a class. What is nil stays as it is.
type ThrottleRequest struct {
	RateBytes    *int64 `json:"rate_bytes,omitempty"`
	BurstBytes   *int64 `json:"burst_bytes,omitempty"`
	SharePercent *int   `json:"share_percent,omitempty"`
}

// Version says who answers.
type Version struct {
	Version  string    `json:"version"`
	PID      int       `json:"pid"`
	StateDir string    `json:"state_dir"`
	Engine   string    `json:"engine"`
	Started  time.Time `json:"started"`
	// NBD are the addresses of the exports: unix:PATH or tcp:HOST:PORT.
	NBD []string `json:"nbd"`
	// LastEvent is the number of the newest event; 0: there was none.
	LastEvent uint64 `json:"last_event"`
}

// Types of an Event.
const (
	EventDeviceAttached     = "device-attached"
	EventDeviceDetached     = "device-detached"
	EventSnapshotTaken      = "snapshot-taken"
	EventSnapshotRemoved    = "snapshot-removed"
	EventSnapshotInvalid    = "snapshot-invalid"
	EventSnapshotReopened   = "snapshot-reopened" // after a start of the daemon
	EventSnapshotSpace      = "snapshot-space"    // a share of the store is taken; see Event.Percent
	EventSnapshotStalled    = "snapshot-stalled"  // there is no room, and writes wait for some
	EventSnapshotOverflow   = "snapshot-overflow" // writes to the snapshot fail from now on
	EventSnapshotResized    = "snapshot-resized"
	EventMergeStarted       = "merge-started"
	EventMergeStopped       = "merge-stopped"
	EventMergeFinished      = "merge-finished"
	EventMergeFailed        = "merge-failed"
	EventCloneHydrated      = "clone-hydrated"    // everything is, and the source is no longer used
	EventSourceDetached     = "source-detached"   // of a clone: it is closed; Event.Cause: not in good order
	EventCloneMode          = "clone-mode"        // it became read-only, or failed
	EventHydrationFailed    = "hydration-failed"  // a region could not be copied and was given up
	EventHydrationStopped   = "hydration-stopped" // with regions that were given up, or because too many were
	EventClientConnected    = "client-connected"
	EventClientDisconnected = "client-disconnected"
	// EventDeviceLost and EventSnapshotLost tell at a start of the daemon of what is not there any more.
	EventDeviceLost   = "device-lost"
	EventSnapshotLost = "snapshot-lost"
	// EventMissed stands for events that are no longer kept: the reader was too slow, or came too late. Its Seq is
	// that of the last one missed.
	EventMissed = "events-missed"
)

// Event is something that happened in the daemon. Events are numbered from 1 without gaps.
type Event struct {
	Seq    uint64    `json:"seq"`
	Time   time.Time `json:"time"`
	Type   string    `json:"type"`
	Name   string    `json:"name,omitempty"`   // of the device
	Client string    `json:"client,omitempty"` // client-connected and client-disconnected
	// Cause is why: of what was lost, became invalid or failed; of device-detached and snapshot-removed after an error.
	Cause   string `json:"cause,omitempty"`
	Percent int    `json:"percent,omitempty"` // snapshot-space: of the store
	Missed  uint64 `json:"missed,omitempty"`  // events-missed: how many
	// Persistent: what was lost should have been there.
	Persistent bool `json:"persistent,omitempty"`
}
