package offload

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"cowherd/backend/devicetest"
	"cowherd/backend/file"
	"cowherd/block"
)

// offered are the methods by which to can be filled from from.
func offered(to block.Copier, from block.Device) (list []block.CopyMethod) {
	for _, o := range to.CopyOffers(from) {
		list = append(list, o.Method)
	}
	return list
}

var clone = []block.CopyMethod{block.CopyClone}

// scribble fills d with bytes from a seed, durably, and returns them.
func scribble(t testing.TB, d block.Device, seed byte) []byte {
	t.Helper()
	p := make([]byte, d.Size())
	_, _ = rand.NewChaCha8([32]byte{seed}).Read(p)
	if err := block.Write(d, p, 0); err != nil {
		t.Fatal(err)
	}
	if err := block.Flush(d); err != nil {
		t.Fatal(err)
	}
	return p
}

// holds checks what d holds from offset.
func holds(t testing.TB, d block.Device, offset int64, want []byte) {
	t.Helper()
	p := make([]byte, len(want))
	if err := block.Read(d, p, offset); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(p, want) {
		t.Errorf("%d bytes at %d are not what they should be", len(want), offset)
	}
}

// cloned clones a whole range, in as many calls as the offer wants.
func cloned(t testing.TB, to, from *file.Device, target, source, length int64) {
	t.Helper()
	for length > 0 {
		n, err := to.Copy(block.CopyClone, from, source, target, min(length, to.CopyOffers(from)[0].LengthMax))
		if err != nil || n == 0 {
			t.Fatalf("clone of %d bytes from %d to %d: %d, %v", length, source, target, n, err)
		}
		source, target, length = source+n, target+n, length-n
	}
}

// TestOffers: what is offered between files of one file system and of two.
func TestOffers(t *testing.T) {
	var disks []*disk
	var files []*file.Device
	for _, kind := range fileSystems {
		for range 2 { // two of each, since one kind is not one file system
			disks = append(disks, mounted(t, kind, diskSize))
		}
	}
	for i, d := range disks {
		files = append(files, d.create("a", mib, file.Options{}), d.create("b", mib, file.Options{Direct: d.kind.mkfs != nil && i%2 == 1}))
	}
	for i, to := range files {
		for j, from := range files {
			var want []block.CopyMethod
			if i/2 == j/2 && disks[i/2].kind.shares {
				want = clone
			}
			if got := offered(to, from); !slices.Equal(got, want) {
				t.Errorf("from %s to %s: %v, want %v", disks[j/2].kind.name, disks[i/2].kind.name, got, want)
			}
			if want != nil {
				continue
			}
			// One that was not offered is absent, and nothing is changed.
			for _, method := range []block.CopyMethod{block.CopyClone, block.CopyServer, block.CopyDevice} {
				if n, err := to.Copy(method, from, 0, 0, 64*kib); n != 0 || block.Errno(err) != unix.ENOTSUP {
					t.Errorf("%s from %s to %s: %d, %v", method, disks[j/2].kind.name, disks[i/2].kind.name, n, err)
				}
			}
		}
	}
}

// TestClone: a clone takes no room, has what the source has, and each can be written without the other.
func TestClone(t *testing.T) {
	const size = 32*mib + 1000
	for _, kind := range sharing {
		for _, direct := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/direct=%v", kind.name, direct), func(t *testing.T) {
				d := mounted(t, kind, diskSize)
				size := int64(size)
				if direct {
					size &^= 4095
				}
				from := d.create("from", size, file.Options{Direct: direct})
				to := d.create("to", size, file.Options{Direct: direct})
				want := scribble(t, from, 1)
				before := d.used()
				cloned(t, to, from, 0, 0, size)
				if err := block.Flush(to); err != nil {
					t.Fatal(err)
				}
				if grown := d.used() - before; grown > 4*mib {
					t.Errorf("the clone takes %d bytes", grown)
				}
				holds(t, to, 0, want)
				kept := bytes.Clone(want)
				scribble(t, to, 2)
				holds(t, from, 0, kept)
				cloned(t, to, from, 0, 0, size)
				scribble(t, from, 3)
				holds(t, to, 0, kept)
			})
		}
	}
}

