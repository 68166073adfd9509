package main

import (
	"bytes"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"cowherd/export/nbd"
)

func TestReadSettings(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "cowherd.toml")
	text := `
control = "run/control.sock"
state = "/var/state"
nbd = ["unix:run/nbd.sock", "tcp:127.0.0.1:10809", "unix:/run/x"]
tls = "allow"
tls_certificates = "pki"
tls_verify_peer = true
engine = "serialised"
log_format = "json"
log_level = "debug"
http = "127.0.0.1:9479"

[throttle.hydration]
rate = "100M"
burst = "1MiB"
share = "50%"

[throttle.merge]
share = "25"

[[device]]
name = "vm"
path = "vm.img"
direct = true

[[device]]
name = "scratch"
path = "mem:1GiB"
read_only = true
`
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := readSettings(path)
	if err != nil {
		t.Fatal(err)
	}
	want := settings{
		Control: dir + "/run/control.sock", State: "/var/state",
		NBD: []string{"unix:" + dir + "/run/nbd.sock", "tcp:127.0.0.1:10809", "unix:/run/x"},
		TLS: "allow", TLSCertificates: dir + "/pki", TLSVerifyPeer: true, Engine: "serialised",
		LogFormat: "json", LogLevel: "debug", HTTP: "127.0.0.1:9479",
		Throttle: map[string]throttleSetting{
			"hydration": {Rate: 100 << 20, Burst: 1 << 20, Share: 50}, "merge": {Share: 25},
		},
		Devices: []deviceSetting{
			{Name: "vm", Path: dir + "/vm.img", Direct: true}, {Name: "scratch", Path: "mem:1GiB", ReadOnly: true},
		},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	flags := settings{State: "/other", NBD: []string{"unix:/y"}, Engine: "scaled"}
	merged := flags.over(got)
	if merged.State != "/other" || len(merged.NBD) != 1 || merged.Engine != "scaled" || merged.LogLevel != "debug" ||
		merged.HTTP == "" || len(merged.Throttle) != 2 ||
		!merged.TLSVerifyPeer || len(merged.Devices) != 2 {
		t.Errorf("merged %+v", merged)
	}
}

// TestSettingsErrors: what is wrong in a file is named, with its line.
func TestSettingsErrors(t *testing.T) {
	path := filepath.Join(t.TempDir(), "cowherd.toml")
	for _, test := range []struct{ text, want string }{
		{"\n\ncolour = 1\n", `cowherd.toml:3: unknown key "colour"`},
		{"state = \"/x\"\n[[device]]\nname = \"a\"\npath = \"b\"\nsize = 5\n", `cowherd.toml:5: unknown key "device.size"`},
		{"state = 5\n", `cowherd.toml:1: key "state"`},
		{"nbd = \"unix:/x\"\n", "cowherd.toml:1"},
		{"state = \n", "cowherd.toml:1"},
		{"state = \"a\"\nstate = \"b\"\n", "cowherd.toml:2"},
		{"[throttle.merge]\nrate = \"fast\"\n", "cowherd.toml:2"},
		{"[throttle.merge]\nspeed = \"1M\"\n", `cowherd.toml:2: unknown key "throttle.merge.speed"`},
		{"[[device]]\nname = \"a\"\n", "device number 1: name and path are needed"},
	} {
		if err := os.WriteFile(path, []byte(test.text), 0o600); err != nil {
			t.Fatal(err)
		}
		cowherd(t, "serve", "--config", path).want(t, exitError, "", test.want)
	}
	cowherd(t, "serve", "--config", path+".none").want(t, exitError, "", "no such file")
}

// TestServeErrors: what keeps the daemon from starting is an error that names it.
func TestServeErrors(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "cowherd.toml")
	base := []string{"serve", "--config", path, "--control", dir + "/c.sock", "--state", dir + "/state"}
	for _, test := range []struct {
		text, args string
		status     int
		want       string
	}{
		{"engine = \"steam\"", "", exitError, `engine "steam"`},
		{"log_level = \"loud\"", "", exitUsage, `log level "loud"`},
		{"log_format = \"xml\"", "", exitUsage, `log format "xml"`},
		{"tls = \"perhaps\"", "", exitUsage, `TLS mode "perhaps"`},
		{"", "--tls-certificates /nowhere", exitError, "/nowhere"},
		{"", "--nbd udp:x", exitError, `address "udp:x"`},
		{"[[device]]\nname = \"vm\"\npath = \"none.img\"", "", exitError, dir + "/none.img: no such file"},
		{"[[device]]\nname = \"v/m\"\npath = \"mem:1M\"", "", exitError, "character 2"},
	} {
		if err := os.WriteFile(path, []byte(test.text), 0o600); err != nil {
			t.Fatal(err)
		}
		r := cowherd(t, append(base, strings.Fields(test.args)...)...)
		if r.status != test.status || !strings.Contains(r.stderr, test.want) {
			t.Errorf("%q %s: status %d, %q; want %d and %q", test.text, test.args, r.status, r.stderr, test.status, test.want)
		}
	}
	left, err := os.ReadDir(dir)
	if err != nil || len(left) != 2 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// FuzzSettings: no configuration file makes the reader panic, and one with an unknown key is not taken.
