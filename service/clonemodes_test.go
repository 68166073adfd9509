package service

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"cowherd/api"
)

// TestMappedCloneModes: what a clone does when its metadata device fails, as a user of tables sees it.
func TestMappedCloneModes(t *testing.T) {
	for _, test := range []struct {
		mode, below string
		hydrated    syscall.Errno // of I/O to a hydrated region
		other       syscall.Errno // of a read of another one
	}{
		{"ro", "0 2048 flakey META 0 0 3600 1 error_writes", 0, 0}, // it can be read, and not written
		{"Fail", "0 2048 error", syscall.EIO, syscall.EIO},
	} {
		t.Run(test.mode, func(t *testing.T) {
			c := testConfig(t)
			d := startDaemon(t, c)
			client := api.NewClient(c.Control)
			defer client.Close()
			dir := t.TempDir()
			src, meta, dest := image(t, cloneBytes), filepath.Join(dir, "meta"), filepath.Join(dir, "dest")
			for _, path := range []string{meta, dest} {
				if err := os.WriteFile(path, make([]byte, cloneBytes), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			mustMap(t, client, "m", "0 2048 linear "+meta+" 0")
			mustMap(t, client, "x", fmt.Sprintf("0 2048 clone m %s %s 32 1 no_hydration", dest, src))
			put(t, d, "x", 5, pattern(1, 1))
			if got := mapped(t, client, "x").Table[0].Status; !strings.HasSuffix(got, "rw") || !strings.Contains(got, " 1/64 ") {
				t.Fatalf("status %q", got) // which commits
			}
			if err := loadMapped(t, client, "m", strings.ReplaceAll(test.below, "META", meta), false); err != nil {
				t.Fatal(err)
			}
			event := mapped(t, client, "x").Event
			put(t, d, "x", 20, pattern(1, 2)) // of a region that will not be hydrated after all
			mapped(t, client, "x")            // commits
			x := mapped(t, client, "x")
			if got := x.Table[0].Status; got != "Fail" && !strings.HasSuffix(got, " "+test.mode) || x.Event == event {
				t.Errorf("status %q, event %d", got, x.Event)
			}
			n := mustDialNBD(t, d, "x")
			defer n.bye(t)
			do := func(what string, want syscall.Errno, command uint16, block int64, length int, data []byte) []byte {
				t.Helper()
				got, err := n.do(command, block*4096, length, data)
				if errno, _ := err.(syscall.Errno); errno != want || err != nil && errno == 0 {
					t.Errorf("%s: %v, want %v", what, err, want)
				}
				return got
			}
			golden := readFile(t, src)
			held := do("read of what is hydrated", test.hydrated, nbdRead, 5, 4096, nil)
			again := do("read of the source", test.other, nbdRead, 20, 4096, nil)
			if test.mode == "ro" && (!bytes.Equal(held, pattern(1, 1)) || !bytes.Equal(again, golden[20*4096:21*4096])) {
				t.Error("it shows something else")
			}
			do("write to what is hydrated", test.hydrated, nbdWrite, 5, 0, pattern(1, 3))
			do("write to another region", syscall.EIO, nbdWrite, 40, 0, pattern(1, 3))
			do("flush", syscall.EIO, nbdFlush, 0, 0, nil)
		})
	}
}
