package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
)

// interruptible is a context that ends at the first SIGINT or SIGTERM; a second one ends the process at once. Go needs
// 0.2 ms and a thread to ask for signals, which it does beside the caller: armed is closed when that is done, and until
// then a signal ends the process. So nothing that an interruption is to undo must be done before.
//
// stop gives the signals back, some time after it has returned.
func (s *session) interruptible() (ctx context.Context, armed <-chan struct{}, stop func()) {
	ctx, cancel := context.WithCancel(s)
	asked := make(chan struct{})
	go func() {
		signals := make(chan os.Signal, 1)
		signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
		close(asked)
		select {
		case <-signals:
			cancel()
		case <-ctx.Done():
		}
		signal.Stop(signals)
	}()
	return ctx, asked, cancel
}
