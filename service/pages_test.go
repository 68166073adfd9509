package service

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"cowherd/api"
)

// fetch gets a page of d's HTTP address.
func fetch(t testing.TB, d *Daemon, path string) (status int, text string) {
	t.Helper()
	c := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	r, err := c.Get("http://" + d.web.Addr().String() + path)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	body, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return r.StatusCode, string(body)
}

// value is that of a metric with its labels; -1: it is not there.
func value(t testing.TB, d *Daemon, metric string) float64 {
	t.Helper()
	_, text := fetch(t, d, "/metrics")
	m := regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(metric) + ` (\S+)$`).FindStringSubmatch(text)
	if m == nil {
		return -1
	}
	v, err := strconv.ParseFloat(m[1], 64)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func TestPages(t *testing.T) {
	c := testConfig(t)
	c.HTTP = "127.0.0.1:0"
	d := startDaemon(t, c)
	for path, want := range map[string]string{"/": "/metrics", "/healthz": "ok\n", "/metrics": "cowherd_build_info"} {
		if status, text := fetch(t, d, path); status != 200 || !strings.Contains(text, want) {
			t.Errorf("%s: %d, %q", path, status, text)
		}
	}
	if status, _ := fetch(t, d, "/v1/devices"); status != 404 {
		t.Errorf("the control API answers %d", status)
	}
	again := testConfig(t)
	again.HTTP = d.web.Addr().String()
	if _, err := New(again); !errors.Is(err, syscall.EADDRINUSE) || !strings.Contains(fmt.Sprint(err), again.HTTP) {
		t.Errorf("an address that is taken: %v", err)
	}
}

// TestMetrics: counters of exports grow and outlive connections, and go with their device.
func TestMetrics(t *testing.T) {
	c := testConfig(t)
	c.HTTP = "127.0.0.1:0"
	d := startDaemon(t, c)
	if _, err := d.Attach(api.AttachRequest{Name: "vm", Device: "mem:1M"}); err != nil {
		t.Fatal(err)
	}
	if _, err := d.TakeSnapshot(t.Context(), api.SnapshotRequest{Name: "vm@a", Store: "mem"}); err != nil {
		t.Fatal(err)
	}
	const written = `cowherd_export_bytes_total{command="write",device="vm"}`
	for i := range 3 {
		user := mustDialNBD(t, d, "vm")
		user.write(t, int64(i)*8192, make([]byte, 8192))
		if got := value(t, d, written); got != float64(i+1)*8192 {
			t.Errorf("with connection %d: %v bytes written", i, got)
		}
		user.bye(t)
		if got := value(t, d, written); got != float64(i+1)*8192 {
			t.Errorf("after connection %d: %v bytes written", i, got)
		}
	}
	for metric, want := range map[string]float64{
		`cowherd_export_connections_total{device="vm"}`:                                     3,
		`cowherd_copy_bytes_total{class="cow",device="vm@a",method="readwrite"}`:            3 * 8192,
		`cowherd_copy_duration_seconds_count{class="cow",device="vm@a",method="readwrite"}`: -2,
		`cowherd_snapshot_copied_chunks_total{device="vm@a"}`:                               6,
		`cowherd_device_info{device="vm@a",kind="snapshot",state="valid"}`:                  1,
		`cowherd_throttle_share_ratio{class="hydration"}`:                                   1,
	} {
		if got := value(t, d, metric); got != want && want >= 0 || got < 0 {
			t.Errorf("%s: %v, want %v", metric, got, want)
		}
	}
	if err := d.RemoveSnapshot(t.Context(), "vm@a", true); err != nil {
		t.Fatal(err)
	}
	if err := d.Detach(t.Context(), "vm"); err != nil {
		t.Fatal(err)
	}
	if got := value(t, d, written); got != -1 {
		t.Errorf("after its end: %v", got)
	}
	if n := len(d.exports.server.Totals()); n != 0 {
		t.Errorf("%d exports are remembered", n)
	}
}

