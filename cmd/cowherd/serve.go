package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"cowherd/api"
	"cowherd/export/nbd"
	"cowherd/service"
)

// stopTimeout is how long the daemon takes at most to end.
const stopTimeout = 30 * time.Second

type serveCmd struct {
	NBD    []string `name:"nbd" sep:"none" placeholder:"ADDRESS" help:"Serve exports on unix:PATH or tcp:HOST:PORT. May be repeated. Without it, and without sockets passed by a service manager: unix:nbd.sock beside the control socket."`
	State  string   `placeholder:"DIR" complete:"file" help:"State directory: what is attached is remembered there, and COW space without a name lies in its file system."`
	Config string   `placeholder:"FILE" complete:"file" help:"Configuration file (TOML); flags win over what it says."`

	TLSCertificates string `name:"tls-certificates" placeholder:"DIR" complete:"file" help:"Directory with server-cert.pem, server-key.pem, and to verify clients ca-cert.pem and ca-crl.pem."`
	TLS             string `name:"tls" enum:",off,allow,require" default:"" placeholder:"MODE" help:"TLS for NBD: off, allow or require. With certificates require, else off."`
	TLSVerifyPeer   bool   `name:"tls-verify-peer" help:"Clients must have a certificate."`

	HTTP string `name:"http" placeholder:"HOST:PORT" help:"Serve metrics for Prometheus over HTTP on this address, 127.0.0.1:9479 say. Off by default."`

	Engine    string `enum:",scaled,serialised" default:"" placeholder:"KIND" help:"Copy engine: scaled (the default) or serialised."`
	LogFormat string `enum:",text,json" default:"" placeholder:"FORMAT" help:"Log as text (the default) or json, on standard error."`
	LogLevel  string `enum:",debug,info,warn,error" default:"" placeholder:"LEVEL" help:"Log from this level: debug, info (the default), warn or error."`
	ReadyFD   int    `name:"ready-fd" default:"-1" placeholder:"N" help:"Write a line to file descriptor N when clients are served, and close it."`
}

func (serveCmd) Help() string {
	return `The daemon stays in the foreground. It brings back the devices and persistent snapshots that the state
directory remembers. SIGTERM, SIGINT or SIGHUP end it: requests that have arrived are answered, devices are
flushed. A second signal ends it at once.

Examples:

    cowherd serve
    cowherd serve --nbd unix:/run/cowherd/nbd.sock --nbd tcp:[::1]:10809 --state /srv/cowherd
    cowherd serve --config /etc/cowherd.toml --log-format json
    cowherd serve --nbd tcp::10809 --tls-certificates /etc/pki/nbd --tls-verify-peer
`
}

func (c *serveCmd) Run(s *session) error {
	set, err := c.settings(s.cli.Control)
	if err != nil {
		return err
	}
	log, err := newLogger(s, &set)
	if err != nil {
		return err
	}
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	defer signal.Stop(signals)
	// A log that nobody reads any more must not end the daemon: without this, writing to standard error would.
	signal.Ignore(syscall.SIGPIPE)
	defer signal.Reset(syscall.SIGPIPE)
	d, err := start(&set, log)
	if err != nil {
		return err
	}
	stop := func() error { return stopDaemon(s, d, signals, log) }
	var devices []api.AttachRequest
	for _, x := range set.Devices {
		devices = append(devices, api.AttachRequest{Name: x.Name, Device: x.Path, ReadOnly: x.ReadOnly, Direct: x.Direct})
	}
	if err := d.Restore(devices); err != nil {
		return errors.Join(err, stop())
	}
	d.Serve()
	v := d.Version()
	log.Info("ready", "version", orUnknown(version), "control", set.Control, "nbd", v.NBD, "state", v.StateDir)
	if err := errors.Join(notifyManager("READY=1"), writeReady(c.ReadyFD)); err != nil {
		return errors.Join(err, stop())
	}
	select {
	case sig := <-signals:
		log.Info("stopping", "signal", sig.String())
	case <-s.Done():
		log.Info("stopping")
	}
	return stop()
}

// settings puts the flags over the configuration file over the defaults.
func (c *serveCmd) settings(control string) (settings, error) {
	set := settings{
		Control: control, State: c.State, NBD: c.NBD, TLS: c.TLS, TLSCertificates: c.TLSCertificates,
		TLSVerifyPeer: c.TLSVerifyPeer, Engine: c.Engine, LogFormat: c.LogFormat, LogLevel: c.LogLevel,
		HTTP: c.HTTP,
	}
	dir, err := os.Getwd()
	if err != nil {
		return set, err
	}
	set.from(dir)
	if c.Config != "" {
		file, err := readSettings(c.Config)
		if err != nil {
			return set, err
		}
		set = set.over(file)
	}
	if set.Control == "" {
		if set.Control, err = defaultControl(); err != nil {
			return set, err
		}
	}
	if set.State == "" {
		set.State, err = defaultState()
	}
	return set, err
}

