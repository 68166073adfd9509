package bench

import (
	"bytes"
	"testing"
	"time"

	"cowherd/block"
)

// mediaPair is two devices of a run of a cell.
func mediaPair(t *testing.T, c *Cell) (from, to *media) {
	t.Helper()
	w := &windows{memory: map[string][]byte{"from": bytes.Repeat([]byte{1}, 4096), "to": make([]byte, 4096)}}
	command := newMediaCommand(c)
	return &media{size: 1 << 40, memory: w.of("from"), windows: w, command: command},
		&media{size: 1 << 40, memory: w.of("to"), windows: w, command: command}
}

// TestMedia: data lies where offsets wrap around to, and the command copies only between devices that have it.
func TestMedia(t *testing.T) {
	from, to := mediaPair(t, &Cell{Offload: offloadEmulated})
	data := []byte("0123456789")
	if err := block.Write(from, data, 1<<30-5); err != nil {
		t.Fatal(err)
	}
	if got := string(from.memory[4091:]) + string(from.memory[:5]); got != string(data) {
		t.Errorf("%q was written across the end", got)
	}
	got := make([]byte, 10)
	if err := block.Read(from, got, 4096-5); err != nil || !bytes.Equal(got, data) {
		t.Errorf("%q, %v", got, err)
	}
	other, _ := mediaPair(t, &Cell{})
	if to.CopyOffers(other) != nil || to.CopyOffers(blank{}) != nil {
		t.Error("a copy from a device with another command, or without one, is offered")
	}
	if offers := to.CopyOffers(from); len(offers) != 1 || offers[0].Method != block.CopyDevice || offers[0].LengthMax != mediaCommandMax {
		t.Errorf("offers %+v", offers)
	}
	if n, err := to.Copy(block.CopyDevice, from, 0, 1<<20, 4096); n != 4096 || err != nil || !bytes.Equal(to.memory, from.memory) {
		t.Errorf("emulated: %d, %v", n, err)
	}
}

// TestMediaCommand: a command of the device takes its time, and commands share its rate.
func TestMediaCommand(t *testing.T) {
	from, to := mediaPair(t, &Cell{Offload: offloadOnly, CopyLatency: 3 * time.Millisecond, CopyBandwidth: 100 << 20})
	began := time.Now()
	done := make(chan struct{})
	for range 2 {
		go func() {
			_, _ = to.Copy(block.CopyDevice, from, 0, 0, 1<<20)
			done <- struct{}{}
		}()
	}
	<-done
	<-done
	if took := time.Since(began); took < 23*time.Millisecond {
		t.Errorf("2 MiB at 100 MiB/s took %v", took)
	}
}
