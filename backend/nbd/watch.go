package nbd

import (
	"fmt"
	"time"
)

// watchTicks is how many times a silent connection is looked at before it is given up.
const watchTicks = 4

// watch looks for connections on which requests wait and nothing moves, until the device is closed or has failed.
func (d *Device) watch() {
	ticker := time.NewTicker(max(d.config.RequestTimeout/watchTicks, 1))
	defer ticker.Stop()
	for {
		select {
		case <-d.ctx.Done():
			return
		case <-ticker.C:
		}
		for _, c := range d.conns {
			if c.isSilent() {
				c.linger(fmt.Errorf("it has been silent for %v while requests waited", d.config.RequestTimeout))
			}
		}
	}
}

// isSilent is called once for each tick. The first one that finds requests and no sign of life does not count: they
// may have come a moment ago.
func (c *conn) isSilent() bool {
	heard := c.heard.Swap(false)
	c.mu.Lock()
	defer c.mu.Unlock()
	if heard || !c.up || c.inflight == 0 {
		c.silent = 0
		return false
	}
	c.silent++
	return c.silent > watchTicks
}
