package conformance

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"cowherd/block"
)

// BenchmarkCloneReady is how long a clone of an export takes until it is of use: from starting the command, while both
// daemons run, to the answer to the first read through the clone's export, in milliseconds. Beside the whole it shows the
// command alone, and the rest: connecting and reading.
func BenchmarkCloneReady(b *testing.B) {
	remote := startDaemon(b)
	remote.do("attach", "golden", randomImage(b, 64*mib, 17), "--read-only")
	d := startDaemon(b)
	dir := b.TempDir()
	var command, first, whole []float64
	for i := 0; b.Loop(); i++ {
		dest := filepath.Join(dir, fmt.Sprint(i))
		began := time.Now()
		d.do("clone", "web", "--from", remote.uri("golden"), dest, "--no-hydration")
		made := time.Now()
		x := d.open("web", 1)
		p := make([]byte, 4*kib)
		if err := block.Read(x, p, 0); err != nil {
			b.Fatal(err)
		}
		end := time.Now()
		command = append(command, milliseconds(made.Sub(began)))
		first, whole = append(first, milliseconds(end.Sub(made))), append(whole, milliseconds(end.Sub(began)))
		b.StopTimer()
		if err := x.Close(); err != nil {
			b.Error(err)
		}
		d.do("detach", "web")
		for _, path := range []string{dest, dest + ".clone-metadata"} {
			if err := os.Remove(path); err != nil {
				b.Error(err)
			}
		}
		b.StartTimer()
	}
	for _, m := range []struct {
		unit  string
		times []float64
	}{{"command-ms", command}, {"read-ms", first}, {"ready-ms", whole}} {
		slices.Sort(m.times)
		b.ReportMetric(m.times[len(m.times)/2], m.unit)
	}
	b.ReportMetric(whole[0], "least-ready-ms")
}

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
