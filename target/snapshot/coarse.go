package snapshot

import "sync"

// coarse is one lock for all exceptions of a snapshot, as the kernel's dm-snapshot had it before 2019: every write to the
// origin takes it to look its chunk up, and to make it pending; every copy that ends takes it to publish its exception;
// every request to the snapshot takes it to be mapped. It is there to be compared with (Config.OneLock), and nothing needs
// it: the slots of the table are atomic. The zero value is no lock at all.
//
// It is held neither while room is allocated, nor while a copy is submitted or anybody is woken.
type coarse struct{ mu *sync.Mutex }

// +checklocksignore
func (c coarse) lock() {
	if c.mu != nil {
		c.mu.Lock()
	}
}

// +checklocksignore
func (c coarse) unlock() {
	if c.mu != nil {
		c.mu.Unlock()
	}
}
