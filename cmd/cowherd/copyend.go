package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"cowherd/api"
	"cowherd/backend/file"
	"cowherd/backend/nbd"
	"cowherd/block"
	"cowherd/transfer"
)

// copyEnd is a source or a destination.
type copyEnd struct {
	name     string // as it was given
	path     string // of a file or block device, symbolic links followed; "": it is an export
	uri      nbd.Config
	identity transfer.Identity
	device   block.Device // nil: not open yet
	close    func() error
}

// Kinds of ends.
const (
	kindFile   = "file"
	kindDevice = "device"
	kindNBD    = "nbd"
)

// findEnd finds out what an argument of the command means. A path that leads nowhere is a file that may be made.
func (c *copyCmd) findEnd(ctx context.Context, s *session, name string, destination bool) (*copyEnd, error) {
	e := &copyEnd{name: name}
	if name == "" {
		return nil, usagef("the name of the source or of the destination is empty")
	}
	if nbd.IsURI(name) {
		return e, e.setURI(name)
	}
	stat, err := os.Stat(name)
	if live, found := findLive(ctx, s, name); found {
		switch {
		case err == nil:
			return nil, fmt.Errorf("%s is a file and a live device: write .%c%s for the file, or the URI for the device",
				name, filepath.Separator, name)
		case destination && !c.Force:
			return nil, fmt.Errorf("%s is a live device: --force overwrites it; .%c%s is a file: %w", name, filepath.Separator, name,
				syscall.EEXIST)
		case live.Kind == "" && live.SizeBytes == 0:
			return nil, fmt.Errorf("%s is a mapped device without a live table", name)
		case len(live.URIs) == 0:
			return nil, fmt.Errorf("%s is a live device that the daemon does not export", name)
		}
		err = e.setURI(live.URIs[0])
		if live.Snapshot != nil {
			e.identity.Taken = live.Since.UnixNano() // a later snapshot of the same name is another one
		}
		return e, err
	}
	if err != nil {
		if !destination || !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
		e.path, e.identity.Kind = name, kindFile
		return e, checkNew(name)
	}
	switch {
	case stat.IsDir():
		return nil, fmt.Errorf("%s is a directory: name the file in it: %w", name, syscall.EISDIR)
	case stat.Mode().IsRegular():
		e.identity.Kind = kindFile
	case stat.Mode()&os.ModeDevice != 0 && stat.Mode()&os.ModeCharDevice == 0:
		e.identity.Kind = kindDevice
	default:
		return nil, fmt.Errorf("%s is neither a regular file nor a block device: %w", name, syscall.EINVAL)
	}
	e.path, err = filepath.EvalSymlinks(name)
	return e, err
}

// checkNew refuses to make an image where only devices are: a name there that leads nowhere is a device that is not, and
// an image would fill the memory.
func checkNew(name string) error {
	path, err := filepath.Abs(name)
	if err != nil {
		return err
	}
	if strings.HasPrefix(path, "/dev/") && !strings.HasPrefix(path, "/dev/shm/") {
		return fmt.Errorf("%s: there is no such device: %w", name, syscall.ENODEV)
	}
	return nil
}

// setURI makes e an export.
func (e *copyEnd) setURI(uri string) (err error) {
	e.uri, err = nbd.ParseURI(uri)
	e.identity = transfer.Identity{Kind: kindNBD, Name: uri}
	return err
}

// findLive asks the daemon, if there is one, for a device of that name. A name with a slash in it is a path.
func findLive(ctx context.Context, s *session, name string) (device api.Device, found bool) {
	if strings.ContainsRune(name, filepath.Separator) {
		return device, false
	}
	client := s.clientIfThere()
	if client == nil {
		return device, false
	}
	defer client.Close()
	device, err := liveDevice(ctx, client, name)
	return device, err == nil
}

// openSource opens what is copied.
func (c *copyCmd) openSource(ctx context.Context, e *copyEnd) error {
	if e.path == "" {
		return c.openExport(ctx, e)
	}
	if e.identity.Kind == kindFile && !c.Shared {
		if err := checkWriters(e.path); err != nil {
			return err
		}
	}
	d, err := file.Open(e.path, file.Options{ReadOnly: true, Direct: c.Direct, Shared: c.Shared})
	if err != nil {
		if errors.Is(err, syscall.EBUSY) {
			err = fmt.Errorf("%w; --shared reads it all the same", err)
		}
		return err
	}
	e.device, e.close = d, d.Close
	if e.identity, err = identify(e.identity.Kind, e.path, d.Size()); err != nil {
		return errors.Join(err, d.Close())
	}
	return nil
}

