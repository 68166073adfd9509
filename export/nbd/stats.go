package nbd

import (
	"maps"
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

// ExportTotals counts what was done on an export by all its connections, those that have ended included.
type ExportTotals struct {
	Connections uint64 // that reached the transmission phase
	Open        int
	InFlight    int64
	Commands    map[string]Command // by name; those that were used
}

// add counts one connection more.
func (t *ExportTotals) add(info *ConnectionInfo) {
	t.Connections++
	if t.Commands == nil {
		t.Commands = make(map[string]Command)
	}
	for name, n := range info.Commands {
		sum := t.Commands[name]
		sum.Requests += n.Requests
		sum.Bytes += n.Bytes
		sum.Errors += n.Errors
		t.Commands[name] = sum
	}
}

// Totals are those of all exports that have been used and not forgotten. No count ever gets smaller.
func (s *Server) Totals() map[string]ExportTotals {
	s.mu.Lock()
	defer s.mu.Unlock()
	totals := make(map[string]ExportTotals)
	for name, ended := range s.ended {
		sum := *ended
		sum.Commands = maps.Clone(ended.Commands)
		totals[name] = sum
	}
	for p := range s.peers {
		if p.phase == nil {
			continue
		}
		info := p.phase.info()
		sum := totals[info.Export]
		sum.add(&info)
		sum.Open++
		sum.InFlight += info.InFlight
		totals[info.Export] = sum
	}
	return totals
}

// ForgetTotals drops what was counted on the connections of an export that have ended. Who takes the export away calls
// it, so that names that come and go do not take up memory.
func (s *Server) ForgetTotals(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.ended, name)
}

// retireLocked keeps what a connection that has ended has counted.
//
// +checklocks:s.mu
func (s *Server) retireLocked(c *conn) {
	info := c.info()
	sum := s.ended[info.Export]
	if sum == nil {
		sum = new(ExportTotals)
		s.ended[info.Export] = sum
	}
	sum.add(&info)
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
