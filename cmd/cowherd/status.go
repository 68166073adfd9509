package main

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"cowherd/api"
	"cowherd/block"
	"cowherd/internal/size"
)

type statusCmd struct {
	outputFlags
	Name string `arg:"" optional:"" complete:"any" help:"Name of a device or snapshot; all, and the daemon, if none is given."`
	DM   bool   `name:"dm" help:"Print lines as \"dmsetup status\" does."`
}

func (statusCmd) Help() string {
	return `Examples:

    cowherd status
    cowherd status vm@nightly
    cowherd status vm@nightly --json | jq .snapshot.invalid
    cowherd status --dm
`
}

// daemonStatus is the answer without a name, as JSON.
type daemonStatus struct {
	Daemon  api.Version  `json:"daemon"`
	Devices []api.Device `json:"devices"`
}

func (c *statusCmd) Run(s *session) error {
	client, err := s.client()
	if err != nil {
		return err
	}
	defer client.Close()
	if c.DM {
		return c.printDM(s, client)
	}
	if c.Name != "" {
		d, err := client.Device(s, c.Name)
		switch {
		case err != nil:
			return err
		case c.JSON:
			return printJSON(s.stdout, d)
		}
		return printDevice(s.stdout, &d)
	}
	var all daemonStatus
	if all.Daemon, err = client.Version(s); err != nil {
		return err
	}
	if all.Devices, err = client.Devices(s); err != nil {
		return err
	}
	if c.JSON {
		return printJSON(s.stdout, all)
	}
	if err := printDaemon(s.stdout, &all.Daemon); err != nil {
		return err
	}
	for i := range all.Devices {
		if _, err := fmt.Fprintln(s.stdout); err != nil {
			return err
		}
		if err := printDevice(s.stdout, &all.Devices[i]); err != nil {
			return err
		}
	}
	return nil
}

// printDM prints what the device mapper would of what is there. With a name the line does not begin with it, as that of
// dmsetup does not.
func (c *statusCmd) printDM(s *session, client *api.Client) error {
	if c.JSON {
		return usagef("--dm and --json contradict each other")
	}
	if c.Name != "" {
		d, err := client.Device(s, c.Name)
		if err == nil && d.State == api.StateLost {
			err = fmt.Errorf("%s is lost: %s", c.Name, d.Lost)
		}
		if err != nil {
			return err
		}
		_, err = fmt.Fprintln(s.stdout, dmLine(&d))
		return err
	}
	devices, err := client.Devices(s)
	if err != nil {
		return err
	}
	for i := range devices {
		if d := &devices[i]; d.State != api.StateLost {
			if _, err := fmt.Fprintf(s.stdout, "%s: %s\n", d.Name, dmLine(d)); err != nil {
				return err
			}
		}
	}
	return nil
}

// dmLine is a line of "dmsetup status", which begins with the range of the target in sectors.
func dmLine(d *api.Device) string {
	return fmt.Sprintf("0 %d %s %s", block.SectorFloor(d.SizeBytes), d.Target, d.TargetStatus)
}

// sheet is a heading with named values below it.
type sheet struct{ table }

func newSheet(heading string) *sheet {
	t := &sheet{table{right: []bool{false, false}}}
	t.add(heading, " ")
	return t
}

// put adds a value, if there is one.
func (t *sheet) put(name, value string) {
	if value != "" {
		t.add("  "+name, value)
	}
}

func (t *sheet) putf(name, format string, args ...any) { t.put(name, fmt.Sprintf(format, args...)) }

func printDaemon(w io.Writer, v *api.Version) error {
	t := newSheet("cowherd " + orUnknown(v.Version))
	t.putf("process", "%d, since %s", v.PID, localTime(v.Started))
	t.put("state directory", v.StateDir)
	t.put("engine", v.Engine)
	for _, address := range v.NBD {
		t.put("NBD", address)
	}
	t.putf("last event", "%d", v.LastEvent)
	return t.write(w)
}

func printDevice(w io.Writer, d *api.Device) error {
	t := newSheet(d.Name)
	t.put("kind", d.Kind)
	t.put("state", d.State)
	t.put("lost", d.Lost)
	t.put("device", d.Device)
	if d.State == api.StateLost {
		return t.write(w)
	}
	t.put("size", exactSize(d.SizeBytes))
	t.putf("logical block", "%d bytes", d.LogicalBlockBytes)
	var options []string
	for _, o := range []struct {
		name string
		set  bool
	}{{"read-only", d.ReadOnly}, {"direct", d.Direct}} {
		if o.set {
			options = append(options, o.name)
		}
	}
	t.put("options", strings.Join(options, ", "))
	t.put("since", localTime(d.Since))
	t.put("snapshots", strings.Join(d.Snapshots, ", "))
	if d.Snapshot != nil {
		putSnapshot(t, d.Snapshot)
	}
	if d.Clone != nil {
		putClone(t, d.Clone)
	}
	for _, uri := range d.URIs {
		t.put("export", uri)
	}
	for i := range d.Users {
		putUser(t, &d.Users[i])
	}
	return t.write(w)
}

