package block

// CopyMethod is a way to fill a range of a device from another device without the data passing through this process.
type CopyMethod uint8

const (
	// CopyClone: source and destination share blocks until one of them is written (FICLONERANGE on XFS and btrfs).
	CopyClone CopyMethod = iota + 1
	// CopyDevice: the device moves the data by itself (the NVMe Copy command, opcode 19h).
	CopyDevice
	// CopyServer: the server of a file system moves the data (copy_file_range on NFS, CIFS, Ceph).
	CopyServer
)

// String is the method's name as it stands in status and counters.
func (m CopyMethod) String() string {
	switch m {
	case CopyClone:
		return "clone"
	case CopyDevice:
		return "device"
	case CopyServer:
		return "server"
	}
	return "unknown"
}

// A CopyOffer is one method as a source and a destination can use it.
type CopyOffer struct {
	Method CopyMethod
	// Granularity is the size in bytes, a power of two, of which both offsets and the length are multiples.
	Granularity int64
	// TailAtEnd: the length may be any where the range ends both the source and the destination.
	TailAtEnd bool
	// LengthMax is the most that one call copies, in bytes; at least Granularity.
	LengthMax int64
	// Concurrency is how many calls at a time the destination gains from; at least 1.
	Concurrency int
	// Lasting: what was copied so even once makes later writes to the source and the destination dearer, wherever they go.
	Lasting bool
}

// A Copier is a device that can be filled from another one by copy offload. It is an optional power of a Device, and of
// a leaf alone: what lies above a leaf is a Remapper, or data cannot be copied through it.
//
// Nothing about an offload is coherent by itself. The caller keeps the source as it is and the destination to itself
// until Copy has returned, and what was copied is durable after the destination's next flush, like any write.
type Copier interface {
	// CopyOffers are the methods by which this device can be filled from source, the best first; nil: there is none.
	// It is asked once for a pair, may open or ask devices, and promises nothing: Copy may still find that a method is
	// absent.
	CopyOffers(source Device) []CopyOffer
	// Copy copies length bytes of source at from to this device at to, by one call of the method. It blocks for as
	// long as that takes. It returns how many bytes from the start of the range were surely copied; less than length
	// without an error is a short copy, to be gone on with, and 0 without an error means that the method is of no use
	// for the beginning of this range, though it may be for others. ENOTSUP: the method is absent for this pair, and what was not copied is to be copied in another way. Every
	// other error is one of I/O (EIO, ENOSPC) and must surface; the range behind the bytes returned is then undefined.
	Copy(method CopyMethod, source Device, from, to, length int64) (int64, error)
}

// A Remapper is a layer that leaves data as it is and only changes where it lies: an optional power of a Device, by
// which an offload finds the leaves below. A layer that transforms data, or that must see each request, has it not.
type Remapper interface {
	// Remap tells where the bytes at offset lie: on which device, at which offset there, and how many bytes from there
	// on lie side by side, 1 to length. With ok the layer counts the caller as a request in flight on queue q, so that
	// the answer holds, until Release(q). Without ok (suspended, or not a matter of remapping) nothing is held and the
	// caller submits plain requests. It never blocks.
	Remap(q Queue, offset, length int64) (to Device, at, n int64, ok bool)
	// Release ends what one successful Remap began.
	Release(q Queue)
}
