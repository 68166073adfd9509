package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"cowherd/backend/file"
	"cowherd/block"
	"cowherd/cowstore"
	"cowherd/dm"
	"cowherd/kcopyd"
	"cowherd/target/snapshot"
)

// trip is an origin and a persistent snapshot of it in two files, with what both should hold.
type trip struct {
	originPath, cowPath string
	origin, view        []byte
}

// newTrip takes a snapshot, writes to it and to its origin, and lets go of both.
func newTrip(t *testing.T, rnd *rand.Rand, size int64, chunkSize cowstore.ChunkSize) *trip {
	t.Helper()
	dir := t.TempDir()
	x := &trip{originPath: filepath.Join(dir, "origin.img"), cowPath: filepath.Join(dir, "cow.img"), origin: make([]byte, size)}
	for at := range x.origin {
		if at>>13&3 != 0 { // a quarter is zeroes
			x.origin[at] = byte(rnd.Uint32())
		}
	}
	x.view = bytes.Clone(x.origin)
	if err := os.WriteFile(x.originPath, x.origin, 0o600); err != nil {
		t.Fatal(err)
	}
	leaf, err := file.Open(x.originPath, file.Options{})
	if err != nil {
		t.Fatal(err)
	}
	cow, err := file.Create(x.cowPath, 2*size+4*int64(chunkSize)+512, file.Options{})
	if err != nil {
		t.Fatal(err)
	}
	store, err := cowstore.CreatePersistent(cow, chunkSize, cowstore.PersistentConfig{})
	if err != nil {
		t.Fatal(err)
	}
	engine := kcopyd.NewScaled(kcopyd.Config{})
	origin := snapshot.NewOrigin(leaf)
	s, err := snapshot.New(snapshot.Config{Name: "trip", Origin: origin, COW: cow, Store: store, Engine: engine})
	if err != nil {
		t.Fatal(err)
	}
	if err := origin.Add(s); err != nil {
		t.Fatal(err)
	}
	live, frozen := dm.NewDevice("vm", origin, false), dm.NewDevice("vm@trip", s, false)
	for range 60 {
		offset := rnd.Int64N(size)
		p := bytes.Repeat([]byte{byte(rnd.IntN(3))}, int(1+rnd.Int64N(min(size-offset, 40000))))
		d, model := live, x.origin
		if rnd.IntN(2) == 0 {
			d, model = frozen, x.view
		}
		if err := block.Write(d, p, offset); err != nil {
			t.Fatal(err)
		}
		copy(model[offset:], p)
	}
	for _, err := range []error{
		block.Flush(live), block.Flush(frozen), live.Close(t.Context()), frozen.Close(t.Context()), engine.Close(), s.Close(),
		leaf.Close(), cow.Close(),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	return x
}

// TestRoundTrip: what cowherd has written is found again by the tools, whatever the sizes.
func TestRoundTrip(t *testing.T) {
	for seed := range uint64(12) {
		rnd := rand.New(rand.NewPCG(seed, 3))
		size := int64(300<<10) + []int64{0, 512, 4096, 777}[seed%4] // the last chunk is whole or not
		chunkSize := cowstore.ChunkSize(4096 << rnd.IntN(4))
		t.Run(fmt.Sprintf("seed=%d/chunk=%d/size=%d", seed, chunkSize, size), func(t *testing.T) {
			x := newTrip(t, rnd, size, chunkSize)
			if origin, err := os.ReadFile(x.originPath); err != nil || !bytes.Equal(origin, x.origin) {
				t.Fatalf("the origin is not what was written to it: %v", err)
			}
			cowherd(t, "cow", "check", x.cowPath, "--origin", x.originPath).want(t, exitOK, "", "")
			out := filepath.Join(t.TempDir(), "out.img")
			cowherd(t, "cow", "export", "--origin", x.originPath, x.cowPath, out).want(t, exitOK, "", "")
			want := sha256.Sum256(x.view)
			if sumOf(t, out) != hex.EncodeToString(want[:]) {
				t.Fatal("the view is not what was frozen and written")
			}
			report := decode[diffReport](t, cowherd(t, "cow", "diff", "--origin", x.originPath, x.cowPath))
			patched := bytes.Clone(x.origin)
			for _, r := range report.Ranges {
				copy(patched[r.Offset:r.Offset+r.Length], x.view[r.Offset:])
			}
			if !bytes.Equal(patched, x.view) {
				t.Error("with these ranges the origin is not the view")
			}
			cowherd(t, "cow", "merge", "--origin", x.originPath, x.cowPath).want(t, exitOK, "merged into", "")
			if sumOf(t, x.originPath) != hex.EncodeToString(want[:]) {
				t.Error("the merged origin is not the view")
			}
			cowherd(t, "cow", "check", x.cowPath).want(t, exitOK, "", "")
		})
	}
}
