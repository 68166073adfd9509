package service

import (
	"context"
	"net/http"
	"strconv"
	"syscall"
	"time"

	"cowherd/api"
)

// handleMapped serves the paths of mapped devices; waits end with streaming.
func (c *control) handleMapped(handle func(pattern string, h operation), streaming context.Context) {
	d := c.daemon
	const all, one = api.Prefix + "/dm/devices", api.Prefix + "/dm/devices/{name}"
	handle("GET "+api.Prefix+"/dm/targets", func(http.ResponseWriter, *http.Request) (any, error) {
		return api.DMTypeList{Types: d.MappedTypes()}, nil
	})
	handle("GET "+all, func(http.ResponseWriter, *http.Request) (any, error) {
		return api.DMDeviceList{Devices: d.MappedDevices()}, nil
	})
	handle("POST "+all, body(api.DMBodyMax, func(_ *http.Request, b api.DMCreate) (any, error) { return nil, d.CreateMapped(b) }))
	handle("DELETE "+one, func(_ http.ResponseWriter, r *http.Request) (any, error) {
		deferred, err := boolValue(r, "deferred", false)
		if err != nil {
			return nil, err
		}
		return nil, d.RemoveMapped(r.Context(), r.PathValue("name"), deferred)
	})
	handle("PUT "+one+"/table", body(api.DMBodyMax, func(r *http.Request, b api.DMTable) (any, error) {
		return nil, d.LoadMapped(r.Context(), r.PathValue("name"), b)
	}))
	handle("DELETE "+one+"/table", func(_ http.ResponseWriter, r *http.Request) (any, error) {
		return nil, d.ClearMapped(r.Context(), r.PathValue("name"))
	})
	handle("PUT "+one+"/suspended", body(api.DMBodyMax, func(r *http.Request, b api.DMSuspend) (any, error) {
		return nil, d.SuspendMapped(r.Context(), r.PathValue("name"), b)
	}))
	handle("PUT "+one+"/name", body(api.DMBodyMax, func(r *http.Request, b api.DMRename) (any, error) {
		return nil, d.RenameMapped(r.Context(), r.PathValue("name"), b)
	}))
	handle("POST "+one+"/message", body(api.DMBodyMax, func(r *http.Request, b api.DMMessage) (any, error) {
		return d.MessageMapped(r.Context(), r.PathValue("name"), b)
	}))
	handle("GET "+one+"/event", func(w http.ResponseWriter, r *http.Request) (any, error) {
		return c.waitMapped(w, r, streaming)
	})
}

// waitMapped waits for an event of a device, as one of the event streams.
func (c *control) waitMapped(w http.ResponseWriter, r *http.Request, streaming context.Context) (any, error) {
	seen, err := strconv.ParseUint(r.URL.Query().Get("seen"), 10, 32)
	if err != nil {
		return nil, api.Errorf(syscall.EINVAL, "seen=%q: the number of an event is wanted", r.URL.Query().Get("seen"))
	}
	release, err := c.takeStream()
	if err != nil {
		return nil, err
	}
	defer release()
	if err := http.NewResponseController(w).SetReadDeadline(time.Time{}); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	defer context.AfterFunc(streaming, cancel)()
	return c.daemon.WaitMapped(ctx, r.PathValue("name"), uint32(seen))
}
