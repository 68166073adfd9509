package main

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"cowherd/api"
	"cowherd/internal/size"
)

type statusCmd struct {
	outputFlags
	Name string `arg:"" optional:"" complete:"any" help:"Name of a device or snapshot; all, and the daemon, if none is given."`
}

func (statusCmd) Help() string {
	return `Examples:

    cowherd status
    cowherd status vm@nightly
    cowherd status vm@nightly --json | jq .snapshot.invalid
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
	t.put("device", d.Device)
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
	t.put("COW space", share(x.AllocatedBytes, x.TotalBytes))
	t.putf("chunks", "%d copied, %d overwritten, %d in flight", x.CopiedChunks, x.OverwrittenChunks, x.PendingExceptions)
	t.put("table", exactSize(x.TableBytes))
	k := &x.Kcopyd
	t.putf("kcopyd", "%s: %d jobs, %d errors, %d in flight, %d waiting", k.Engine, k.Jobs, k.Errors, k.JobsInFlight,
		k.JobsWaiting)
	t.putf("kcopyd bytes", "%s read, %s written, buffers %s", size.Human(int64(k.ReadBytes)),
		size.Human(int64(k.WrittenBytes)), share(k.BuffersBytes, k.BuffersMaxBytes))
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
