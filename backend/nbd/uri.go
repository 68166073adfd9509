package nbd

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const defaultPort = "10809"

// IsURI tells whether s has one of the schemes that ParseURI knows.
func IsURI(s string) bool {
	scheme, _, found := strings.Cut(s, "://")
	switch scheme {
	case "nbd", "nbds", "nbd+unix", "nbds+unix":
		return found
	}
	return false
}

// ParseURI reads an NBD URI, as doc/uri.md of the NetworkBlockDevice project describes them:
//
//	nbd://host[:10809]/export               nbds://host[:10809]/export
//	nbd+unix:///export?socket=PATH          nbds+unix:///export?socket=PATH
//
// The schemes with an s insist on TLS, with these parameters, all optional: tls-certificates=DIR (of ca-cert.pem, and
// of client-cert.pem and client-key.pem where the server wants to know its client; without it the system's
// authorities count), tls-hostname=NAME (what the server's certificate must be for), tls-verify-peer=0 (do not check
// it). ParseURI reads the certificates. The nbds schemes of others also know pre-shared keys (tls-psk-file); Go's TLS
// does not.
//
// All schemes know these parameters of cowherd's own: connections=N; reconnect-timeout=TIME and request-timeout=TIME,
// in seconds or with a unit (90, 1500ms, 2m), 0 for never, by default DefaultReconnectTimeout and
// DefaultRequestTimeout; keeps-writes=1. They are Config's fields of these names. What ParseURI does not understand is
// an error with EINVAL.
func ParseURI(s string) (Config, error) {
	c, err := parseURI(s)
	if err != nil {
		return Config{}, fmt.Errorf("NBD URI %q: %w", s, err)
	}
	return c, nil
}

func parseURI(s string) (Config, error) {
	u, err := url.Parse(s)
	if err != nil {
		return Config{}, invalid("%v", errors.Unwrap(err))
	}
	if !IsURI(s) {
		return Config{}, invalid("scheme %q is not nbd, nbds, nbd+unix or nbds+unix", u.Scheme)
	}
	query, err := singles(u.RawQuery)
	if err != nil {
		return Config{}, err
	}
	c := Config{Export: strings.TrimPrefix(u.Path, "/")}
	secure := strings.HasPrefix(u.Scheme, "nbds")
	switch {
	case u.Fragment != "":
		return Config{}, invalid("it has a fragment, #%s", u.Fragment)
	case u.User != nil:
		return Config{}, invalid("user names are not supported")
	case len(c.Export) > stringMax:
		return Config{}, invalid("the export's name is longer than %d bytes", stringMax)
	case strings.HasSuffix(u.Scheme, "+unix"):
		err = c.parseUnix(u, query)
	default:
		err = c.parseTCP(u)
	}
	if err == nil && secure {
		c.TLS, err = parseTLS(u, query)
	}
	if err == nil {
		err = c.parseOwn(query)
	}
	if err != nil {
		return Config{}, err
	}
	for name := range query {
		return Config{}, invalid("parameter %q has no meaning here", name)
	}
	return c, nil
}

func invalid(format string, args ...any) error {
	return fmt.Errorf("%s: %w", fmt.Sprintf(format, args...), syscall.EINVAL)
}

// singles parses a query whose parameters occur once each.
func singles(raw string) (map[string]string, error) {
	values, err := url.ParseQuery(raw)
	if err != nil {
		return nil, invalid("%v", err)
	}
	query := make(map[string]string, len(values))
	for name, list := range values {
		if len(list) != 1 {
			return nil, invalid("parameter %q is given %d times", name, len(list))
		}
		query[name] = list[0]
	}
	return query, nil
}

// take removes a parameter from query; "" when it is not there.
func take(query map[string]string, name string) string {
	value := query[name]
	delete(query, name)
	return value
}

// parseOwn takes cowherd's own parameters.
func (c *Config) parseOwn(query map[string]string) (err error) {
	if s := take(query, "connections"); s != "" {
		c.Connections, err = strconv.Atoi(s)
		if err != nil || c.Connections < 1 || c.Connections > connectionsMax {
			return invalid("connections=%s is not from 1 to %d", s, connectionsMax)
		}
	}
	c.ReconnectTimeout, err = parseTime(query, "reconnect-timeout", DefaultReconnectTimeout)
	if err != nil {
		return err
	}
	c.RequestTimeout, err = parseTime(query, "request-timeout", DefaultRequestTimeout)
	if err != nil {
		return err
	}
	c.KeepsWrites, err = parseSwitch(query, "keeps-writes", false)
	return err
}

