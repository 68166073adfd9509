package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"slices"
)

// qmp is a connection to the monitor of a QEMU program: JSON objects, one a line. A command is answered by "return" or
// "error"; events come in between. Not safe for concurrent use.
type qmp struct {
	conn   net.Conn
	lines  *bufio.Scanner
	events []qmpMessage // that came while an answer was waited for
}

// qmpMessage is what the monitor sends, as far as it is used.
type qmpMessage struct {
	Return json.RawMessage
	Error  *struct{ Desc string }
	Event  string
	Data   struct {
		Device string // a job
		Error  string
	}
}

// openQMP connects to a monitor.
func openQMP(ctx context.Context, socket string) (*qmp, error) {
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, err
	}
	q := &qmp{conn: conn, lines: bufio.NewScanner(conn)}
	if _, err = q.read(ctx); err == nil { // the greeting
		err = q.execute(ctx, "qmp_capabilities", nil)
	}
	if err != nil {
		_ = conn.Close()
		return nil, err
	}
	return q, nil
}

func (q *qmp) close() error { return q.conn.Close() }

// read reads one message, or fails when ctx ends.
func (q *qmp) read(ctx context.Context) (m qmpMessage, err error) {
	stop := context.AfterFunc(ctx, func() { _ = q.conn.Close() })
	defer stop()
	switch {
	case q.lines.Scan():
		err = json.Unmarshal(q.lines.Bytes(), &m)
	case ctx.Err() != nil:
		err = context.Cause(ctx)
	case q.lines.Err() != nil:
		err = q.lines.Err()
	default:
		err = fmt.Errorf("the connection has ended")
	}
	if err != nil {
		err = fmt.Errorf("QEMU's monitor: %w", err)
	}
	return m, err
}

// execute executes a command.
func (q *qmp) execute(ctx context.Context, command string, arguments any) error {
	text, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
	}{command, arguments})
	if err != nil {
		return err
	}
	if _, err := q.conn.Write(append(text, '\n')); err != nil {
		return fmt.Errorf("QEMU's monitor: %s: %w", command, err)
	}
	for {
		m, err := q.read(ctx)
		switch {
		case err != nil:
			return fmt.Errorf("%s: %w", command, err)
		case m.Error != nil:
			return fmt.Errorf("QEMU's monitor: %s: %s", command, m.Error.Desc)
		case m.Return != nil:
			return nil
		case m.Event != "":
			q.events = append(q.events, m)
		}
	}
}

// jobEnded waits for the end of a job, which must not fail.
func (q *qmp) jobEnded(ctx context.Context, job string) error {
	ends := func(m qmpMessage) bool {
		return m.Data.Device == job && slices.Contains([]string{"BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED", "BLOCK_JOB_ERROR"}, m.Event)
	}
	i := slices.IndexFunc(q.events, ends)
	var m qmpMessage
	if i >= 0 {
		m = q.events[i]
	}
	for i < 0 && !ends(m) {
		var err error
		if m, err = q.read(ctx); err != nil {
			return err
		}
	}
	if m.Event != "BLOCK_JOB_COMPLETED" || m.Data.Error != "" {
		return fmt.Errorf("the job %s has failed: %s %s", job, m.Event, m.Data.Error)
	}
	return nil
}
