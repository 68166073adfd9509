package bench

import "unsafe"

// fiemap is struct fiemap of linux/fiemap.h, without the extents: with room for none, the kernel only counts them.
type fiemap struct {
	start, length uint64 // bytes
	flags         uint32
	mapped        uint32 // extents there are
	room          uint32 // for extents
	_             uint32
}

const (
	fiemapIoctl = 0xc020660b // _IOWR('f', 11, struct fiemap)
	fiemapSync  = 1          // write data back first
)

var _ [32]byte = [unsafe.Sizeof(fiemap{})]byte{}
