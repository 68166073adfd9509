package main

import (
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

// client is a client of the daemon, to be closed.
func (s *session) client() (*api.Client, error) {
	socket := s.cli.Control
	if socket == "" {
		var err error
		if socket, err = defaultControl(); err != nil {
			return nil, err
		}
	}
	return api.NewClient(socket), nil
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
