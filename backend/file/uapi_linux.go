package file

import "unsafe"

// nvmeCommand is struct nvme_passthru_cmd of linux/nvme_ioctl.h: a command for an NVMe controller. Its 32-bit words are
// those of the command's submission queue entry.
type nvmeCommand struct {
	opcode         uint8
	flags          uint8
	_              uint16
	nsid           uint32
	word2, word3   uint32
	metadata       uint64
	address        uint64 // of the data in this process
	metadataLength uint32
	dataLength     uint32
	word10, word11 uint32
	word12, word13 uint32
	word14, word15 uint32
	timeout        uint32 // milliseconds; 0: the kernel's own
	result         uint32
}

// nvmeRange is a source range of the Copy command, in descriptor format 0 (NVM Command Set Specification 1.0, 3.2.2.2).
// All is little-endian.
type nvmeRange struct {
	_           uint64
	firstBlock  uint64
	blocksLess1 uint16
	_           [3]uint16
	_           uint64 // tags of protection information
}

// Ioctls of NVMe block devices: _IO('N', 0x40), and _IOWR('N', 0x41 and 0x43, struct nvme_passthru_cmd).
const (
	nvmeIoctlID    = 0x4e40
	nvmeIoctlAdmin = 0xc0484e41
	nvmeIoctlIO    = 0xc0484e43
)

// The sizes are part of the ABI; the latter also of the ioctls' numbers.
var (
	_ [72]byte = [unsafe.Sizeof(nvmeCommand{})]byte{}
	_ [48]byte = [unsafe.Offsetof(nvmeCommand{}.word12)]byte{}
	_ [32]byte = [unsafe.Sizeof(nvmeRange{})]byte{}
	_ [16]byte = [unsafe.Offsetof(nvmeRange{}.blocksLess1)]byte{}
)
