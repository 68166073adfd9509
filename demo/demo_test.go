package demo

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"hash/maphash"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"cowherd/block"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// tiny is a demo that is over soon, in a directory that must be empty afterwards.
func tiny(t *testing.T) Config {
	t.Helper()
	dir, err := os.MkdirTemp("", "demo") // t.TempDir may be too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		left, err := os.ReadDir(dir)
		if err != nil || len(left) > 0 {
			t.Errorf("left behind: %v (%v)", left, err)
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return Config{Dir: dir, Size: 2 << 20, Connections: 2, Depth: 4, Pace: 5 * time.Millisecond, Repetitions: 2}
}

func TestRun(t *testing.T) {
	for _, live := range []bool{false, true} {
		var out bytes.Buffer
		c := tiny(t)
		c.Out, c.Live = &out, live
		report, err := Run(context.Background(), c)
		if err != nil {
			t.Fatal(err)
		}
		checkReport(t, report)
		if strings.Contains(out.String(), "\x1b") != live {
			t.Errorf("live %v, but the output is %q", live, out.String())
		}
		for _, want := range []string{"vm@demo", "ok ", "What it costs", "snapshot dropped", "in process"} {
			if !strings.Contains(out.String(), want) {
				t.Errorf("%q is missing in %s", want, out.String())
			}
		}
		if text, err := json.Marshal(report); err != nil || !bytes.Contains(text, []byte(`"writes_per_second"`)) {
			t.Errorf("as JSON: %s (%v)", text, err)
		}
	}
}

func checkReport(t *testing.T, report *Report) {
	t.Helper()
	if len(report.Proofs) != 4 || len(report.Rates) != rateCount || len(report.Engines) != 2 || report.Repetitions != 2 {
		t.Fatalf("the report is %+v", report)
	}
	for _, p := range report.Proofs {
		if !p.OK || len(p.Evidence) == 0 {
			t.Errorf("not proven: %+v", p)
		}
	}
	for _, r := range report.Rates {
		if r.PerSecond <= 0 || r.OfPlain <= 0 || r.Spread < 0 {
			t.Errorf("rate %+v", r)
		}
	}
	for _, e := range report.Engines {
		if e.Serialised <= 0 || e.Scaled <= 0 || e.Ratio <= 0 {
			t.Errorf("engines %+v", e)
		}
	}
}

// TestImage works on a copy of a file whose last block is not whole, and leaves the file alone.
func TestImage(t *testing.T) {
	image := filepath.Join(t.TempDir(), "image")
	content := bytes.Repeat([]byte("cowherd!"), (1<<20+1000)/8)
	if err := os.WriteFile(image, content, 0o400); err != nil {
		t.Fatal(err)
	}
	before, err := os.Stat(image)
	if err != nil {
		t.Fatal(err)
	}
	c := tiny(t)
	c.Image = image
	report, err := Run(context.Background(), c)
	if err != nil {
		t.Fatal(err)
	}
	checkReport(t, report)
	if report.ImageBytes != 1<<20+4096 {
		t.Errorf("the image has %d bytes", report.ImageBytes)
	}
	after, err := os.Stat(image)
	if err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, content) || !after.ModTime().Equal(before.ModTime()) {
		t.Error("the original was changed")
	}
}

// TestSpoiled writes to the snapshots: the proofs must fail, and only those.
func TestSpoiled(t *testing.T) {
	c := tiny(t)
	c.taken = func(ctx context.Context, d *daemon, name string) error {
		device, err := d.open(ctx, name, 1)
		if err != nil {
			return err
		}
		return errors.Join(block.Write(device, make([]byte, 512), 64<<10), device.Close())
	}
	report, err := Run(context.Background(), c)
	if !errors.Is(err, ErrNotProven) {
		t.Fatalf("got error %v", err)
	}
	for i, want := range []bool{false, true, false, true} {
		if p := report.Proofs[i]; p.OK != want {
			t.Errorf("proof %d is %+v", i, p)
		}
	}
}

// TestInterrupted ends the demo at several moments.
func TestInterrupted(t *testing.T) {
	for _, at := range []string{"the beginning", quietName, flowName} {
		t.Run(at, func(t *testing.T) {
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			c := tiny(t)
			c.taken = func(_ context.Context, _ *daemon, name string) error {
				if name == at {
					cancel()
				}
				return nil
			}
			if at == "the beginning" {
				cancel()
			}
			if report, err := Run(ctx, c); !errors.Is(err, context.Canceled) || report != nil {
				t.Errorf("got %v, error %v", report, err)
			}
		})
	}
	t.Run("while measuring", func(t *testing.T) {
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		c := tiny(t)
		c.Out = writerFunc(func(p []byte) {
			if bytes.Contains(p, []byte("Measuring")) {
				cancel()
			}
		})
		if _, err := Run(ctx, c); !errors.Is(err, context.Canceled) {
			t.Errorf("got error %v", err)
		}
	})
}

