package api

import (
	"context"
	"net/http"
	"net/url"
	"strconv"
)

// DMBodyMax is the size in bytes of the largest request below Prefix/dm that a server reads: a table may be long.
const DMBodyMax = 4 << 20

// DMDevice is a device as the device mapper's tools show it: one that was made from a table, or one that the other
// operations of this API have made, which has its table from them (Managed).
type DMDevice struct {
	Name      string `json:"name"`
	UUID      string `json:"uuid,omitempty"`
	Major     uint32 `json:"major"`
	Minor     uint32 `json:"minor"`
	SizeBytes int64  `json:"size_bytes"`
	Suspended bool   `json:"suspended"`
	ReadOnly  bool   `json:"read_only"`
	Live      bool   `json:"live"`     // there is a live table
	Inactive  bool   `json:"inactive"` // there is an inactive table
	Deferred  bool   `json:"deferred"` // it is removed when nobody uses it any more
	Managed   bool   `json:"managed"`
	Open      int    `json:"open"`  // how many use it
	Event     uint32 `json:"event"` // the number of events so far

	Table         []DMTarget `json:"table"`
	InactiveTable []DMTarget `json:"inactive_table"`
	Dependencies  []DMDep    `json:"dependencies"` // of the live table, the last mentioned first
	// URIs are where the device is exported, one for each listening address.
	URIs []string `json:"uris,omitempty"`
}

// DMTarget is a line of a table.
type DMTarget struct {
	Start  uint64 `json:"start"`  // sector
	Length uint64 `json:"length"` // sectors
	Type   string `json:"type"`
	Table  string `json:"table"`  // its arguments
	Status string `json:"status"` // its state
}

// DMDep is a device that a table lies on.
type DMDep struct {
	Name  string `json:"name"`
	Major uint32 `json:"major"`
	Minor uint32 `json:"minor"`
}

// DMDeviceList is all devices, by name.
type DMDeviceList struct {
	Devices []DMDevice `json:"devices"`
}

// DMType is a type of target.
type DMType struct {
	Name    string `json:"name"`
	Version [3]int `json:"version"`
}

// DMTypeList is all types of targets.
type DMTypeList struct {
	Types []DMType `json:"types"`
}

// DMCreate asks for a device without a table.
type DMCreate struct {
	Name  string `json:"name"`
	UUID  string `json:"uuid,omitempty"`
	Minor *int   `json:"minor,omitempty"` // nil: any
}

// DMTable asks for a table to be put in the inactive slot.
type DMTable struct {
	Table    string `json:"table"` // lines
	ReadOnly bool   `json:"read_only,omitempty"`
}

// DMSuspend asks for a device to be suspended or resumed.
type DMSuspend struct {
	Suspended bool `json:"suspended"`
	// NoFlush: what was written before need not be durable.
	NoFlush bool `json:"no_flush,omitempty"`
}

// DMRename asks for another name or, if that is empty, for a UUID.
type DMRename struct {
	Name string `json:"name,omitempty"`
	UUID string `json:"uuid,omitempty"`
}

// DMMessage is a message to the target at a sector.
type DMMessage struct {
	Sector uint64   `json:"sector"`
	Words  []string `json:"words"`
}

// DMAnswer is what a target says to a message.
type DMAnswer struct {
	Answer string `json:"answer"`
}

// DMEvent is the number of events of a device.
type DMEvent struct {
	Event uint32 `json:"event"`
}

// dmPath is the path of a device below Prefix.
func dmPath(name, what string) string { return "/dm/devices/" + url.PathEscape(name) + what }

// DMDevices lists devices by name.
func (c *Client) DMDevices(ctx context.Context) ([]DMDevice, error) {
	list, err := call[DMDeviceList](ctx, c, http.MethodGet, "/dm/devices", nil)
	return list.Devices, err
}

// DMTypes lists the types of targets.
func (c *Client) DMTypes(ctx context.Context) ([]DMType, error) {
	list, err := call[DMTypeList](ctx, c, http.MethodGet, "/dm/targets", nil)
	return list.Types, err
}

// DMCreate makes a device without a table.
func (c *Client) DMCreate(ctx context.Context, r DMCreate) error {
	_, err := call[struct{}](ctx, c, http.MethodPost, "/dm/devices", r)
	return err
}

// DMLoad puts a table in a device's inactive slot.
func (c *Client) DMLoad(ctx context.Context, name string, r DMTable) error {
	_, err := call[struct{}](ctx, c, http.MethodPut, dmPath(name, "/table"), r)
	return err
}

// DMClear empties a device's inactive slot.
func (c *Client) DMClear(ctx context.Context, name string) error {
	_, err := call[struct{}](ctx, c, http.MethodDelete, dmPath(name, "/table"), nil)
	return err
}

// DMSuspend suspends a device, or resumes it: with its inactive table, if there is one.
func (c *Client) DMSuspend(ctx context.Context, name string, r DMSuspend) error {
	_, err := call[struct{}](ctx, c, http.MethodPut, dmPath(name, "/suspended"), r)
	return err
}

// DMRemove removes a device. EBUSY: it is in use; deferred has it removed when that is over.
func (c *Client) DMRemove(ctx context.Context, name string, deferred bool) error {
	_, err := call[struct{}](ctx, c, http.MethodDelete, dmPath(name, "?deferred="+strconv.FormatBool(deferred)), nil)
	return err
}

// DMRename gives a device another name, or a UUID.
func (c *Client) DMRename(ctx context.Context, name string, r DMRename) error {
	_, err := call[struct{}](ctx, c, http.MethodPut, dmPath(name, "/name"), r)
	return err
}

// DMMessage hands a message to a target.
func (c *Client) DMMessage(ctx context.Context, name string, r DMMessage) (string, error) {
	answer, err := call[DMAnswer](ctx, c, http.MethodPost, dmPath(name, "/message"), r)
	return answer.Answer, err
}

// DMWait waits until the number of a device's events is another than seen.
func (c *Client) DMWait(ctx context.Context, name string, seen uint32) (uint32, error) {
	e, err := call[DMEvent](ctx, c, http.MethodGet, dmPath(name, "/event?seen="+strconv.FormatUint(uint64(seen), 10)), nil)
	return e.Event, err
}
