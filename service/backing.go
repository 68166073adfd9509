package service

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"cowherd/api"
	"cowherd/backend/file"
	"cowherd/backend/mem"
	"cowherd/backend/null"
	"cowherd/block"
	"cowherd/cowstore"
	"cowherd/internal/size"
)

// backing is a leaf device and what is to be done when it is closed.
type backing struct {
	leaf
	release func() // gives the file up in the registry; nil: there is none
}

// leaf is what every backend gives.
type leaf interface {
	block.Device
	io.Closer
}

// close closes the device and lets others open what it was on.
func (b *backing) close() error {
	err := b.leaf.Close()
	if b.release != nil {
		b.release()
	}
	return err
}

// fileID tells files apart whatever their names: a block device by its number, others by their inode.
type fileID struct {
	device, inode uint64
	isDevice      bool
}

func idOf(info os.FileInfo) fileID {
	stat := info.Sys().(*syscall.Stat_t)
	if stat.Mode&syscall.S_IFMT == syscall.S_IFBLK {
		return fileID{device: stat.Rdev, isDevice: true}
	}
	return fileID{device: stat.Dev, inode: stat.Ino}
}

// openDevice opens what an AttachRequest names, for name. It is none of a clone.
func (d *Daemon) openDevice(name string, r api.AttachRequest) (*backing, error) {
	kind, argument, special := strings.Cut(r.Device, ":")
	if special && (kind == "mem" || kind == "null") {
		if r.Direct {
			return nil, api.Errorf(syscall.EINVAL, "device %q: direct is for files and block devices", r.Device)
		}
		var made leaf
		var err error
		if kind == "mem" {
			made, err = openMem(argument)
		} else {
			made, err = openNull(argument)
		}
		if err != nil {
			return nil, fmt.Errorf("device %q: %w", r.Device, err)
		}
		return &backing{leaf: made}, nil
	}
	return d.openFile(name, r.Device, file.Options{ReadOnly: r.ReadOnly, Direct: r.Direct})
}

// openFile opens a file or a block device for user, who is named to others that want it.
func (d *Daemon) openFile(user, path string, o file.Options) (*backing, error) {
	id, err := identify(path)
	if err != nil {
		return nil, err
	}
	if err := d.names.hold(id, user, path); err != nil {
		return nil, err
	}
	release := func() { d.names.letGo(id) }
	opened, err := file.Open(path, o)
	if err != nil {
		release()
		return nil, fmt.Errorf("device: %w", err)
	}
	return &backing{leaf: opened, release: release}, nil
}

// openShared opens a file or a block device that is only read, and may be by several.
func (d *Daemon) openShared(path string) (*backing, error) {
	id, err := identify(path)
	if err != nil {
		return nil, err
	}
	if err := d.names.share(id, path); err != nil {
		return nil, err
	}
	opened, err := file.Open(path, file.Options{ReadOnly: true})
	if err != nil {
		d.names.unshare(id)
		return nil, fmt.Errorf("device: %w", err)
	}
	return &backing{leaf: opened, release: func() { d.names.unshare(id) }}, nil
}

// identify finds a file or a block device by its path.
func identify(path string) (id fileID, err error) {
	if !filepath.IsAbs(path) {
		return id, api.Errorf(syscall.EINVAL, "device %q: an absolute path, mem:SIZE or null:SIZE is wanted", path)
	}
	info, err := os.Stat(path)
	if err != nil {
		return id, fmt.Errorf("device: %w", err)
	}
	if t := info.Mode().Type(); t != 0 && t != os.ModeDevice {
		return id, api.Errorf(syscall.EINVAL, "device %s: neither a regular file nor a block device", path)
	}
	return idOf(info), nil
}

// openMem makes a device in memory of SIZE.
func openMem(argument string) (leaf, error) {
	n, err := size.Parse(argument)
	if err != nil {
		return nil, invalid(err)
	}
	return mem.New(mem.Config{Size: n})
}

// openNull makes a null device of SIZE[,latency=TIME][,block=SIZE][,memory].
func openNull(argument string) (leaf, error) {
	c, err := parseNull(argument)
	if err != nil {
		return nil, invalid(err)
	}
	return null.New(c)
}

// parseNull reads what stands behind null:.
func parseNull(argument string) (c null.Config, err error) {
	length, options, hasOptions := strings.Cut(argument, ",")
	if c.Size, err = size.Parse(length); err != nil || !hasOptions {
		return c, err
	}
	for option := range strings.SplitSeq(options, ",") {
		key, value, _ := strings.Cut(option, "=")
		switch {
		case key == "latency":
			c.Latency, err = time.ParseDuration(value)
		case key == "block":
			c.LogicalBlock, err = parseInt(value)
		case option == "memory":
			c.MemoryBacked = true
		default:
			err = fmt.Errorf("unknown option %q: latency=TIME, block=SIZE and memory are known", option)
		}
		if err != nil {
			return c, err
		}
	}
	return c, nil
}

// parseInt is a size that is not larger than any block.
func parseInt(s string) (int, error) {
	n, err := size.Parse(s)
	if err == nil && n > 1<<30 {
		err = fmt.Errorf("size %q is too large", s)
	}
	return int(n), err
}

// invalid is err as EINVAL, if it does not say otherwise.
func invalid(err error) error {
	if errno, ok := errors.AsType[syscall.Errno](err); ok && errno != 0 {
		return err
	}
	return &api.Error{Message: err.Error(), Errno: syscall.EINVAL}
}

// stripesMax bounds the files that a COW space is spread over.
const stripesMax = 8

// openTemp makes unlinked sparse files in dir, a few of them so that queues seldom meet in the lock of one inode.
func openTemp(dir string, length, chunk int64) (*backing, error) {
	stripe := cowstore.StripeBytes(cowstore.ChunkSize(chunk))
	made, err := file.TempStriped(dir, length, stripe, min(cowstore.Shards(), stripesMax))
	if errors.Is(err, syscall.EFBIG) {
		return nil, fmt.Errorf("%w (the file system takes no file of %s: set a limit)", err, size.Exact(length))
	}
	if err != nil {
		return nil, err
	}
	return &backing{leaf: made}, nil
}