// checkWriters refuses a file that qemu has open for writing.
func checkWriters(path string) error {
	writes, err := file.QemuWrites(path)
	if err == nil && writes {
		err = fmt.Errorf("open %s: another program writes to it; --shared reads it all the same: %w", path, syscall.EBUSY)
	}
	return err
}

// connectionsDefaultMax bounds the connections that nobody has asked for. More than there are CPUs made servers slower.
const connectionsDefaultMax = 8

// openExport connects to an export.
func (c *copyCmd) openExport(ctx context.Context, e *copyEnd) error {
	if c.Connections > 0 {
		e.uri.Connections = c.Connections
	}
	if e.uri.Connections == 0 { // the URI does not say either
		e.uri.Connections = min(runtime.GOMAXPROCS(0), connectionsDefaultMax)
	}
	d, err := nbd.Open(ctx, e.uri)
	if err != nil {
		return err
	}
	e.device, e.close = d, d.Close
	e.identity.Size = d.Size()
	return nil
}

// identify is what a file or block device is known by.
func identify(kind, path string, size int64) (transfer.Identity, error) {
	i := transfer.Identity{Kind: kind, Size: size}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return i, fmt.Errorf("stat %s: %w", path, err)
	}
	name, err := filepath.Abs(path)
	i.Name = name
	if kind == kindDevice {
		i.Device = st.Rdev
		return i, err
	}
	i.Device, i.Inode, i.Modified = st.Dev, st.Ino, st.Mtim.Nano()
	return i, err
}

// changed tells whether a source that is a file has been written since it was opened.
func (e *copyEnd) changed() bool {
	if e.identity.Kind != kindFile {
		return false
	}
	now, err := identify(kindFile, e.path, e.identity.Size)
	return err != nil || now != e.identity
}

// same tells whether two ends lead to the same bytes, as far as that can be seen.
func same(a, b *copyEnd) (bool, error) {
	if a.path == "" || b.path == "" {
		return a.path == b.path && a.uri.Network == b.uri.Network && a.uri.Address == b.uri.Address && a.uri.Export == b.uri.Export, nil
	}
	for _, x := range []struct{ upper, lower string }{{a.path, b.path}, {b.path, a.path}} {
		lower, err := os.Stat(x.lower)
		if errors.Is(err, os.ErrNotExist) {
			return false, nil
		}
		if err != nil {
			return false, err
		}
		for _, path := range standsOn(x.upper) {
			if upper, err := os.Stat(path); err == nil && (os.SameFile(upper, lower) || sameDevice(upper, lower)) {
				return true, nil
			}
		}
	}
	return false, nil
}

// sameDevice tells whether two files are one block device, by whatever names.
func sameDevice(a, b os.FileInfo) bool {
	x, ok := a.Sys().(*syscall.Stat_t)
	y, also := b.Sys().(*syscall.Stat_t)
	return ok && also && a.Mode().Type() == os.ModeDevice && b.Mode().Type() == os.ModeDevice && x.Rdev == y.Rdev
}

// standsOn lists the path itself, and for a block device the disk that it is a partition of and the file behind it if
// that is a loop device.
func standsOn(path string) []string {
	list := []string{path}
	var st unix.Stat_t
	if unix.Stat(path, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return list
	}
	dir, err := filepath.EvalSymlinks(fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev)))
	if err != nil {
		return list
	}
	if _, err := os.Stat(filepath.Join(dir, "partition")); err == nil {
		dir = filepath.Dir(dir)
		list = append(list, filepath.Join("/dev", filepath.Base(dir)))
	}
	if backing, err := os.ReadFile(filepath.Join(dir, "loop", "backing_file")); err == nil {
		list = append(list, strings.TrimSuffix(string(backing), "\n"))
	}
	return list
}

// mode is the permissions of a new image: those of the source, without the right to execute it.
func (e *copyEnd) mode() os.FileMode {
	if stat, err := os.Stat(e.path); err == nil && e.identity.Kind == kindFile {
		return stat.Mode().Perm() &^ 0o111
	}
	return 0o600
}
