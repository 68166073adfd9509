package api

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"iter"
	"net/http"
	"net/url"
	"strconv"
	"time"
)

// TraceQuery says what a trace is to tell.
type TraceQuery struct {
	For      time.Duration // 0: until the context ends or the daemon stops
	Every    time.Duration // between two summaries, at least 100 ms; 0: only the last one comes
	Requests bool          // every request and every copy as well
}

// TraceLine is one line of a trace: a request, a copy, or a summary.
type TraceLine struct {
	Request *TraceRequest `json:"request,omitempty"`
	Summary *TraceSummary `json:"summary,omitempty"`
}

// TraceRequest is the life of one request, or of one copy, which has a class. Times are in microseconds; the parts add up
// to TotalUS.
type TraceRequest struct {
	AtUS   float64 `json:"at_us"` // since the trace began
	Op     string  `json:"op"`    // read, write, flush, discard, write zeroes; copy
	Class  string  `json:"class,omitempty"`
	Offset int64   `json:"offset"` // bytes; of a copy: in its destination
	Length int64   `json:"length"` // bytes
	Queue  int     `json:"queue"`
	CPU    int     `json:"cpu"` // that issued it; -1: not known
	Failed bool    `json:"failed,omitempty"`

	HeldUS   float64 `json:"held_us"`   // the device was suspended
	MapUS    float64 `json:"map_us"`    // within cowherd, but for what is waited for
	WaitUS   float64 `json:"wait_us"`   // for a copy
	DeviceUS float64 `json:"device_us"` // the device below
	TotalUS  float64 `json:"total_us"`
}

// TraceSummary is what a trace has seen since it began.
type TraceSummary struct {
	Seconds float64      `json:"seconds"`
	Last    bool         `json:"last"` // no more follows
	Flows   []TraceFlow  `json:"flows"`
	CPUs    []TraceShare `json:"cpus"`
	Queues  []TraceShare `json:"queues"`
	Dropped uint64       `json:"dropped_records"` // for want of room: what is told is not complete
	Broken  uint64       `json:"broken_requests"` // that are not told of, because a record of theirs was dropped
}

// TraceFlow is all requests of one operation, or all copies of one class.
type TraceFlow struct {
	Op     string      `json:"op"`
	Class  string      `json:"class,omitempty"`
	Count  uint64      `json:"count"`
	Bytes  uint64      `json:"bytes"`
	Failed uint64      `json:"failed"`
	Parts  []TracePart `json:"parts"`
}

// TracePart is the latency of one part of the requests' time: held, map, wait, device, total. Held and wait are only of
// those that were held or waited: Count is how many.
type TracePart struct {
	Part   string  `json:"part"`
	Count  uint64  `json:"count"`
	MeanUS float64 `json:"mean_us"`
	P50US  float64 `json:"p50_us"`
	P99US  float64 `json:"p99_us"`
	P999US float64 `json:"p999_us"`
	MaxUS  float64 `json:"max_us"`
}

// TraceShare is what one CPU, or the submitters of one queue, have issued.
type TraceShare struct {
	Number       int     `json:"number"` // -1: not known
	Requests     uint64  `json:"requests"`
	RequestBytes uint64  `json:"request_bytes"`
	Copies       uint64  `json:"copies"`
	CopyBytes    uint64  `json:"copy_bytes"`
	Share        float64 `json:"share"` // of all requests and copies that were issued, 0 to 1
}

// Trace follows the requests of a device. The last line is a summary, unless an error comes instead.
func (c *Client) Trace(ctx context.Context, name string, q TraceQuery) iter.Seq2[TraceLine, error] {
	return func(yield func(TraceLine, error) bool) {
		query := url.Values{
			"for": {q.For.String()}, "every": {q.Every.String()}, "requests": {strconv.FormatBool(q.Requests)},
		}
		answer, err := c.do(ctx, http.MethodGet, "/devices/"+url.PathEscape(name)+"/trace?"+query.Encode(), nil)
		if err != nil {
			yield(TraceLine{}, err)
			return
		}
		defer answer.Body.Close()
		lines := bufio.NewScanner(answer.Body)
		lines.Buffer(nil, eventMax)
		for lines.Scan() {
			var line TraceLine
			if err := json.Unmarshal(lines.Bytes(), &line); err != nil {
				yield(TraceLine{}, fmt.Errorf("trace from %s: %w", c.socket, err))
				return
			}
			if !yield(line, nil) {
				return
			}
		}
		if err := lines.Err(); err != nil {
			yield(TraceLine{}, fmt.Errorf("trace from %s: %w", c.socket, err))
		}
	}
}
