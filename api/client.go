package api

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"syscall"
)

// Bounds of what a client reads, in bytes.
const (
	answerMax = 64 << 20
	eventMax  = 1 << 20
)

// A Client talks to the daemon that listens on one unix socket. Its methods are safe for concurrent use and return an
// *Error when the daemon refuses; other errors mean that there was no answer.
type Client struct {
	socket string
	http   http.Client
}

// NewClient makes a client. Nothing is connected before the first call.
func NewClient(socket string) *Client {
	c := &Client{socket: socket}
	c.http.Transport = &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		},
		MaxIdleConns:       2,
		DisableCompression: true,
	}
	return c
}

// Close drops idle connections. Streams end with their context.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Version asks who the daemon is.
func (c *Client) Version(ctx context.Context) (Version, error) {
	return call[Version](ctx, c, http.MethodGet, "/version", nil)
}

// Devices lists origins and snapshots by name.
func (c *Client) Devices(ctx context.Context) ([]Device, error) {
	list, err := call[DeviceList](ctx, c, http.MethodGet, "/devices", nil)
	return list.Devices, err
}

// Device is the state of one origin or snapshot.
func (c *Client) Device(ctx context.Context, name string) (Device, error) {
	return call[Device](ctx, c, http.MethodGet, "/devices/"+url.PathEscape(name), nil)
}

// Attach makes a device live under a name.
func (c *Client) Attach(ctx context.Context, r AttachRequest) (Device, error) {
	return call[Device](ctx, c, http.MethodPost, "/devices", r)
}

// Detach flushes an origin and lets go of it. EBUSY: it has snapshots or users.
func (c *Client) Detach(ctx context.Context, name string) error {
	_, err := call[struct{}](ctx, c, http.MethodDelete, "/devices/"+url.PathEscape(name), nil)
	return err
}

// TakeSnapshot freezes an origin's contents under a new name.
func (c *Client) TakeSnapshot(ctx context.Context, r SnapshotRequest) (SnapshotTaken, error) {
	return call[SnapshotTaken](ctx, c, http.MethodPost, "/snapshots", r)
}

// RemoveSnapshot drops a snapshot and what it has copied. EBUSY: it has users; force disconnects them.
func (c *Client) RemoveSnapshot(ctx context.Context, name string, force bool) error {
	path := "/snapshots/" + url.PathEscape(name)
	if force {
		path += "?force=true"
	}
	_, err := call[struct{}](ctx, c, http.MethodDelete, path, nil)
	return err
}

// ResizeSnapshot gives a snapshot's store another size in bytes.
func (c *Client) ResizeSnapshot(ctx context.Context, name string, size int64) (Device, error) {
	path := "/snapshots/" + url.PathEscape(name) + "/size"
	return call[Device](ctx, c, http.MethodPut, path, ResizeRequest{SizeBytes: size})
}

// MergeSnapshot lets the merge of a snapshot into its origin run, or stops it.
func (c *Client) MergeSnapshot(ctx context.Context, name string, running bool) (Device, error) {
	path := "/snapshots/" + url.PathEscape(name) + "/merge"
	return call[Device](ctx, c, http.MethodPut, path, MergeRequest{Running: running})
}

// Throttle asks what copies are limited to.
func (c *Client) Throttle(ctx context.Context) (Throttle, error) {
	return call[Throttle](ctx, c, http.MethodGet, "/throttle", nil)
}

// SetThrottle changes the limits of a class of copies, until the daemon stops.
func (c *Client) SetThrottle(ctx context.Context, class string, r ThrottleRequest) (ThrottleClass, error) {
	return call[ThrottleClass](ctx, c, http.MethodPut, "/throttle/"+url.PathEscape(class), r)
}

// Hydrate changes how a clone is hydrated.
func (c *Client) Hydrate(ctx context.Context, name string, r HydrationRequest) (Device, error) {
	return call[Device](ctx, c, http.MethodPut, "/devices/"+url.PathEscape(name)+"/hydration", r)
}

// DetachSource lets go of the source of a clone that is hydrated. EBUSY: it is not.
func (c *Client) DetachSource(ctx context.Context, name string) (Device, error) {
	return call[Device](ctx, c, http.MethodDelete, "/devices/"+url.PathEscape(name)+"/source", nil)
}