func FuzzSettings(f *testing.F) {
	for _, s := range []string{"state = \"x\"", "[[device]]\nname=\"a\"\npath=\"b\"", "nbd = [1]", "x = ", "\x00", "[device]"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		var c settings
		if err := decodeSettings([]byte(s), &c); err != nil {
			return
		}
		for _, d := range c.Devices {
			if d.Name == "" || d.Path == "" {
				t.Fatalf("%q is taken as %+v", s, c)
			}
		}
	})
}

// TestFlagsFrom: paths in flags count from the working directory, and flags win over the file.
func TestFlagsFrom(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	if err := os.Mkdir("etc", 0o700); err != nil {
		t.Fatal(err)
	}
	text := "state = \"state\"\nengine = \"serialised\"\nlog_level = \"warn\"\n"
	if err := os.WriteFile("etc/c.toml", []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	c := serveCmd{Config: "etc/c.toml", NBD: []string{"unix:nbd.sock"}, LogLevel: "info"}
	got, err := c.settings("control.sock")
	want := settings{
		Control: dir + "/control.sock", State: dir + "/etc/state", NBD: []string{"unix:" + dir + "/nbd.sock"},
		Engine: "serialised", LogLevel: "info",
	}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v, %v\nwant %+v", got, err, want)
	}
}

func TestTLSMode(t *testing.T) {
	for _, test := range []struct {
		mode, certificates string
		verify             bool
		want               nbd.TLSMode
		refused            bool
	}{
		{"", "", false, nbd.TLSOff, false},
		{"", "/pki", false, nbd.TLSRequire, false},
		{"", "/pki", true, nbd.TLSRequire, false},
		{"allow", "/pki", false, nbd.TLSAllow, false},
		{"require", "/pki", true, nbd.TLSRequire, false},
		{"off", "/pki", false, nbd.TLSOff, false},
		{"off", "/pki", true, 0, true},
		{"allow", "", false, 0, true},
		{"", "", true, 0, true},
		{"on", "/pki", false, 0, true},
	} {
		got, err := tlsMode(&settings{TLS: test.mode, TLSCertificates: test.certificates, TLSVerifyPeer: test.verify})
		if refused := errors.As(err, new(usageError)); refused != test.refused || !refused && got != test.want {
			t.Errorf("%+v: %v, %v", test, got, err)
		}
	}
}

func TestWarnOpen(t *testing.T) {
	for address, want := range map[string]bool{
		"unix:/x": false, "tcp:127.0.0.1:1": false, "tcp:[::1]:1": false, "tcp:localhost:1": false,
		"tcp::10809": true, "tcp:0.0.0.0:1": true, "tcp:example.org:1": true,
	} {
		var log bytes.Buffer
		warnOpen([]string{address}, nbd.TLSAllow, slog.New(slog.NewTextHandler(&log, nil)))
		if got := log.Len() > 0; got != want {
			t.Errorf("%s: warned %v", address, got)
		}
		log.Reset()
		if warnOpen([]string{address}, nbd.TLSRequire, slog.New(slog.NewTextHandler(&log, nil))); log.Len() > 0 {
			t.Errorf("%s: warned although TLS is required", address)
		}
	}
}

func TestDefaults(t *testing.T) {
	t.Setenv("XDG_RUNTIME_DIR", "/run/user/7")
	t.Setenv("XDG_STATE_HOME", "/home/x/state")
	control, state := "/run/user/7/cowherd/control.sock", "/home/x/state/cowherd"
	if os.Geteuid() == 0 {
		control, state = "/run/cowherd/control.sock", "/var/lib/cowherd"
	}
	if got, err := defaultControl(); err != nil || got != control {
		t.Errorf("control %q, %v", got, err)
	}
	if got, err := defaultState(); err != nil || got != state {
		t.Errorf("state %q, %v", got, err)
	}
}
