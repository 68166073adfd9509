package nbd

import (
	"sort"
	"sync/atomic"
	"time"

	"cowherd/block"
)

// ConnectionInfo is the state of a connection in the transmission phase.
type ConnectionInfo struct {
	ID       uint64             `json:"id"`     // unique in this server
	Export   string             `json:"export"` // canonical name
	Client   string             `json:"client"` // address, or process on a unix socket
	TLS      bool               `json:"tls"`
	Queue    block.Queue        `json:"queue"`
	Since    time.Time          `json:"since"`
	InFlight int64              `json:"in_flight"` // requests that a device works on beyond the call that submitted them
	BytesIn  uint64             `json:"bytes_in"`  // payload of writes
	BytesOut uint64             `json:"bytes_out"` // payload of reads
	Commands map[string]Command `json:"commands"`  // by name; those that were used
}

// Command counts what one kind of command did on a connection.
type Command struct {
	Requests uint64 `json:"requests"`
	Bytes    uint64 `json:"bytes"` // sum of the lengths asked for
	Errors   uint64 `json:"errors"`
}

var commandNames = [cmdCount]string{
	cmdRead: "read", cmdWrite: "write", cmdDisconnect: "disconnect", cmdFlush: "flush", cmdTrim: "trim",
	cmdCache: "cache", cmdWriteZeroes: "write_zeroes", cmdBlockStatus: "block_status",
}

// counters are one command's, read by anybody.
type counters struct {
	requests, bytes, errors atomic.Uint64
}

// tally is what the connection's goroutine has counted since it last published: an atomic operation for each request
// would cost as much as the rest of the bookkeeping.
type tally struct {
	requests, bytes uint64
}

// publish adds the tallies to the counters.
func (c *conn) publish() {
	for i := range c.tallies {
		t := &c.tallies[i]
		if t.requests == 0 {
			continue
		}
		c.counters[i].requests.Add(t.requests)
		c.counters[i].bytes.Add(t.bytes)
		*t = tally{}
	}
}

// info is the connection's state.
func (c *conn) info() ConnectionInfo {
	info := ConnectionInfo{
		ID: c.id, Export: c.export.Name, Client: c.client, TLS: c.encrypted, Queue: c.queue, Since: c.since,
		InFlight: c.inFlight(),
		BytesIn:  c.counters[cmdWrite].bytes.Load(),
		BytesOut: c.counters[cmdRead].bytes.Load(),
		Commands: make(map[string]Command),
	}
	for i := range c.counters {
		k := &c.counters[i]
		if n := k.requests.Load(); n > 0 {
			info.Commands[commandNames[i]] = Command{n, k.bytes.Load(), k.errors.Load()}
		}
	}
	return info
}

// Connections are the connections in the transmission phase, oldest first. The counters of a connection that is busy
// lag behind by what it has not answered yet.
func (s *Server) Connections() []ConnectionInfo {
	s.mu.Lock()
	var conns []*conn
	for p := range s.peers {
		if p.phase != nil {
			conns = append(conns, p.phase)
		}
	}
	s.mu.Unlock()
	infos := make([]ConnectionInfo, 0, len(conns))
	for _, c := range conns {
		infos = append(infos, c.info())
	}
	sort.Slice(infos, func(i, j int) bool { return infos[i].ID < infos[j].ID })
	return infos
}
