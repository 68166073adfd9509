package nbd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"cowherd/block"
)

// Config says how a server serves. Exports must be set; a zero elsewhere stands for the default.
type Config struct {
	Exports Exports
	// TLS is used as TLSMode says; it must be set unless the mode is TLSOff.
	TLS     *tls.Config
	TLSMode TLSMode
	// HandshakeTimeout bounds the time from accepting a connection to its first command. Default 10 s.
	HandshakeTimeout time.Duration
	// WriteTimeout ends a connection whose client has taken no byte of a reply for so long. Default: none.
	WriteTimeout time.Duration
	// ConnectionsMax bounds the connections, those that still negotiate included; one too many is closed at once.
	// Default 256.
	ConnectionsMax int
	// RequestsMax bounds the requests in flight of a connection. Default 256.
	RequestsMax int
	// BytesMax bounds the payload memory of a connection beside its fixed buffers, in bytes. Default 64 MiB, at least
	// LengthMax.
	BytesMax int64
	// MemoryMax bounds the payload memory of all connections together, in bytes, but for the fixed buffers and a
	// reserve of 256 KiB for each that keeps a connection going when others hold the rest. Default 512 MiB, at least
	// LengthMax.
	MemoryMax int64
	// Logger is told of connections that come and go. Default: nobody.
	Logger *slog.Logger
	// Foreground is called for each request, with its connection's queue, by the goroutine that reads it. Default:
	// nobody.
	Foreground func(block.Queue)
}

// withDefaults fills in what is not set.
func (c Config) withDefaults() Config {
	if c.HandshakeTimeout <= 0 {
		c.HandshakeTimeout = 10 * time.Second
	}
	if c.ConnectionsMax <= 0 {
		c.ConnectionsMax = 256
	}
	if c.RequestsMax <= 0 {
		c.RequestsMax = 256
	}
	if c.BytesMax <= 0 {
		c.BytesMax = 64 << 20
	}
	if c.MemoryMax <= 0 {
		c.MemoryMax = 512 << 20
	}
	c.BytesMax = max(c.BytesMax, LengthMax)
	c.MemoryMax = max(c.MemoryMax, LengthMax)
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return c
}

// ErrServerClosed is what Serve returns after Shutdown.
var ErrServerClosed = errors.New("nbd: server closed")

// A Server serves exports on any number of listeners. Make it with NewServer. All methods are safe for concurrent use.
type Server struct {
	config Config
	memory atomic.Int64  // bytes of MemoryMax that nobody holds
	queues atomic.Uint32 // the next connection's queue
	ids    atomic.Uint64 // the last connection's number

	mu        sync.Mutex
	stopping  bool                      // +checklocks:mu
	listeners map[net.Listener]struct{} // +checklocks:mu
	peers     map[*peer]struct{}        // +checklocks:mu
	ended     map[string]*ExportTotals  // +checklocks:mu
}

// peer is an accepted connection, from its first byte to its last.
type peer struct {
	conn  net.Conn // of the handshake
	done  chan struct{}
	phase *conn // the transmission phase; nil before. Guarded by Server.mu
}

// NewServer makes a server. It refuses a configuration without exports or with TLS wanted but not configured.
func NewServer(config Config) (*Server, error) {
	if config.Exports == nil {
		return nil, errors.New("nbd: no exports configured")
	}
	if config.TLSMode != TLSOff && config.TLS == nil {
		return nil, fmt.Errorf("nbd: TLS mode %q without a TLS configuration", config.TLSMode)
	}
	s := &Server{
		config:    config.withDefaults(),
		listeners: make(map[net.Listener]struct{}),
		peers:     make(map[*peer]struct{}),
		ended:     make(map[string]*ExportTotals),
	}
	s.memory.Store(s.config.MemoryMax)
	return s, nil
}

// Serve accepts connections from l until Shutdown, and closes l. Its error is ErrServerClosed after a Shutdown, else
// why no connection can be accepted any more. It may be called for several listeners at the same time.
func (s *Server) Serve(l net.Listener) error {
	defer l.Close()
	if !s.addListener(l) {
		return ErrServerClosed
	}
	defer s.removeListener(l)
	var pause time.Duration
	for {
		c, err := l.Accept()
		if err != nil {
			if s.isStopping() {
				return ErrServerClosed
			}
			if !outOfResources(err) {
				return fmt.Errorf("nbd: accept: %w", err)
			}
			pause = min(max(2*pause, acceptPauseMin), acceptPauseMax)
			s.config.Logger.Warn("accept", "err", err, "retry_in", pause)
			time.Sleep(pause)
			continue
		}
		pause = 0
		s.accept(c)
	}
}

// The pause after a failed accept, doubled each time.
const (
	acceptPauseMin = 5 * time.Millisecond
	acceptPauseMax = time.Second
)

