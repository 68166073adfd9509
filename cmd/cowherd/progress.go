package main

import (
	"encoding/json"
	"fmt"
	"io"
	"sync/atomic"
	"time"

	"cowherd/internal/size"
)

// progressFlag is the flag of commands that work for long.
type progressFlag struct {
	Progress string `enum:"auto,bar,json,none" default:"auto" help:"How to show the progress, on standard error: bar (a line that is written over), json (a line each second), none; auto is bar on a terminal."`
}

// progress shows how far a piece of work is. A nil one shows nothing. Safe for concurrent use.
type progress struct {
	out   io.Writer
	json  bool
	what  string
	start time.Time
	every time.Duration

	done, total atomic.Int64 // bytes
	next        atomic.Int64 // when to show it again, from start on
	how         atomic.Pointer[string]
}

// newProgress begins to show the progress of what, which is over after total bytes.
func (c *progressFlag) newProgress(s *session, what string, total int64) *progress {
	p := &progress{out: s.stderr, what: what, start: time.Now()}
	p.total.Store(total)
	switch {
	case c.Progress == "json":
		p.json, p.every = true, time.Second
	case c.Progress == "bar", c.Progress == "auto" && isTerminal(s.stderr):
		p.every = 200 * time.Millisecond
	default:
		return nil
	}
	return p
}

// add says that n more bytes are done.
func (p *progress) add(n int64) {
	if p == nil {
		return
	}
	p.done.Add(n)
	p.refresh()
}

// addBy says that n more bytes are done, and by what method; "" is no news of it.
func (p *progress) addBy(how string, n int64) {
	if p == nil {
		return
	}
	if last := p.how.Load(); how != "" && (last == nil || *last != how) {
		kept := how // allocated only when it changes
		p.how.Store(&kept)
	}
	p.add(n)
}

// method is the last that was told; "" if none was.
func (p *progress) method() string {
	if how := p.how.Load(); how != nil {
		return *how
	}
	return ""
}

// reach says that so many bytes are done in all.
func (p *progress) reach(done int64) {
	if p == nil {
		return
	}
	p.done.Store(done)
	p.refresh()
}

// refresh shows the state when it is time to.
func (p *progress) refresh() {
	took, next := time.Since(p.start), p.next.Load()
	if int64(took) >= next && p.next.CompareAndSwap(next, int64(took+p.every)) {
		p.show(took)
	}
}

// end shows the last state of a line for programs, and takes away that for people.
func (p *progress) end() {
	if p == nil {
		return
	}
	if p.json {
		p.show(time.Since(p.start))
		return
	}
	_, _ = fmt.Fprint(p.out, "\r\x1b[K")
}

// progressLine is a line for programs.
type progressLine struct {
	What       string  `json:"what"`
	DoneBytes  int64   `json:"done_bytes"`
	TotalBytes int64   `json:"total_bytes"`
	Seconds    float64 `json:"seconds"`
	Method     string  `json:"method,omitempty"`
}

// show writes the state after some time. An error of the terminal does not matter to the work.
func (p *progress) show(took time.Duration) {
	done, total := p.done.Load(), p.total.Load()
	if p.json {
		line, _ := json.Marshal(progressLine{p.what, done, total, took.Seconds(), p.method()}) // plain numbers always can
		_, _ = fmt.Fprintf(p.out, "%s\n", line)
		return
	}
	text := fmt.Sprintf("%s: %s", p.what, share(done, total))
	if seconds := took.Seconds(); seconds > 1 && done > 0 {
		left := time.Duration(float64(took) * float64(total-done) / float64(done))
		text += fmt.Sprintf(", %s/s, %v left", size.Human(int64(float64(done)/seconds)), left.Round(time.Second))
	}
	if how := p.method(); how != "" {
		text += ", " + how
	}
	_, _ = fmt.Fprintf(p.out, "\r\x1b[K%s", text)
}
