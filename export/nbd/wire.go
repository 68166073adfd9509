package nbd

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"cowherd/internal/invariant"
)

// A wire is the byte stream of a connection in the transmission phase. One goroutine reads; writers take turns
// (conn.sendMu); the other methods may be called by anybody at any time.
//
// A read that finds nothing calls idle before it waits: that is the moment to send the replies that have gathered,
// and it comes without asking the kernel anything that a read would not ask anyway.
type wire interface {
	io.Reader
	io.Writer
	// limitWrite bounds the time that a write may make no progress; 0: no bound.
	limitWrite(d time.Duration) error
	// hangUp makes the reader see the end of the stream once it has read what has arrived.
	hangUp()
	// kill ends reads and writes at once, those under way included.
	kill()
	// Close frees the wire. Nobody may read or write any more.
	Close() error
}

// socket is a wire over a descriptor of its own in blocking mode, read and written with plain system calls.
//
// Why not the net package's: its descriptors sit in the runtime's epoll set for as long as they are open, so that every
// message of a client wakes a thread of ours that is waiting for work there, though the goroutine that serves the
// connection is running anyway, and a wait costs a way through the scheduler. A blocking descriptor wakes nobody who
// is not waiting for it.
type socket struct {
	fd   int
	idle func() error

	mu     sync.Mutex // keeps the descriptor open for a shutdown by another goroutine
	closed bool       // +checklocks:mu
}

// takeSocket moves the stream of c to a socket and closes c. It is false, and c untouched, when c has no descriptor.
func takeSocket(c net.Conn, idle func() error) (*socket, bool, error) {
	sc, ok := c.(syscall.Conn)
	if !ok {
		return nil, false, nil
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return nil, false, fmt.Errorf("nbd: descriptor of the connection: %w", err)
	}
	fd := -1
	var dupErr error
	err = raw.Control(func(old uintptr) {
		fd, dupErr = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0)
	})
	if err = errors.Join(err, dupErr); err != nil {
		return nil, false, fmt.Errorf("nbd: descriptor of the connection: %w", err)
	}
	if err := errors.Join(c.Close(), unix.SetNonblock(fd, false)); err != nil {
		return nil, false, fmt.Errorf("nbd: descriptor of the connection: %w", errors.Join(err, unix.Close(fd)))
	}
	return &socket{fd: fd, idle: idle}, true, nil
}

// Read reads what has arrived, at most len(p) bytes (at least one), or waits for it.
func (s *socket) Read(p []byte) (int, error) {
	n, errno := receiveNow(s.fd, p)
	if errno == unix.EAGAIN {
		if err := s.idle(); err != nil {
			return 0, err
		}
		n, errno = receive(s.fd, p)
	}
	switch {
	case errno != 0:
		return 0, errno
	case n == 0:
		return 0, io.EOF
	}
	return n, nil
}

// receiveNow reads without waiting. The scheduler is not told of the call: it is over in the time of a copy.
func receiveNow(fd int, p []byte) (int, syscall.Errno) {
	n, _, errno := unix.RawSyscall6(unix.SYS_RECVFROM, uintptr(fd),
		uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)), unix.MSG_DONTWAIT, 0, 0)
	invariant.Crossing()
	return int(n), errno
}

// receive reads, waiting for as long as it takes.
func receive(fd int, p []byte) (int, syscall.Errno) {
	for {
		n, _, errno := unix.Syscall6(unix.SYS_RECVFROM, uintptr(fd),
			uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)), 0, 0, 0)
		if errno != unix.EINTR {
			invariant.Crossing()
			return int(n), errno
		}
	}
}

// sendBriefMax is the most bytes that are sent without telling the scheduler.
const sendBriefMax = 128 << 10

// Write writes all of p, waiting for the client to make room.
func (s *socket) Write(p []byte) (int, error) {
	done := 0
	for done < len(p) {
		n, errno := 0, unix.EAGAIN
		if len(p)-done <= sendBriefMax {
			n, errno = sendNow(s.fd, p[done:])
		}
		if errno == unix.EAGAIN {
			n, errno = send(s.fd, p[done:])
		}
		switch errno {
		case 0:
			done += n
		case unix.EINTR:
		case unix.EAGAIN:
			return done, errStalled
		default:
			return done, errno
		}
	}
	return done, nil
}

// sendNow sends what there is room for, without waiting. The scheduler is not told of the call.
func sendNow(fd int, p []byte) (int, syscall.Errno) {
	invariant.Crossing()
	n, _, errno := unix.RawSyscall6(unix.SYS_SENDTO, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(p))),
		uintptr(len(p)), unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT, 0, 0)
	return int(n), errno
}

// send sends some of p, and waits for room, or until the socket's time is up.
func send(fd int, p []byte) (int, syscall.Errno) {
	invariant.Crossing()
	n, _, errno := unix.Syscall6(unix.SYS_SENDTO, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(p))),
		uintptr(len(p)), unix.MSG_NOSIGNAL, 0, 0)
	return int(n), errno
}

var errStalled = errors.New("nbd: the client takes no replies")

func (s *socket) limitWrite(d time.Duration) error {
	tv := unix.NsecToTimeval(int64(d))
	if err := unix.SetsockoptTimeval(s.fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv); err != nil {
		return fmt.Errorf("nbd: write timeout: %w", err)
	}
	return nil
}

func (s *socket) hangUp() { s.shutdown(unix.SHUT_RD) }

func (s *socket) kill() { s.shutdown(unix.SHUT_RDWR) }

// shutdown closes the stream's given side. An error means that the client has gone: what was wanted.
func (s *socket) shutdown(how int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed {
		_ = unix.Shutdown(s.fd, how)
	}
}

func (s *socket) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	return unix.Close(s.fd)
}

// stream is a wire over a net.Conn without a descriptor. It cannot know whether a read would wait, so it is idle
// before each.
type stream struct {
	conn  net.Conn
	idle  func() error
	limit time.Duration // of a write; set before the first
}

func (s *stream) Read(p []byte) (int, error) {
	if err := s.idle(); err != nil {
		return 0, err
	}
	return s.conn.Read(p)
}

func (s *stream) Write(p []byte) (int, error) {
	if s.limit > 0 {
		if err := s.conn.SetWriteDeadline(time.Now().Add(s.limit)); err != nil {
			return 0, err
		}
	}
	return s.conn.Write(p)
}

func (s *stream) limitWrite(d time.Duration) error {
	s.limit = d
	return nil
}

// hangUp ends the reader's wait; what has not been read is lost, which only a stream without a buffer can afford.
func (s *stream) hangUp() { _ = s.conn.SetReadDeadline(time.Now()) }

func (s *stream) kill() { _ = s.conn.Close() }

func (s *stream) Close() error { return s.conn.Close() }

// session is a wire through TLS: the wire below carries its records, and is idle when there are none.
type session struct {
	wire // below
	tls  *tls.Conn
}

func (s *session) Read(p []byte) (int, error) { return s.tls.Read(p) }

func (s *session) Write(p []byte) (int, error) { return s.tls.Write(p) }

// Close says goodbye to the client and frees the wire below.
func (s *session) Close() error { return errors.Join(s.tls.Close(), s.wire.Close()) }
