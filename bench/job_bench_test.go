package bench

import (
	"fmt"
	"testing"

	"cowherd/block"
)

// BenchmarkJob is what the harness costs for a request: one job on a device that does nothing, 4 KiB. cpu-ns/op is
// processor time, which other load on the machine hardly changes.
func BenchmarkJob(b *testing.B) {
	for _, depth := range []int{1, 32} {
		b.Run(fmt.Sprintf("depth=%d", depth), func(b *testing.B) {
			b.ReportAllocs()
			offsets := make([]uint32, b.N)
			j := newJob(blank{1 << 40}, 0, depth, block.OpWrite, 4096, 4096, offsets)
			before := processorTime()
			b.ResetTimer()
			m, err := runJobs([]*job{j})
			if err != nil {
				b.Fatal(err)
			}
			b.ReportMetric(float64(processorTime()-before)/float64(m.count), "cpu-ns/op")
		})
	}
}