// TestCloneMetrics: a clone shows its regions and its engine, and, as long as it uses a remote source, the connections.
func TestCloneMetrics(t *testing.T) {
	server := startDaemon(t, testConfig(t))
	if _, err := server.Attach(api.AttachRequest{Name: "base", Device: image(t, cloneBytes), ReadOnly: true}); err != nil {
		t.Fatal(err)
	}
	c := testConfig(t)
	c.HTTP = "127.0.0.1:0"
	d := startDaemon(t, c)
	var uri string
	if x, err := server.Device("base"); err != nil || len(x.URIs) == 0 {
		t.Fatal(x.URIs, err)
	} else {
		uri = x.URIs[0]
	}
	dest := filepath.Join(t.TempDir(), "web.img")
	makeClone(t, d, "web", dest, api.CloneRequest{Source: uri, NoHydration: true, RegionBytes: 16 << 10})
	put(t, d, "web", 5, pattern(1, 1))
	want := func(wanted map[string]float64) {
		t.Helper()
		for metric, want := range wanted {
			if got := value(t, d, metric); got != want {
				t.Errorf("%s: %v, want %v", metric, got, want)
			}
		}
	}
	want(map[string]float64{
		`cowherd_clone_regions{device="web"}`:                         64,
		`cowherd_clone_hydrated_regions{device="web"}`:                1,
		`cowherd_clone_failed_regions{device="web"}`:                  0,
		`cowherd_clone_source_in_use{device="web"}`:                   1,
		`cowherd_clone_writable{device="web"}`:                        1,
		`cowherd_copy_jobs_total{device="web"}`:                       1,
		`cowherd_remote_connections_wanted{device="web"}`:             sourceConns,
		`cowherd_remote_reconnects_total{device="web"}`:               0,
		`cowherd_device_info{device="web",kind="clone",state="live"}`: 1,
	})
	running := true
	if _, err := d.Hydrate(t.Context(), "web", api.HydrationRequest{Running: &running}); err != nil {
		t.Fatal(err)
	}
	waitEvent(t, d, api.EventCloneHydrated, "web")
	want(map[string]float64{
		`cowherd_clone_hydrated_regions{device="web"}`: 64,
		`cowherd_clone_source_in_use{device="web"}`:    0,
	})
}

func TestCopyLimits(t *testing.T) {
	config := testConfig(t)
	rate := int64(5 << 20)
	config.Throttle = map[string]api.ThrottleRequest{"hydration": {RateBytes: &rate}}
	d := startDaemon(t, config)
	c := newClient(t, d)
	ctx := t.Context()
	share := 30
	set, err := c.SetThrottle(ctx, "hydration", api.ThrottleRequest{SharePercent: &share})
	if err != nil || set.RateBytes != rate || set.SharePercent != share || set.Class != "hydration" {
		t.Errorf("%+v, %v", set, err)
	}
	all, err := c.Throttle(ctx)
	if err != nil || len(all.Classes) != 4 || all.Classes[1] != set || all.Classes[0].RateBytes != 0 {
		t.Errorf("%+v, %v", all, err)
	}
	for _, wrong := range []int{-1, 101} {
		if _, err := c.SetThrottle(ctx, "cow", api.ThrottleRequest{SharePercent: &wrong}); !errors.Is(err, syscall.EINVAL) {
			t.Errorf("a share of %d: %v", wrong, err)
		}
	}
	if _, err := c.SetThrottle(ctx, "disks", api.ThrottleRequest{}); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("another class: %v", err)
	}
	bad := testConfig(t)
	bad.Throttle = map[string]api.ThrottleRequest{"disks": {}}
	if _, err := New(bad); !errors.Is(err, syscall.EINVAL) || !strings.Contains(err.Error(), `"disks"`) {
		t.Errorf("a configuration with another class: %v", err)
	}
}