// parseTime takes a parameter that is a time: seconds, or a number with a unit.
func parseTime(query map[string]string, name string, standard time.Duration) (time.Duration, error) {
	s := take(query, name)
	if s == "" {
		return standard, nil
	}
	if seconds, err := strconv.ParseUint(s, 10, 31); err == nil {
		return time.Duration(seconds) * time.Second, nil
	}
	d, err := time.ParseDuration(s)
	if err != nil || d < 0 {
		return 0, invalid("%s=%s is not a time like 90, 1500ms or 2m", name, s)
	}
	return d, nil
}

// parseSwitch takes a parameter that is on or off.
func parseSwitch(query map[string]string, name string, standard bool) (bool, error) {
	switch s := take(query, name); s {
	case "":
		return standard, nil
	case "1", "true":
		return true, nil
	case "0", "false":
		return false, nil
	default:
		return false, invalid("%s=%s is neither 0 nor 1", name, s)
	}
}

func (c *Config) parseUnix(u *url.URL, query map[string]string) error {
	c.Network, c.Address = "unix", take(query, "socket")
	if u.Host != "" {
		return invalid("a unix socket has no host, but %q is given: are three slashes meant?", u.Host)
	}
	if c.Address == "" {
		return invalid("parameter socket=PATH is missing")
	}
	return nil
}

func (c *Config) parseTCP(u *url.URL) error {
	host, port := u.Hostname(), u.Port()
	if host == "" {
		return invalid("the host is missing")
	}
	if port == "" {
		port = defaultPort
	}
	c.Network, c.Address = "tcp", net.JoinHostPort(host, port)
	return nil
}

// parseTLS reads the parameters of the schemes that insist on TLS.
func parseTLS(u *url.URL, query map[string]string) (*tls.Config, error) {
	c := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: u.Hostname()}
	if name := take(query, "tls-hostname"); name != "" {
		c.ServerName = name
	}
	if take(query, "tls-psk-file") != "" {
		return nil, invalid("tls-psk-file: pre-shared keys are not supported (Go's TLS has none), only certificates")
	}
	if kind := take(query, "tls-type"); kind != "" && kind != "x509" {
		return nil, invalid("tls-type=%s is not supported, only x509", kind)
	}
	verify, err := parseSwitch(query, "tls-verify-peer", true)
	if err != nil {
		return nil, err
	}
	c.InsecureSkipVerify = !verify
	if c.ServerName == "" && !c.InsecureSkipVerify {
		c.ServerName = "localhost"
	}
	if dir := take(query, "tls-certificates"); dir != "" {
		return c, loadCertificates(c, dir)
	}
	return c, nil
}

// loadCertificates reads the files that nbdkit and libnbd keep in one directory, by their names.
func loadCertificates(c *tls.Config, dir string) error {
	authorities, err := os.ReadFile(filepath.Join(dir, "ca-cert.pem"))
	if err != nil {
		return fmt.Errorf("read the certificate authorities: %w", err)
	}
	c.RootCAs = x509.NewCertPool()
	if !c.RootCAs.AppendCertsFromPEM(authorities) {
		return invalid("%s/ca-cert.pem has no certificate", dir)
	}
	own, err := tls.LoadX509KeyPair(filepath.Join(dir, "client-cert.pem"), filepath.Join(dir, "client-key.pem"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read the client's certificate: %w", err)
	}
	c.Certificates = []tls.Certificate{own}
	return nil
}

// URI is the configuration as a URI, for messages: without what TLS needs.
func (c Config) URI() string {
	u := url.URL{Scheme: "nbd", Path: "/" + c.Export, Host: c.Address}
	if c.TLS != nil {
		u.Scheme += "s"
	}
	if c.Network == "unix" {
		u.Scheme, u.Host = u.Scheme+"+unix", ""
		u.RawQuery = "socket=" + strings.ReplaceAll(url.QueryEscape(c.Address), "%2F", "/")
	}
	return u.String()
}
