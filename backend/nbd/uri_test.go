package nbd

import (
	"errors"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestParseURI(t *testing.T) {
	tests := []struct {
		uri  string
		want Config // without TLS
		name string // TLS server name; "-": plain
	}{
		{"nbd://example.com", Config{Network: "tcp", Address: "example.com:10809"}, "-"},
		{"nbd://example.com/", Config{Network: "tcp", Address: "example.com:10809"}, "-"},
		{"nbd://example.com:1234/disk", Config{Network: "tcp", Address: "example.com:1234", Export: "disk"}, "-"},
		{"nbd://example.com//disk", Config{Network: "tcp", Address: "example.com:10809", Export: "/disk"}, "-"},
		{"nbd://example.com/hello%20world", Config{Network: "tcp", Address: "example.com:10809", Export: "hello world"}, "-"},
		{"nbd://[::1]/vm@nightly", Config{Network: "tcp", Address: "[::1]:10809", Export: "vm@nightly"}, "-"},
		{"nbd+unix:///disk?socket=/run/nbd.sock", Config{Network: "unix", Address: "/run/nbd.sock", Export: "disk"}, "-"},
		{"nbd+unix:///?socket=nbd.sock", Config{Network: "unix", Address: "nbd.sock"}, "-"},
		{"nbd+unix://?socket=a%26b", Config{Network: "unix", Address: "a&b"}, "-"},
		{"nbd+unix:///?socket=%00abstract", Config{Network: "unix", Address: "\x00abstract"}, "-"},
		{"nbds://example.com/x", Config{Network: "tcp", Address: "example.com:10809", Export: "x"}, "example.com"},
		{"nbds://10.0.0.1/x?tls-hostname=disks&tls-type=x509",
			Config{Network: "tcp", Address: "10.0.0.1:10809", Export: "x"}, "disks"},
		{"nbds+unix:///x?socket=s", Config{Network: "unix", Address: "s", Export: "x"}, "localhost"},
		{"nbd://h/x?connections=4&reconnect-timeout=90&request-timeout=1500ms&keeps-writes=1",
			Config{Network: "tcp", Address: "h:10809", Export: "x", Connections: 4, ReconnectTimeout: 90 * time.Second,
				RequestTimeout: 1500 * time.Millisecond, KeepsWrites: true}, "-"},
		{"nbds+unix:///x?socket=s&reconnect-timeout=0&request-timeout=0s&keeps-writes=false",
			Config{Network: "unix", Address: "s", Export: "x"}, "localhost"},
		{"nbds+unix:///x?socket=s&tls-verify-peer=0", Config{Network: "unix", Address: "s", Export: "x"}, ""},
	}
	for _, test := range tests {
		c, err := ParseURI(test.uri)
		if err != nil {
			t.Errorf("%s: %v", test.uri, err)
			continue
		}
		name := "-"
		if c.TLS != nil {
			name = c.TLS.ServerName
			if c.TLS.InsecureSkipVerify != strings.Contains(test.uri, "verify-peer=0") {
				t.Errorf("%s: verification is wrong", test.uri)
			}
		}
		c.TLS = nil
		if test.want.ReconnectTimeout == 0 && !strings.Contains(test.uri, "timeout") {
			test.want.ReconnectTimeout, test.want.RequestTimeout = DefaultReconnectTimeout, DefaultRequestTimeout
		}
		if !reflect.DeepEqual(c, test.want) || name != test.name {
			t.Errorf("%s: got %+v and TLS name %q", test.uri, c, name)
		}
	}
}

func TestParseURIErrors(t *testing.T) {
	for uri, want := range map[string]string{
		"disk.img":                              "scheme",
		"http://example.com/disk":               "scheme",
		"nbd:///disk":                           "host is missing",
		"nbd://example.com/disk?socket=x":       `"socket" has no meaning`,
		"nbd://example.com/disk?tls-type=psk":   `"tls-type" has no meaning`,
		"nbd://user@example.com/disk":           "user names",
		"nbd://example.com/disk#part":           "fragment",
		"nbd://example.com:port/disk":           "invalid port",
		"nbd://example.com/%zz":                 "invalid URL escape",
		"nbd+unix:///disk":                      "socket=PATH is missing",
		"nbd+unix://disk?socket=x":              "three slashes",
		"nbd+unix:///disk?socket=x&socket=y":    "given 2 times",
		"nbd+unix:///disk?socket=x&color=red":   `"color" has no meaning`,
		"nbd+unix:///disk?socket=x;y":           "semicolon",
		"nbds://example.com/?tls-type=psk":      "only x509",
		"nbds://example.com/?tls-verify-peer=2": "neither 0 nor 1",
		"nbds://example.com/?tls-psk-file=keys": "Go's TLS has none",
		"nbd://h/?connections=0":                "connections=0 is not from 1 to 64",
		"nbd://h/?connections=many":             "connections=many",
		"nbd://h/?reconnect-timeout=-1s":        "reconnect-timeout=-1s is not a time",
		"nbd://h/?request-timeout=soon":         "request-timeout=soon is not a time",
		"nbd://h/?keeps-writes=maybe":           "keeps-writes=maybe is neither 0 nor 1",
		"nbd://h/" + strings.Repeat("x", 4097):  "longer than",
	} {
		if _, err := ParseURI(uri); err == nil || !strings.Contains(err.Error(), want) || !errors.Is(err, syscall.EINVAL) {
			t.Errorf("%s: got error %v, want one with %q", uri, err, want)
		}
	}
	if _, err := ParseURI("nbds://h/?tls-certificates=/nowhere"); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("missing certificates: %v", err)
	}
}

func TestURI(t *testing.T) {
	for _, uri := range []string{
		"nbd://example.com:10809/disk", "nbd+unix:///vm@nightly?socket=/run/nbd.sock", "nbds://[::1]:1/",
	} {
		c, err := ParseURI(uri)
		if err != nil {
			t.Fatal(err)
		}
		if got := c.URI(); got != uri {
			t.Errorf("got %s, want %s", got, uri)
		}
	}
}

func FuzzParseURI(f *testing.F) {
	for _, s := range []string{
		"nbd://example.com:10809/disk", "nbd+unix:///disk?socket=/run/nbd.sock", "nbds://[::1]/?tls-verify-peer=0",
		"nbd://h/?connections=9&request-timeout=1h&reconnect-timeout=1&keeps-writes=1",
		"nbds+unix:///a%00b?socket=x&tls-hostname=h", "nbd://@:0/#", "nbd+unix://x?socket=%zz",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if strings.Contains(s, "tls-certificates") {
			return // reads files
		}
		c, err := ParseURI(s)
		if err != nil {
			return
		}
		again, err := ParseURI(c.URI())
		if c.TLS != nil || err != nil && strings.ContainsAny(c.Address, "%") {
			return // parameters of TLS and zones are not repeated
		}
		if err != nil || again.Address != c.Address || again.Export != c.Export || again.Network != c.Network {
			t.Errorf("%q became %q (%v)", s, c.URI(), err)
		}
	})
}
