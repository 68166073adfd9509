package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/pelletier/go-toml/v2"

	"cowherd/internal/size"
)

// settings is what "cowherd serve" can be told, by flags or by a configuration file.
type settings struct {
	Control         string   `toml:"control"`
	State           string   `toml:"state"`
	NBD             []string `toml:"nbd"`
	TLS             string   `toml:"tls"`
	TLSCertificates string   `toml:"tls_certificates"`
	TLSVerifyPeer   bool     `toml:"tls_verify_peer"`
	Engine          string   `toml:"engine"`
	LogFormat       string   `toml:"log_format"`
	LogLevel        string   `toml:"log_level"`
	HTTP            string   `toml:"http"`

	Throttle map[string]throttleSetting `toml:"throttle"` // by class of copies

	Devices []deviceSetting `toml:"device"`
}

// throttleSetting is what one class of copies is limited to at the start.
type throttleSetting struct {
	Rate  size.Size `toml:"rate"`
	Burst size.Size `toml:"burst"`
	Share percent   `toml:"share"`
}

// deviceSetting is a device that is attached at the start.
type deviceSetting struct {
	Name     string `toml:"name"`
	Path     string `toml:"path"` // what "cowherd attach" takes
	ReadOnly bool   `toml:"read_only"`
	Direct   bool   `toml:"direct"`
}

// readSettings reads a configuration file. Paths in it count from its directory.
func readSettings(path string) (settings, error) {
	var c settings
	text, err := os.ReadFile(path)
	if err != nil {
		return c, fmt.Errorf("configuration: %w", err)
	}
	if err := decodeSettings(text, &c); err != nil {
		return c, fmt.Errorf("configuration %s:%w", path, err)
	}
	dir, err := filepath.Abs(filepath.Dir(path))
	if err != nil {
		return c, fmt.Errorf("configuration: %w", err)
	}
	c.from(dir)
	return c, nil
}

// from makes all paths absolute that count from dir.
func (s *settings) from(dir string) {
	for _, p := range []*string{&s.Control, &s.State, &s.TLSCertificates} {
		*p = below(dir, *p)
	}
	for i, address := range s.NBD {
		if socket, ok := strings.CutPrefix(address, "unix:"); ok {
			s.NBD[i] = "unix:" + below(dir, socket)
		}
	}
	for i := range s.Devices {
		if d := &s.Devices[i]; !strings.HasPrefix(d.Path, "mem:") && !strings.HasPrefix(d.Path, "null:") {
			d.Path = below(dir, d.Path)
		}
	}
}

// below is path as seen from dir.
func below(dir, path string) string {
	if path == "" || filepath.IsAbs(path) {
		return path
	}
	return filepath.Join(dir, path)
}

// decodeSettings is strict: the error begins with the line and names the key that is wrong.
func decodeSettings(text []byte, c *settings) error {
	err := toml.NewDecoder(bytes.NewReader(text)).DisallowUnknownFields().Decode(c)
	if unknown, ok := errors.AsType[*toml.StrictMissingError](err); ok && len(unknown.Errors) > 0 {
		first := &unknown.Errors[0]
		line, _ := first.Position()
		return fmt.Errorf("%d: unknown key %q", line, strings.Join(first.Key(), "."))
	}
	if wrong, ok := errors.AsType[*toml.DecodeError](err); ok {
		line, _ := wrong.Position()
		if key := strings.Join(wrong.Key(), "."); key != "" {
			return fmt.Errorf("%d: key %q: %w", line, key, wrong)
		}
		return fmt.Errorf("%d: %w", line, wrong)
	}
	if err != nil {
		return fmt.Errorf(" %w", err)
	}
	for i, d := range c.Devices {
		if d.Name == "" || d.Path == "" {
			return fmt.Errorf(" device number %d: name and path are needed", i+1)
		}
	}
	return nil
}

// over puts s, where it says something, in place of what below says.
func (s settings) over(below settings) settings {
	for _, x := range []struct{ mine, theirs *string }{
		{&s.Control, &below.Control}, {&s.State, &below.State}, {&s.TLS, &below.TLS},
		{&s.TLSCertificates, &below.TLSCertificates}, {&s.Engine, &below.Engine},
		{&s.LogFormat, &below.LogFormat}, {&s.LogLevel, &below.LogLevel}, {&s.HTTP, &below.HTTP},
	} {
		if *x.mine == "" {
			*x.mine = *x.theirs
		}
	}
	if len(s.NBD) == 0 {
		s.NBD = below.NBD
	}
	s.TLSVerifyPeer = s.TLSVerifyPeer || below.TLSVerifyPeer
	if s.Throttle == nil {
		s.Throttle = below.Throttle
	}
	s.Devices = append(s.Devices, below.Devices...)
	return s
}

// defaultState is the state directory where none is given.
func defaultState() (string, error) {
	if os.Geteuid() == 0 {
		return "/var/lib/cowherd", nil
	}
	if dir := os.Getenv("XDG_STATE_HOME"); dir != "" {
		return filepath.Join(dir, "cowherd"), nil
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return "", usagef("the state directory is unknown (%v): say it with --state", err)
	}
	return filepath.Join(home, ".local", "state", "cowherd"), nil
}