// newLogger makes the daemon's log.
func newLogger(s *session, set *settings) (*slog.Logger, error) {
	options := &slog.HandlerOptions{}
	if set.LogLevel != "" {
		var level slog.Level
		if err := level.UnmarshalText([]byte(set.LogLevel)); err != nil {
			return nil, usagef("log level %q: debug, info, warn or error is wanted", set.LogLevel)
		}
		options.Level = level
	}
	switch set.LogFormat {
	case "", "text":
		return slog.New(slog.NewTextHandler(s.stderr, options)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(s.stderr, options)), nil
	}
	return nil, usagef("log format %q: text or json is wanted", set.LogFormat)
}

// start makes the daemon.
func start(set *settings, log *slog.Logger) (*service.Daemon, error) {
	c := service.Config{
		StateDir: set.State,
		Control:  set.Control,
		NBD:      set.NBD,
		Engine:   set.Engine,
		Logger:   log,
		Version:  version,
		HTTP:     set.HTTP,
		Throttle: throttles(set.Throttle),
	}
	var err error
	if c.TLSMode, err = tlsMode(set); err != nil {
		return nil, err
	}
	if c.TLSMode != nbd.TLSOff {
		if c.TLS, err = nbd.LoadTLS(set.TLSCertificates, set.TLSVerifyPeer); err != nil {
			return nil, err
		}
	}
	if c.Listeners, err = nbd.Listeners(); err != nil {
		return nil, err
	}
	if len(c.NBD) == 0 && len(c.Listeners) == 0 {
		c.NBD = []string{"unix:" + filepath.Join(filepath.Dir(set.Control), "nbd.sock")}
	}
	warnOpen(c.NBD, c.TLSMode, log)
	if set.HTTP != "" && !isLoopback(set.HTTP) {
		log.Warn("whoever reaches this address may read the metrics", "address", set.HTTP)
	}
	return service.New(c)
}

// tlsMode is what the settings say about TLS.
func tlsMode(set *settings) (nbd.TLSMode, error) {
	mode := set.TLS
	if mode == "" && set.TLSCertificates != "" {
		mode = "require"
	}
	var m nbd.TLSMode
	switch mode {
	case "", "off":
		m = nbd.TLSOff
	case "allow":
		m = nbd.TLSAllow
	case "require":
		m = nbd.TLSRequire
	default:
		return m, usagef("TLS mode %q: off, allow or require is wanted", mode)
	}
	if m != nbd.TLSOff && set.TLSCertificates == "" {
		return m, usagef("TLS mode %q needs --tls-certificates", mode)
	}
	if m == nbd.TLSOff && set.TLSVerifyPeer {
		return m, usagef("--tls-verify-peer needs TLS")
	}
	return m, nil
}

// warnOpen warns of addresses that anybody on the network can use.
func warnOpen(addresses []string, mode nbd.TLSMode, log *slog.Logger) {
	if mode == nbd.TLSRequire {
		return
	}
	for _, address := range addresses {
		if len(address) < 4 || address[:4] != "tcp:" {
			continue
		}
		if !isLoopback(address[4:]) {
			log.Warn("whoever reaches this address may read and write all devices", "address", address)
		}
	}
}

// isLoopback tells whether HOST:PORT is for this machine only. What is no address at all counts as well: it is refused
// elsewhere.
func isLoopback(address string) bool {
	host, _, err := net.SplitHostPort(address)
	ip := net.ParseIP(host)
	return err != nil || host == "localhost" || ip != nil && ip.IsLoopback()
}

// throttles is what copies are limited to at the start.
func throttles(set map[string]throttleSetting) map[string]api.ThrottleRequest {
	requests := make(map[string]api.ThrottleRequest, len(set))
	for class, x := range set {
		rate, burst, share := int64(x.Rate), int64(x.Burst), int(x.Share)
		requests[class] = api.ThrottleRequest{RateBytes: &rate, BurstBytes: &burst, SharePercent: &share}
	}
	return requests
}

// stopDaemon ends the daemon cleanly; another signal ends the process at once.
func stopDaemon(s *session, d *service.Daemon, signals <-chan os.Signal, log *slog.Logger) error {
	done := make(chan struct{})
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		select {
		case sig := <-signals:
			log.Error("ended at once: what was not flushed may be lost", "signal", sig.String())
			s.exit(exitError)
		case <-done:
		}
	}()
	ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
	defer cancel()
	err := errors.Join(notifyManager("STOPPING=1"), d.Stop(ctx))
	close(done)
	<-watched
	if err != nil {
		return fmt.Errorf("stop: %w", err)
	}
	log.Info("stopped")
	return nil
}

// notifyManager tells the service manager (NOTIFY_SOCKET), if there is one, what has become of the daemon.
func notifyManager(state string) error {
	path := os.Getenv("NOTIFY_SOCKET")
	if path == "" {
		return nil
	}
	// A leading @ stands for a name in the abstract name space, for package net too.
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return fmt.Errorf("notify the service manager: %w", err)
	}
	_, err = conn.Write([]byte(state + "\n"))
	if err := errors.Join(err, conn.Close()); err != nil {
		return fmt.Errorf("notify the service manager: %w", err)
	}
	return nil
}

// writeReady writes a line to a descriptor that the parent process waits on. Negative: there is none.
func writeReady(fd int) error {
	if fd < 0 {
		return nil
	}
	f := os.NewFile(uintptr(fd), "ready descriptor "+strconv.Itoa(fd))
	_, err := f.WriteString("ready\n")
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("readiness: %w", err)
	}
	return nil
}
