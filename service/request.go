package service

import (
	"math"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"cowherd/api"
	"cowherd/target/snapshot"
)

// normalize fills in what a request leaves open, and refuses what contradicts itself.
func (d *Daemon) normalize(r *api.SnapshotRequest) error {
	r.Persistent = r.Persistent || r.Reopen
	if r.ChunkBytes == 0 && !r.Reopen {
		r.ChunkBytes = chunkDefault
	}
	if r.OnFull == "" {
		r.OnFull = api.OnFullInvalidate
	}
	if _, err := onFull(r.OnFull); err != nil {
		return err
	}
	if r.StallMaxMicroseconds == 0 {
		r.StallMaxMicroseconds = stallDefault.Microseconds()
	}
	if most := math.MaxInt64 / int64(time.Microsecond); r.StallMaxMicroseconds < 0 || r.StallMaxMicroseconds > most {
		return api.Errorf(syscall.EINVAL, "a wait of at most %d microseconds is not between 1 and %d", r.StallMaxMicroseconds,
			most)
	}
	for _, percent := range r.WarnAt {
		if percent < 1 || percent > 100 {
			return api.Errorf(syscall.EINVAL, "a warning at %d%%: a share of the store from 1%% to 100%% is wanted", percent)
		}
	}
	if r.Persistent {
		return d.normalizeStore(r)
	}
	if r.Overwrite {
		return api.Errorf(syscall.EINVAL, "overwriting is for persistent stores: what others are on is lost anyway")
	}
	if r.Store == "" {
		r.Store = storeTemp
	}
	return nil
}

// onFull is what a word of SnapshotRequest.OnFull stands for.
func onFull(word string) (snapshot.OnFull, error) {
	switch word {
	case api.OnFullInvalidate:
		return snapshot.FullInvalidate, nil
	case api.OnFullGrow:
		return snapshot.FullGrow, nil
	case api.OnFullThrottle:
		return snapshot.FullThrottle, nil
	case api.OnFullOverflow:
		return snapshot.FullOverflow, nil
	}
	return 0, api.Errorf(syscall.EINVAL, "a full store: %q is not one of %s, %s, %s, %s", word, api.OnFullInvalidate,
		api.OnFullGrow, api.OnFullThrottle, api.OnFullOverflow)
}

// normalizeStore makes the store of a request for a persistent snapshot the path of a file or a block device.
func (d *Daemon) normalizeStore(r *api.SnapshotRequest) error {
	switch {
	case r.Store == storeTemp || r.Store == storeMem:
		return api.Errorf(syscall.EINVAL, "a persistent store is in a file or on a block device, not in %q", r.Store)
	case r.Reopen && r.Overwrite:
		return api.Errorf(syscall.EINVAL, "a store is either opened again or overwritten")
	case r.Store == "":
		r.Store = d.state.path
	case !filepath.IsAbs(r.Store):
		return api.Errorf(syscall.EINVAL, "store %q: an absolute path is wanted", r.Store)
	}
	if info, err := os.Stat(r.Store); err == nil && info.IsDir() {
		r.Store = filepath.Join(r.Store, r.Name+storeSuffix)
	}
	return nil
}
