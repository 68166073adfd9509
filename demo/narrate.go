package demo

import (
	"context"
	"fmt"
	"io"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode/utf8"
)

const (
	// tickTime is how often the last line of a terminal is renewed.
	tickTime = 100 * time.Millisecond
	// width is the longest line of a terminal that is assumed.
	width = 79
)

// narrator tells the story: lines that stay, and on a terminal a last line that changes.
type narrator struct {
	live  bool
	began time.Time

	stop    context.CancelFunc // ends the watch; nil: there is none
	watches sync.WaitGroup

	mu   sync.Mutex
	out  io.Writer // +checklocks:mu
	last string    // +checklocks:mu
}

func newNarrator(out io.Writer, live bool, began time.Time) *narrator {
	return &narrator{live: live, began: began, out: out}
}

// say tells something. That it cannot be written is no reason to stop.
func (n *narrator) say(format string, args ...any) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.wipeLocked()
	_, _ = fmt.Fprintf(n.out, format+"\n", args...)
	n.drawLocked()
}

// step is say with the time, the text set in beside it.
func (n *narrator) step(format string, args ...any) {
	now := n.time() + "  "
	text := wrap(fmt.Sprintf(format, args...), strings.Repeat(" ", len(now)))
	n.say("%s%s", now, text[len(now):])
}

// time is how long the demo has run.
func (n *narrator) time() string { return fmt.Sprintf("%5.1f s", time.Since(n.began).Seconds()) }

// state changes the last line of a terminal.
func (n *narrator) state(format string, args ...any) {
	if !n.live {
		return
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.wipeLocked()
	n.last = n.time() + "  " + fmt.Sprintf(format, args...)
	if runes := []rune(n.last); len(runes) > width {
		n.last = string(runes[:width])
	}
	n.drawLocked()
}

// wipeLocked takes the last line away.
//
// +checklocks:n.mu
func (n *narrator) wipeLocked() {
	if n.last != "" {
		_, _ = fmt.Fprint(n.out, "\r\x1b[K")
	}
}

// drawLocked puts the last line back.
//
// +checklocks:n.mu
func (n *narrator) drawLocked() {
	if n.last != "" {
		_, _ = fmt.Fprint(n.out, n.last)
	}
}

// watch shows what live says until quiet is called.
func (n *narrator) watch(live func(context.Context) string) {
	if !n.live {
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	n.stop = cancel
	n.watches.Go(func() {
		tick := time.NewTicker(tickTime)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
				n.state("%s", live(ctx))
			}
		}
	})
}

// quiet ends the watch and takes the last line away.
func (n *narrator) quiet() {
	if n.stop != nil {
		n.stop()
		n.watches.Wait()
		n.stop = nil
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.wipeLocked()
	n.last = ""
}

// proofs tells what was proven.
func (n *narrator) proofs(list []Proof) {
	n.say("\nProofs")
	for _, p := range list {
		verdict := "ok    "
		if !p.OK {
			verdict = "FAILED"
		}
		n.say("  %s  %s", verdict, p.Claim)
		for _, line := range p.Evidence {
			n.say("%s", wrap(line, strings.Repeat(" ", 10)))
		}
	}
	n.say("")
}

// rates tells what it costs.
func (n *narrator) rates(r *Report) {
	n.say("What it costs: 4 KiB random writes through NBD, %d connections, %d in flight on\n"+
		"each. Daemon and clients share %s. Medians of %d; spread is (highest -\n"+
		"lowest) / median.\n", r.Connections, r.Depth, cpus(r.CPUs), r.Repetitions)
	n.say("  %-42s %10s %9s %8s", "", "writes/s", "of plain", "spread")
	for _, x := range r.Rates {
		n.say("  %-42s %10s %9.2f %7.0f%%", x.Name, count(int(x.PerSecond)), x.OfPlain, 100*x.Spread)
	}
	n.say("\nFirst writes with each copy engine: serialised, one worker as in the kernel, and\n" +
		"scaled, cowherd's own.\n")
	n.say("  %-42s %10s %9s %8s", "", "serialised", "scaled", "ratio")
	for _, x := range r.Engines {
		n.say("  %-42s %10s %9s %7.1fx", x.Where, count(int(x.Serialised)), count(int(x.Scaled)), x.Ratio)
	}
	n.say("")
}

func cpus(n int) string {
	if n == 1 {
		return "1 CPU"
	}
	return strconv.Itoa(n) + " CPUs"
}

// count is a number with its thousands apart.
func count(n int) string {
	digits := strconv.Itoa(n)
	for i := len(digits) - 3; i > 0; i -= 3 {
		digits = digits[:i] + "," + digits[i:]
	}
	return digits
}

// short is a time in two or three digits.
func short(d time.Duration) string {
	switch {
	case d >= time.Second:
		return fmt.Sprintf("%.1f s", d.Seconds())
	case d >= time.Millisecond:
		return fmt.Sprintf("%.3g ms", float64(d)/float64(time.Millisecond))
	}
	return fmt.Sprintf("%d µs", d.Microseconds())
}

// abbreviated is the beginning of a checksum.
func abbreviated(sum string) string { return sum[:min(len(sum), 16)] + "…" }

// wrap breaks text into lines of at most width, each set in by indent. Spaces within a line stay as they are.
func wrap(text, indent string) string {
	var lines []string
	line := ""
	for _, word := range strings.Split(text, " ") {
		if line != "" && utf8.RuneCountInString(indent+line+" "+word) > width {
			lines, line = append(lines, indent+line), ""
		}
		if line != "" {
			line += " "
		}
		line += word
	}
	return strings.Join(append(lines, indent+line), "\n")
}