// outOfResources tells errors of accept that pass when others free what they hold.
func outOfResources(err error) bool {
	for _, errno := range []unix.Errno{unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ENOMEM, unix.ECONNABORTED} {
		if errors.Is(err, errno) {
			return true
		}
	}
	return false
}

func (s *Server) addListener(l net.Listener) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopping {
		return false
	}
	s.listeners[l] = struct{}{}
	return true
}

func (s *Server) removeListener(l net.Listener) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.listeners, l)
}

func (s *Server) isStopping() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stopping
}

// accept starts to serve c, or closes it when there are too many.
func (s *Server) accept(c net.Conn) {
	p := &peer{conn: c, done: make(chan struct{})}
	s.mu.Lock()
	count := len(s.peers)
	admitted := !s.stopping && count < s.config.ConnectionsMax
	if admitted {
		s.peers[p] = struct{}{}
	}
	s.mu.Unlock()
	if !admitted {
		s.config.Logger.Warn("connection refused", "client", clientOf(c), "connections", count)
		_ = c.Close()
		return
	}
	go s.serve(p)
}

// serve runs a connection from its first byte to its last.
func (s *Server) serve(p *peer) {
	defer s.forget(p)
	client := clientOf(p.conn)
	log := s.config.Logger.With("client", client)
	n := &negotiation{server: s, stream: p.conn, client: client}
	if err := n.run(); err != nil {
		log.Debug("handshake ended", "err", err)
		_ = p.conn.Close()
		return
	}
	c, err := newConn(s, n, p.conn)
	if err != nil {
		log.Warn("connection dropped", "err", err)
		_ = p.conn.Close()
		n.export.release()
		return
	}
	log = log.With("export", c.export.Name)
	s.enter(p, c)
	log.Info("connected", "queue", c.queue, "tls", c.encrypted)
	err = c.run()
	log.Info("disconnected", "reason", err)
}

// enter makes the transmission phase of p known, and stops it at once if the server is stopping.
func (s *Server) enter(p *peer, c *conn) {
	s.mu.Lock()
	p.phase = c
	stopping := s.stopping
	s.mu.Unlock()
	if stopping {
		c.stop()
	}
}

func (s *Server) forget(p *peer) {
	s.mu.Lock()
	delete(s.peers, p)
	if p.phase != nil {
		s.retireLocked(p.phase)
	}
	s.mu.Unlock()
	close(p.done)
}

// Shutdown stops the server cleanly: no connection is accepted any more, requests that have arrived are finished and
// answered, then the connections are closed. When ctx ends first, the connections are cut off (requests in flight are
// finished all the same, by nobody's leave) and its error returned; Shutdown may then be called again to wait for
// their end.
func (s *Server) Shutdown(ctx context.Context) error {
	s.mu.Lock()
	s.stopping = true
	for l := range s.listeners {
		_ = l.Close()
	}
	s.mu.Unlock()
	return s.end(ctx, func(*conn) bool { return true }, true)
}

// Disconnect ends the connections of the export named name as Shutdown does, and waits until they have given back
// their references. New ones can come meanwhile: whoever removes an export refuses to open it first.
func (s *Server) Disconnect(ctx context.Context, name string) error {
	return s.end(ctx, func(c *conn) bool { return c.export.Name == name }, false)
}

// end stops the connections that are chosen, those in the handshake included if wanted, and waits for their end.
func (s *Server) end(ctx context.Context, chosen func(*conn) bool, handshakes bool) error {
	var ending []*peer
	var phases []*conn
	s.mu.Lock()
	for p := range s.peers {
		switch {
		case p.phase != nil && chosen(p.phase):
			phases = append(phases, p.phase)
		case p.phase == nil && handshakes:
			_ = p.conn.Close()
		default:
			continue
		}
		ending = append(ending, p)
	}
	s.mu.Unlock()
	for _, c := range phases {
		c.stop()
	}
	for _, p := range ending {
		select {
		case <-p.done:
		case <-ctx.Done():
			for _, c := range phases {
				c.kill()
			}
			return fmt.Errorf("nbd: waiting for connections to end: %w", ctx.Err())
		}
	}
	return nil
}

// clientOf names the other end of c: its address or, on a unix socket, its process.
func clientOf(c net.Conn) string {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return c.RemoteAddr().String()
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return "unix"
	}
	var cred *unix.Ucred
	var credErr error
	err = raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	})
	if err != nil || credErr != nil {
		return "unix"
	}
	return fmt.Sprintf("unix (pid %d, uid %d)", cred.Pid, cred.Uid)
}

// nextQueue hands out queues in turn.
func (s *Server) nextQueue() block.Queue { return block.Queue(s.queues.Add(1) - 1) }
