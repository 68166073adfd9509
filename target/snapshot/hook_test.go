package snapshot

import (
	"runtime"

	"cowherd/block"
	"cowherd/kcopyd"
)

// hookedEngine calls a function after each Submit.
type hookedEngine struct {
	kcopyd.Engine
	hook func()
}

func (e hookedEngine) Submit(j *kcopyd.Job) {
	e.Engine.Submit(j)
	e.hook()
}

// depthCall reports how deep the stack was when it completed.
type depthCall struct {
	r    block.Request
	done chan int
}

func (c *depthCall) Complete(*block.Request, error) {
	var stack [1000]uintptr
	c.done <- runtime.Callers(0, stack[:])
}
