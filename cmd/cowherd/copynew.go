package main

import (
	"errors"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"cowherd/backend/file"
	"cowherd/backend/nbd"
	"cowherd/transfer"
)

// cloneNew makes a new image that is a clone of another one, where that is all there is to be done. The general way is
// as safe, but opens and looks up much that a clone has no need of, which takes longer than the clone; above all it has
// to be told of signals, to remove what is incomplete. Here nothing incomplete has a name.
//
// Without done nothing has been made, and the general way does it, or says why it cannot be. An error is one of the
// flush; the image has been removed then.
func (c *copyCmd) cloneNew(s *session, o transfer.Options) (r copyReport, done bool, err error) {
	general := o.Method != transfer.Auto && o.Method != transfer.Clone || c.Allocated || c.Direct || c.Verify || c.Resume
	if general || s.Err() != nil || !isFileName(s, c.Source) || !isFileName(s, c.Destination) {
		return r, false, nil
	}
	if checkNew(c.Destination) != nil || exists(c.Destination) || exists(c.Destination+journalSuffix) {
		return r, false, nil
	}
	start := time.Now()
	var bar *progress
	last := int64(0)
	show := func(now, size int64) {
		if last == 0 {
			bar = c.newProgress(s, c.Destination, size)
		}
		bar.addBy(copyHow[transfer.Cloning], now-last)
		last = now
	}
	clone := file.CloneOptions{Shared: c.Shared, Flush: o.Flush, CloneMax: cloneMax}
	if !c.Quiet {
		clone.Progress = show
	}
	cloned, err := file.CloneFile(c.Source, c.Destination, clone)
	bar.end()
	if errors.Is(err, syscall.ENOTSUP) {
		return r, false, nil
	}
	return copyReport{
		Source: c.Source, Destination: c.Destination, Flushed: o.Flush, Changed: cloned.Changed,
		Result: transfer.Result{Size: cloned.Size, Clone: cloned.Size, Took: time.Since(start)},
	}, err == nil, err
}

// isFileName tells whether a name is that of a file: it is no export, and no daemon has to be asked for a device.
func isFileName(s *session, name string) bool {
	if name == "" || nbd.IsURI(name) {
		return false
	}
	return strings.ContainsRune(name, filepath.Separator) || !s.daemonThere()
}
