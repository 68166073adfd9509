package main

import (
	"context"
	"errors"
	"slices"
	"syscall"

	"cowherd/api"
)

// liveDevice finds what the daemon has under a name: an attached device, a snapshot, or a mapped device, of which only the
// name, the size, and where it is exported are told. ENOENT: there is none.
func liveDevice(ctx context.Context, client *api.Client, name string) (api.Device, error) {
	d, err := client.Device(ctx, name)
	if !errors.Is(err, syscall.ENOENT) {
		return d, err
	}
	devices, mappedErr := client.DMDevices(ctx)
	if mappedErr != nil {
		return d, mappedErr
	}
	i := slices.IndexFunc(devices, func(x api.DMDevice) bool { return x.Name == name })
	if i < 0 {
		return d, err
	}
	x := &devices[i]
	return api.Device{Name: x.Name, SizeBytes: x.SizeBytes, ReadOnly: x.ReadOnly, URIs: x.URIs}, nil
}
