package main

import (
	"fmt"
	"io"
	"strconv"
	"strings"

	"cowherd/api"
	"cowherd/internal/size"
)

type throttleCmd struct {
	outputFlags
	Class string     `enum:",cow,hydration,merge,bulk" default:"" placeholder:"CLASS" help:"Class of copies: cow (breaking chunks for writes), hydration (filling clones), merge or bulk. Without it all are shown."`
	Rate  *size.Size `placeholder:"SIZE" help:"Bytes that the class may copy in a second; 0: no limit."`
	Burst *size.Size `placeholder:"SIZE" help:"Bytes that may be saved up while less is copied; 0: those of 100 ms."`
	Share *percent   `placeholder:"PERCENT" help:"Share of time in which something may be copied, 1 to 100%; 0 or 100: no limit."`
	Off   bool       `help:"Lift all limits of the class, or of all classes."`
}

// percent is a share of 100, with or without a percent sign.
type percent int

// UnmarshalText reads 50 or 50%.
func (p *percent) UnmarshalText(text []byte) error {
	n, err := strconv.Atoi(strings.TrimSuffix(string(text), "%"))
	if err != nil || n < 0 || n > 100 {
		return fmt.Errorf("%q is not a share from 0 to 100%%", text)
	}
	*p = percent(n)
	return nil
}

func (throttleCmd) Help() string {
	return `Shows and sets, while the daemon runs, what copies are limited to: each class of copies by itself, those of all
devices together. A limit holds until the daemon ends; the configuration file has those that it begins with.

Examples:

    cowherd throttle
    cowherd throttle --class hydration --rate 100M
    cowherd throttle --class merge --share 50%
    cowherd throttle --class hydration --off
    cowherd throttle --off
`
}

func (c *throttleCmd) Run(s *session) error {
	changes := c.Rate != nil || c.Burst != nil || c.Share != nil
	switch {
	case c.Off && changes:
		return usagef("--off contradicts --rate, --burst and --share")
	case changes && c.Class == "":
		return usagef("--class is missing: which copies are to be limited?")
	}
	client, err := s.client()
	if err != nil {
		return err
	}
	defer client.Close()
	if c.Off || changes {
		if err := c.set(s, client); err != nil {
			return err
		}
	}
	t, err := client.Throttle(s)
	if err != nil {
		return err
	}
	if c.Class != "" {
		t.Classes = onlyClass(t.Classes, c.Class)
	}
	if c.JSON {
		return printJSON(s.stdout, t)
	}
	return printThrottle(s.stdout, &t)
}

// set makes the changes that the flags ask for.
func (c *throttleCmd) set(s *session, client *api.Client) error {
	r, classes := c.request(), []string{c.Class}
	if c.Class == "" {
		t, err := client.Throttle(s)
		if err != nil {
			return err
		}
		classes = classes[:0]
		for i := range t.Classes {
			classes = append(classes, t.Classes[i].Class)
		}
	}
	for _, class := range classes {
		if _, err := client.SetThrottle(s, class, r); err != nil {
			return err
		}
	}
	return nil
}

// request is what the flags ask for.
func (c *throttleCmd) request() api.ThrottleRequest {
	if c.Off {
		return api.ThrottleRequest{RateBytes: new(int64), BurstBytes: new(int64), SharePercent: new(int)}
	}
	var r api.ThrottleRequest
	if c.Rate != nil {
		r.RateBytes = (*int64)(c.Rate)
	}
	if c.Burst != nil {
		r.BurstBytes = (*int64)(c.Burst)
	}
	if c.Share != nil {
		r.SharePercent = (*int)(c.Share)
	}
	return r
}

// onlyClass leaves one class.
func onlyClass(classes []api.ThrottleClass, name string) []api.ThrottleClass {
	for i := range classes {
		if classes[i].Class == name {
			return classes[i : i+1]
		}
	}
	return nil
}

func printThrottle(w io.Writer, t *api.Throttle) error {
	out := table{right: []bool{false, true, true, true, true, true}}
	out.add("CLASS", "RATE", "BURST", "SHARE", "WAITING", "WAITED")
	for i := range t.Classes {
		c := &t.Classes[i]
		rate, burst, share := "-", "-", "-"
		if c.RateBytes > 0 {
			rate = size.Human(c.RateBytes) + "/s"
			burst = "100 ms"
			if c.BurstBytes > 0 {
				burst = size.Human(c.BurstBytes)
			}
		}
		if c.SharePercent > 0 && c.SharePercent < 100 {
			share = fmt.Sprintf("%d%%", c.SharePercent)
		}
		out.add(c.Class, rate, burst, share, strconv.Itoa(c.Waiting), strconv.FormatUint(c.Waits, 10))
	}
	return out.write(w)
}