// TestRefused: ranges that the file system would refuse are no progress and no error, and others go on.
func TestRefused(t *testing.T) {
	const size = 1*mib + 1000
	for _, kind := range sharing {
		t.Run(kind.name, func(t *testing.T) {
			d := mounted(t, kind, diskSize)
			from, to := d.create("from", size, file.Options{}), d.create("to", size, file.Options{})
			source, want := scribble(t, from, 1), scribble(t, to, 2)
			unit := to.CopyOffers(from)[0].Granularity
			for _, c := range []struct{ from, to, length int64 }{
				{512, 0, unit}, {0, 512, unit}, {0, 0, 512}, {0, 0, unit + 512}, {mib, 0, 1000}, {0, mib, 1000},
			} {
				if n, err := to.Copy(block.CopyClone, from, c.from, c.to, c.length); n != 0 || err != nil {
					t.Errorf("%+v: %d, %v", c, n, err)
				}
			}
			holds(t, to, 0, want)
			cloned(t, to, from, mib-unit, mib-unit, unit+1000) // the tail of both
			holds(t, to, mib-unit, source[mib-unit:])
			for _, c := range []struct{ from, to, length int64 }{{0, 4, 8}, {4, 0, 8}, {0, 0, 8}} {
				n, err := from.Copy(block.CopyClone, from, c.from*unit, c.to*unit, c.length*unit)
				if n != 0 || err != nil {
					t.Errorf("%+v within a file: %d, %v", c, n, err)
				}
			}
			holds(t, from, 0, source)
			cloned(t, from, from, 64*unit, 0, 64*unit)
			holds(t, from, 64*unit, source[:64*unit])
		})
	}
}

// TestHoles: a hole of the source is a hole of the destination, whatever was there.
func TestHoles(t *testing.T) {
	for _, kind := range sharing {
		t.Run(kind.name, func(t *testing.T) {
			d := mounted(t, kind, diskSize)
			from, to := d.create("from", 16*mib, file.Options{}), d.create("to", 16*mib, file.Options{})
			data := scribble(t, to, 1)
			for _, at := range []int64{2 * mib, 7 * mib, 15 * mib} {
				if err := block.Write(from, data[:mib], at); err != nil {
					t.Fatal(err)
				}
			}
			cloned(t, to, from, 0, 0, 16*mib)
			want := devicetest.Extents(t, from, 0, 16*mib)
			if got := devicetest.Extents(t, to, 0, 16*mib); !slices.Equal(got, want) || len(want) != 6 {
				t.Errorf("extents %v, the source's are %v", got, want)
			}
			if info, err := os.Stat(to.Path()); err != nil || info.Sys().(*syscall.Stat_t).Blocks*512 > 4*mib {
				t.Errorf("the destination takes %+v, %v", info.Sys(), err)
			}
		})
	}
}

// TestGigabytes: more than an int32 counts, of a sparse file with data here and there.
func TestGigabytes(t *testing.T) {
	const size = 5 * gib
	for _, kind := range sharing {
		t.Run(kind.name, func(t *testing.T) {
			d := mounted(t, kind, diskSize)
			from, to := d.create("from", size, file.Options{}), d.create("to", size, file.Options{})
			data := make([]byte, mib)
			_, _ = rand.NewChaCha8([32]byte{1}).Read(data)
			places := []int64{0, 2*gib - mib/2, 4*gib - 4096, size - mib}
			for _, at := range places {
				if err := block.Write(from, data, at); err != nil {
					t.Fatal(err)
				}
			}
			cloned(t, to, from, 0, 0, size)
			for _, at := range places {
				holds(t, to, at, data)
			}
			if got, want := devicetest.Extents(t, to, 0, size), devicetest.Extents(t, from, 0, size); !slices.Equal(got, want) {
				t.Errorf("extents %v, the source's are %v", got, want)
			}
		})
	}
}
