package file

import (
	"bytes"
	"testing"

	"cowherd/backend/devicetest"
	"cowherd/block"
)

func openStriped(t *testing.T, size, stripe int64, count int) *Striped {
	t.Helper()
	s, err := TempStriped(t.TempDir(), size, stripe, count)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func TestStripedModel(t *testing.T) {
	for _, count := range []int{1, 2, 8} {
		devicetest.Model(t, openStriped(t, 1<<20+4096+512, 64<<10, count), 200)
	}
}

// TestStripedSpreads: neighbouring stripes lie in different files, and what is written to one does not show in another.
func TestStripedSpreads(t *testing.T) {
	const stripe, count = 4096, 4
	s := openStriped(t, 64*stripe, stripe, count)
	for i := range int64(64) {
		if err := block.Write(s, bytes.Repeat([]byte{byte(i + 1)}, stripe), i*stripe); err != nil {
			t.Fatal(err)
		}
	}
	for i := range int64(64) {
		p := make([]byte, stripe)
		if err := block.Read(s.files[i%count], p, i/count*stripe); err != nil {
			t.Fatal(err)
		}
		if p[0] != byte(i+1) || p[stripe-1] != byte(i+1) {
			t.Errorf("stripe %d is not where it should be", i)
		}
	}
	whole := make([]byte, 64*stripe)
	if err := block.Read(s, whole, 0); err != nil {
		t.Fatal(err)
	}
	for i, b := range whole {
		if b != byte(i/stripe+1) {
			t.Fatalf("byte %d reads as %d", i, b)
		}
	}
	if err := block.Flush(s); err != nil {
		t.Error(err)
	}
}

func TestStripedRefuses(t *testing.T) {
	for _, c := range []struct {
		stripe int64
		count  int
	}{{4095, 2}, {4096, 3}, {0, 2}, {4096, 0}} {
		if s, err := TempStriped(t.TempDir(), 1<<20, c.stripe, c.count); err == nil {
			t.Errorf("stripe %d, %d files: no error", c.stripe, c.count)
			_ = s.Close()
		}
	}
}