// EventsQuery selects events.
type EventsQuery struct {
	// Since is the number of an event: those after it are wanted. nil: those from now on, or with Follow false all
	// that are kept.
	Since *uint64
	// Follow waits for more, until the context ends or the daemon stops.
	Follow bool
}

// Events yields events in order until there are no more. The last pair may be an error.
func (c *Client) Events(ctx context.Context, q EventsQuery) iter.Seq2[Event, error] {
	return func(yield func(Event, error) bool) {
		query := url.Values{"follow": {strconv.FormatBool(q.Follow)}}
		if q.Since != nil {
			query.Set("since", strconv.FormatUint(*q.Since, 10))
		}
		answer, err := c.do(ctx, http.MethodGet, "/events?"+query.Encode(), nil)
		if err != nil {
			yield(Event{}, err)
			return
		}
		defer answer.Body.Close()
		lines := bufio.NewScanner(answer.Body)
		lines.Buffer(nil, eventMax)
		for lines.Scan() {
			var e Event
			if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
				yield(Event{}, fmt.Errorf("events from %s: %w", c.socket, err))
				return
			}
			if !yield(e, nil) {
				return
			}
		}
		if err := lines.Err(); err != nil {
			yield(Event{}, fmt.Errorf("events from %s: %w", c.socket, err))
		}
	}
}

// call makes one request and reads its answer, which is empty for a T of struct{}.
func call[T any](ctx context.Context, c *Client, method, path string, body any) (T, error) {
	var result T
	answer, err := c.do(ctx, method, path, body)
	if err != nil {
		return result, err
	}
	defer answer.Body.Close()
	if answer.StatusCode == http.StatusNoContent {
		return result, nil
	}
	if err := json.NewDecoder(io.LimitReader(answer.Body, answerMax)).Decode(&result); err != nil {
		return result, fmt.Errorf("answer of the daemon on %s: %w", c.socket, err)
	}
	return result, nil
}

// do sends a request. The answer is one of success; its body is the caller's to close.
func (c *Client) do(ctx context.Context, method, path string, body any) (*http.Response, error) {
	var content io.Reader
	if body != nil {
		encoded, err := json.Marshal(body)
		if err != nil {
			return nil, fmt.Errorf("request to the daemon: %w", err)
		}
		content = bytes.NewReader(encoded)
	}
	r, err := http.NewRequestWithContext(ctx, method, "http://cowherd"+Prefix+path, content)
	if err != nil {
		return nil, fmt.Errorf("request to the daemon: %w", err)
	}
	if body != nil {
		r.Header.Set("Content-Type", "application/json")
	}
	answer, err := c.http.Do(r)
	if err != nil {
		return nil, c.noAnswer(err)
	}
	if answer.StatusCode < 200 || answer.StatusCode > 299 {
		defer answer.Body.Close()
		return nil, c.readError(answer)
	}
	return answer, nil
}

// noAnswer says in words what usually is behind a failed connection.
func (c *Client) noAnswer(err error) error {
	if u, ok := errors.AsType[*url.Error](err); ok {
		err = u.Err // without the invented URL
	}
	switch {
	case errors.Is(err, syscall.ENOENT), errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("no daemon listens on %s (is \"cowherd serve\" running?): %w", c.socket, err)
	case errors.Is(err, syscall.EACCES):
		return fmt.Errorf("the daemon on %s belongs to another user: %w", c.socket, err)
	}
	return fmt.Errorf("the daemon on %s does not answer: %w", c.socket, err)
}

// readError makes the error that a failed answer stands for.
func (c *Client) readError(answer *http.Response) error {
	var body errorBody
	text, err := io.ReadAll(io.LimitReader(answer.Body, BodyMax))
	if err == nil && json.Unmarshal(text, &body) == nil && body.Error != "" {
		return &Error{Message: body.Error, Errno: errnoNamed(body.Errno)}
	}
	return fmt.Errorf("the daemon on %s answers %s: %s", c.socket, answer.Status, strings.TrimSpace(string(text)))
}
