package nbd

import (
	"fmt"
	"net"
	"os"
	"strconv"
)

// The first descriptor that a service manager passes.
const listenDescriptorsStart = 3

// listenDescriptorsMax bounds LISTEN_FDS.
const listenDescriptorsMax = 1024

// Listeners are the listening sockets that a service manager has passed to this process (LISTEN_PID, LISTEN_FDS), none
// if there are none. The variables are unset, so that child processes do not take the sockets for theirs. To be
// called once, before other goroutines look at the environment.
func Listeners() ([]net.Listener, error) {
	defer func() {
		for _, name := range []string{"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"} {
			_ = os.Unsetenv(name)
		}
	}()
	if pid, err := strconv.Atoi(os.Getenv("LISTEN_PID")); err != nil || pid != os.Getpid() {
		return nil, nil
	}
	count, err := strconv.Atoi(os.Getenv("LISTEN_FDS"))
	if err != nil || count < 0 || count > listenDescriptorsMax {
		return nil, fmt.Errorf("nbd: LISTEN_FDS=%q: not a number of sockets", os.Getenv("LISTEN_FDS"))
	}
	return listenersFrom(listenDescriptorsStart, count)
}

// listenersFrom makes listeners of count descriptors, the first of them start. The descriptors are closed: the
// listeners have their own.
func listenersFrom(start, count int) ([]net.Listener, error) {
	var listeners []net.Listener
	for fd := start; fd < start+count; fd++ {
		l, err := listenerOf(fd)
		if err != nil {
			for _, l := range listeners {
				_ = l.Close()
			}
			return nil, fmt.Errorf("nbd: socket passed as descriptor %d: %w", fd, err)
		}
		listeners = append(listeners, l)
	}
	return listeners, nil
}

func listenerOf(fd int) (net.Listener, error) {
	f := os.NewFile(uintptr(fd), "LISTEN_FD_"+strconv.Itoa(fd))
	defer f.Close()
	return net.FileListener(f)
}
