package dm_test

import (
	"fmt"
	"testing"

	"cowherd/backend/null"
	"cowherd/block"
	"cowherd/dm"
	"cowherd/target"
	"cowherd/target/linear"
)

// counting is a submitter that sends its next request when one is done.
type counting struct {
	r    block.Request
	done int
}

func (c *counting) Complete(*block.Request, error) { c.done++ }

// run sends n reads or writes of 4 KiB.
func (c *counting) run(d block.Device, op block.Op, n int, data []byte) {
	for i := range n {
		c.r.Op, c.r.Data, c.r.Length = op, data, int64(len(data))
		c.r.Offset = int64(i&1023) << 12
		c.r.Push(c)
		d.Submit(&c.r)
	}
}

// BenchmarkNull is the null device, bare and below 1 and 3 linear targets: 4 KiB, in process, one request at a time. The
// figures of one run are to be compared.
func BenchmarkNull(b *testing.B) {
	const size = 1 << 40
	for _, op := range []block.Op{block.OpRead, block.OpWrite} {
		for _, depth := range []int{0, 1, 3} {
			b.Run(fmt.Sprintf("%v/%d", op, depth), func(b *testing.B) {
				leaf, err := null.New(null.Config{Size: size})
				if err != nil {
					b.Fatal(err)
				}
				defer leaf.Close()
				var d block.Device = leaf
				for i := range depth {
					d = dm.NewDevice(fmt.Sprint(i), linear.New(target.Lower{Device: d, Name: target.Name("x")}, 0, size), false)
				}
				var c counting
				data := make([]byte, 4096)
				c.run(d, op, 100, data)
				b.ReportAllocs()
				b.ResetTimer()
				c.run(d, op, b.N, data)
			})
		}
	}
}
