package offload

import (
	"bytes"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"cowherd/backend/devicetest"
	"cowherd/backend/file"
	"cowherd/block"
	"cowherd/kcopyd"
)

// engines are both, with what they are asked in these tests: to offload whatever can be.
func engines(t *testing.T, test func(t *testing.T, e kcopyd.Engine)) {
	config := kcopyd.Config{OffloadFloor: 4 * kib, OffloadThreshold: 4 * kib}
	for name, e := range map[string]kcopyd.Engine{"scaled": kcopyd.NewScaled(config), "serialised": kcopyd.NewSerialised(config)} {
		t.Run(name, func(t *testing.T) { test(t, e) })
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestEngineMethods: what the engine copies by, on each file system, and what it cannot do.
func TestEngineMethods(t *testing.T) {
	const size = 4*mib + 1000
	for _, kind := range fileSystems {
		t.Run(kind.name, func(t *testing.T) {
			d := mounted(t, kind, diskSize)
			engines(t, func(t *testing.T, e kcopyd.Engine) {
				from, to := d.create("from", size, file.Options{}), d.create("to", size, file.Options{})
				defer d.remove(from, to)
				want := scribble(t, from, 1)
				if err := run(e, kcopyd.OffloadAuto, to, from, 0, 0, size); err != nil {
					t.Fatal(err)
				}
				holds(t, to, 0, want)
				clones, rest := bytesBy(e, "clone"), bytesBy(e, "readwrite")
				if kind.shares && (clones != size || rest != 0) || !kind.shares && (clones != 0 || rest != size) {
					t.Errorf("auto: cloned %d bytes, read and wrote %d", clones, rest)
				}
				if err := run(e, kcopyd.OffloadOff, to, from, 0, 0, size); err != nil || bytesBy(e, "clone") != clones {
					t.Errorf("off: cloned %d bytes more, %v", bytesBy(e, "clone")-clones, err)
				}
				holds(t, to, 0, want)
				for _, policy := range []kcopyd.Offload{kcopyd.OffloadOnly, kcopyd.CloneOnly} {
					err := run(e, policy, to, from, 0, 0, size)
					if kind.shares && err != nil || !kind.shares && block.Errno(err) != unix.ENOTSUP {
						t.Errorf("policy %d: %v", policy, err)
					}
					if err := run(e, policy, to, from, 512, 0, mib); block.Errno(err) != unix.ENOTSUP {
						t.Errorf("policy %d, unaligned: %v", policy, err)
					}
				}
				holds(t, to, 0, want)
			})
		})
	}
}

// TestEngineGigabytes: one job of more than an int32 counts; holes stay holes.
func TestEngineGigabytes(t *testing.T) {
	const size = 5*gib + 1000
	for _, kind := range sharing {
		t.Run(kind.name, func(t *testing.T) {
			d := mounted(t, kind, diskSize)
			engines(t, func(t *testing.T, e kcopyd.Engine) {
				from, to := d.create("from", size, file.Options{}), d.create("to", size, file.Options{})
				defer d.remove(from, to)
				data := make([]byte, mib)
				_, _ = rand.NewChaCha8([32]byte{1}).Read(data)
				places := []int64{0, 2*gib - mib/2, 4*gib - 4096, size - mib}
				for _, at := range places {
					if err := block.Write(from, data, at); err != nil {
						t.Fatal(err)
					}
				}
				if err := run(e, kcopyd.CloneOnly, to, from, 0, 0, size); err != nil {
					t.Fatal(err)
				}
				for _, at := range places {
					holds(t, to, at, data)
				}
				got, want := devicetest.Extents(t, to, 0, size), devicetest.Extents(t, from, 0, size)
				if !slices.Equal(got, want) {
					t.Errorf("extents %v, the source's are %v", got, want)
				}
			})
		})
	}
}

// TestEngineFull: a disk without room is an error of the job that names the file, and harms neither.
func TestEngineFull(t *testing.T) {
	const size = 64 * mib
	for _, kind := range []fileSystem{xfs, btrfsMixed} {
		t.Run(kind.name, func(t *testing.T) {
			d := mounted(t, kind, 320*mib)
			engines(t, func(t *testing.T, e kcopyd.Engine) {
				from, to := d.create("from", size, file.Options{}), d.create("to", size, file.Options{})
				defer d.remove(from, to)
				source, want := scribble(t, from, 1), make([]byte, size)
				free := d.fill()
				failed := 0
				for _, at := range rand.New(rand.NewPCG(3, 4)).Perm(size / (8 * kib)) {
					at := int64(at) * 8 * kib
					err := run(e, kcopyd.OffloadAuto, to, from, at, at, 4*kib)
					if err == nil {
						copy(want[at:at+4*kib], source[at:])
						continue
					}
					if block.Errno(err) != unix.ENOSPC || !strings.Contains(err.Error(), to.Path()) {
						t.Fatal(err)
					}
					if failed++; failed == 2 {
						break
					}
				}
				if failed == 0 {
					t.Error("there is room for everything")
				}
				holds(t, to, 0, want)
				holds(t, from, 0, source)
				free()
				if err := run(e, kcopyd.OffloadAuto, to, from, 0, 0, size); err != nil {
					t.Fatal(err)
				}
				holds(t, to, 0, source)
			})
		})
	}
}

// TestEngineStriped: the engine finds the files of a striped device, and clones to each.
func TestEngineStriped(t *testing.T) {
	d := mounted(t, xfs, diskSize)
	engines(t, func(t *testing.T, e kcopyd.Engine) {
		from := d.create("from", 4*mib, file.Options{})
		defer d.remove(from)
		want := scribble(t, from, 1)
		striped, err := file.TempStriped(d.dir, 4*mib, 256*kib, 4)
		if err != nil {
			t.Fatal(err)
		}
		if err := run(e, kcopyd.CloneOnly, striped, from, 0, 0, 4*mib); err != nil {
			t.Error(err)
		}
		got := make([]byte, 4*mib)
		if err := block.Read(striped, got, 0); err != nil || !bytes.Equal(got, want) {
			t.Errorf("the striped device holds something else, %v", err)
		}
		clear(got)
		if err := block.Write(from, got, 0); err != nil {
			t.Fatal(err)
		}
		if err := run(e, kcopyd.CloneOnly, from, striped, 0, 0, 4*mib); err != nil {
			t.Error(err)
		}
		holds(t, from, 0, want)
		if err := striped.Close(); err != nil {
			t.Error(err)
		}
	})
}