// putSnapshot adds what only snapshots have.
func putSnapshot(t *sheet, x *api.Snapshot) {
	t.put("origin", x.Origin)
	t.put("invalid", x.Invalid)
	t.put("chunk", size.Human(x.ChunkBytes))
	t.put("store", x.Store)
	t.put("kept", kept(x))
	t.put("COW space", share(x.AllocatedBytes, x.TotalBytes))
	t.put("when full", x.OnFull)
	if x.StalledRequests > 0 {
		t.putf("waiting", "%d requests, for room", x.StalledRequests)
	}
	if x.Merge != nil {
		t.put("merge", mergeState(&api.Device{Snapshot: x}))
	}
	t.putf("chunks", "%d copied, %d overwritten, %d in flight", x.CopiedChunks, x.OverwrittenChunks, x.PendingExceptions)
	t.put("table", exactSize(x.TableBytes))
	putKcopyd(t, &x.Kcopyd)
}

// putClone adds what only clones have.
func putClone(t *sheet, x *api.Clone) {
	source := x.Source
	if x.Detached {
		source += " (detached)"
	}
	t.put("source", source)
	t.put("metadata", x.Metadata)
	t.put("region", size.Human(x.RegionBytes))
	t.put("regions", hydrated(x))
	t.put("hydration", hydrationState(x))
	if x.SourceInUse {
		promote := "off"
		if x.PromoteOnRead {
			promote = "on"
		}
		t.putf("copying", "%d regions; at most %d, %d in one copy; %s, promote on read %s", x.Hydrating, x.Threshold, x.Batch, x.Order,
			promote)
	}
	if x.FailedRegions > 0 {
		t.putf("failed", "%d regions, the first: %s", x.FailedRegions, x.FirstError)
	}
	t.put("mode", x.Mode)
	t.put("cause", x.Cause)
	t.put("table", exactSize(x.TableBytes))
	putKcopyd(t, &x.Kcopyd)
}

// putKcopyd adds the counters of a copy engine.
func putKcopyd(t *sheet, k *api.Kcopyd) {
	t.putf("kcopyd", "%s: %d jobs, %d errors, %d in flight, %d waiting", k.Engine, k.Jobs, k.Errors, k.JobsInFlight,
		k.JobsWaiting)
	for i := range k.Methods {
		m := &k.Methods[i]
		t.putf("copied for "+m.Class, "%s by %s in %d pieces, %d errors; half took less than %.0f us, 99%% less than %.0f us",
			size.Human(int64(m.Bytes)), m.Method, m.Operations, m.Errors, m.P50Microseconds, m.P99Microseconds)
	}
	t.putf("kcopyd bytes", "%s read, %s written, buffers %s", size.Human(int64(k.ReadBytes)),
		size.Human(int64(k.WrittenBytes)), share(k.BuffersBytes, k.BuffersMaxBytes))
}

// kept tells whether a snapshot survives the daemon.
func kept(x *api.Snapshot) string {
	if x.Persistent {
		return "persistent"
	}
	return "transient"
}

// putUser adds a client and what it has asked for.
func putUser(t *sheet, u *api.User) {
	var parts []string
	for _, name := range slices.Sorted(maps.Keys(u.Commands)) {
		n := u.Commands[name]
		part := fmt.Sprintf("%d %s", n.Requests, name)
		if n.Bytes > 0 {
			part += " (" + size.Human(int64(n.Bytes)) + ")"
		}
		if n.Errors > 0 {
			part += fmt.Sprintf(" with %d errors", n.Errors)
		}
		parts = append(parts, part)
	}
	encrypted := ""
	if u.TLS {
		encrypted = ", TLS"
	}
	t.putf("user", "%s%s, since %s: %d in flight; %s", u.Client, encrypted, localTime(u.Since), u.InFlight,
		strings.Join(parts, ", "))
}

// localTime is a time for people.
func localTime(t time.Time) string { return t.Local().Format("2006-01-02 15:04:05") }

func orUnknown(s string) string {
	if s == "" {
		return "(unknown version)"
	}
	return s
}
