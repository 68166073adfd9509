package snapshot

import (
	"runtime"
	"sync/atomic"
	"testing"
	"unsafe"
)

// TestAdviseHuge advises memory whose huge page begins with memory that is free, while garbage is collected: no pointer
// to that may be seen.
func TestAdviseHuge(t *testing.T) {
	const pieceBytes, pieces = 64 << 10, 512
	var kept [][]byte
	for range pieces {
		p := make([]byte, pieceBytes)
		if uintptr(unsafe.Pointer(unsafe.SliceData(p)))%(2<<20) > 1<<20 {
			kept = append(kept, p)
		}
	}
	runtime.GC() // the others are free
	var over atomic.Bool
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for i := 0; !over.Load(); i++ {
			p := kept[i%len(kept)]
			adviseHuge(unsafe.Pointer(unsafe.SliceData(p)), uintptr(len(p)))
		}
	}()
	for range 200 {
		runtime.GC()
	}
	over.Store(true)
	<-ended
}