type writerFunc func(p []byte)

func (f writerFunc) Write(p []byte) (int, error) {
	f(p)
	return len(p), nil
}

func TestErrors(t *testing.T) {
	small := filepath.Join(t.TempDir(), "small")
	if err := os.WriteFile(small, make([]byte, 1<<20-1), 0o600); err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name   string
		change func(*Config)
		want   error
		text   string
	}{
		{"no image", func(c *Config) { c.Image = small + "x" }, syscall.ENOENT, "small"},
		{"a small image", func(c *Config) { c.Image = small }, nil, "1 MiB or more"},
		{"no room", func(c *Config) { c.Size = 1 << 60 }, syscall.ENOSPC, "of room are needed"},
		{"no such directory", func(c *Config) { c.Dir += "/nowhere" }, syscall.ENOSPC, "nowhere"},
		{"half a block", func(c *Config) { c.Size = 1<<20 + 1 }, syscall.EINVAL, "multiple"},
		{"a snapshot that fails", func(c *Config) {
			c.taken = func(context.Context, *daemon, string) error { return syscall.EPIPE }
		}, syscall.EPIPE, "pipe"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			c := tiny(t)
			test.change(&c)
			_, err := Run(context.Background(), c)
			if err == nil || !strings.Contains(err.Error(), test.text) || test.want != nil && !errors.Is(err, test.want) {
				t.Errorf("got error %v, want one with %q", err, test.text)
			}
		})
	}
}

func TestAudit(t *testing.T) {
	s := &stage{size: 2 * blockSize, seed: maphash.MakeSeed()}
	original := bytes.Repeat([]byte("original"), blockSize/8)
	for range 2 {
		s.before = append(s.before, s.hash(original))
	}
	stamped := func(later bool, sequence uint32, number int) []byte {
		p := make([]byte, blockSize)
		makeStamp(later, sequence, number).fill(p)
		return p
	}
	torn := stamped(false, 5, 1)
	copy(torn[2048:], stamped(false, 6, 1)[2048:])
	tests := []struct {
		name             string
		p                []byte
		acknowledged     uint32
		frozen, original audit
	}{
		{"never written", original, 0, audit{untouched: 1}, audit{untouched: 1}},
		{"the last one", stamped(false, 5, 1), 5, audit{written: 1}, audit{written: 1}},
		{"in between", stamped(false, 6, 1), 5, audit{written: 1, between: 1}, audit{damaged: 1}},
		{"in between, the first", stamped(false, 1, 1), 0, audit{written: 1, between: 1}, audit{damaged: 1}},
		{"too old", stamped(false, 4, 1), 5, audit{lost: 1}, audit{lost: 1}},
		{"far too old", original, 5, audit{lost: 1}, audit{lost: 1}},
		{"too new", stamped(true, 6, 1), 5, audit{later: 1}, audit{damaged: 1}},
		{"issued later, rightly", stamped(true, 5, 1), 5, audit{later: 1}, audit{written: 1}},
		{"of another block", stamped(false, 5, 0), 5, audit{damaged: 1}, audit{damaged: 1}},
		{"torn", torn, 5, audit{damaged: 1}, audit{damaged: 1}},
		{"zeroes", make([]byte, blockSize), 0, audit{damaged: 1}, audit{damaged: 1}},
	}
	for _, test := range tests {
		var frozen, current audit
		frozen.frozen(s, 1, test.p, test.acknowledged)
		current.current(s, 1, test.p, test.acknowledged)
		if frozen != test.frozen || current != test.original {
			t.Errorf("%s: frozen %+v, current %+v", test.name, frozen, current)
		}
	}
}

func TestText(t *testing.T) {
	for n, want := range map[int]string{0: "0", 999: "999", 1000: "1,000", 1234567: "1,234,567"} {
		if got := count(n); got != want {
			t.Errorf("count(%d): %s", n, got)
		}
	}
	for d, want := range map[time.Duration]string{
		1500 * time.Millisecond: "1.5 s", 235 * time.Millisecond: "235 ms", 1234 * time.Microsecond: "1.23 ms",
		85 * time.Microsecond: "85 µs",
	} {
		if got := short(d); got != want {
			t.Errorf("short(%v): %s", d, got)
		}
	}
	long := strings.Repeat("word ", 40) + "end"
	for _, line := range strings.Split(wrap(long, "   "), "\n") {
		if len(line) > width || !strings.HasPrefix(line, "   word") && !strings.HasPrefix(line, "   end") {
			t.Errorf("a line is %q", line)
		}
	}
}
