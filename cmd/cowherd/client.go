package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"

	"cowherd/api"
)

// runtimeDir is where sockets are by default: /run/cowherd for root, else below $XDG_RUNTIME_DIR.
func runtimeDir() (string, error) {
	if os.Geteuid() == 0 {
		return "/run/cowherd", nil
	}
	if dir := os.Getenv("XDG_RUNTIME_DIR"); dir != "" {
		return filepath.Join(dir, "cowherd"), nil
	}
	return "", usagef("XDG_RUNTIME_DIR is not set: say where the control socket is, with --control or COWHERD_CONTROL")
}

// defaultControl is the control socket where none is given.
func defaultControl() (string, error) {
	dir, err := runtimeDir()
	return filepath.Join(dir, "control.sock"), err
}

// control is the socket of the daemon that a command talks to.
func (s *session) control() (string, error) {
	if s.cli.Control != "" {
		return s.cli.Control, nil
	}
	return defaultControl()
}

// client is a client of the daemon, to be closed.
func (s *session) client() (*api.Client, error) {
	socket, err := s.control()
	if err != nil {
		return nil, err
	}
	return api.NewClient(socket), nil
}

// clientIfThere is a client of the daemon, to be closed, for commands that can do without one: nil where there is no
// socket. To look for it takes a few microseconds; to be told by the client that nobody answers, a hundred.
func (s *session) clientIfThere() *api.Client {
	socket, err := s.control()
	if err != nil || !isSocketThere(socket) {
		return nil
	}
	return api.NewClient(socket)
}

// daemonThere tells whether clientIfThere gives a client.
func (s *session) daemonThere() bool {
	socket, err := s.control()
	return err == nil && isSocketThere(socket)
}

// isSocketThere tells whether there may be a control socket.
func isSocketThere(path string) bool {
	_, err := os.Stat(path)
	return !errors.Is(err, os.ErrNotExist)
}

// absolute makes a path good for the daemon, which runs in another directory.
func absolute(path string) (string, error) { return filepath.Abs(path) }

// deviceArgument makes what a user calls a device good for the daemon.
func deviceArgument(device string) (string, error) {
	if strings.HasPrefix(device, "mem:") || strings.HasPrefix(device, "null:") {
		return device, nil
	}
	return absolute(device)
}
