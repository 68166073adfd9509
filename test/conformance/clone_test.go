package conformance

import (
	"bytes"
	"os"
	"path/filepath"
	"syscall"
	"testing"
)

// TestCloneUnderFio lets fio write and verify half of a clone while it is hydrated, kills the daemon, and hydrates the
// rest: what fio has flushed is there, the other half is the source's, and the destination is in the end what the export
// showed.
func TestCloneUnderFio(t *testing.T) {
	need(t, "fio")
	for _, engine := range engines {
		for _, region := range []string{"4k", "64k", "1M"} {
			t.Run(engine+"-"+region, func(t *testing.T) {
				t.Parallel()
				cloneUnderFio(t, engine, region)
			})
		}
	}
}

func cloneUnderFio(t *testing.T, engine, region string) {
	const size = 16 * mib
	d := prepare(t)
	d.start("--engine", engine)
	source := randomImage(t, size, 5)
	golden, err := os.ReadFile(source)
	if err != nil {
		t.Fatal(err)
	}
	dest := filepath.Join(t.TempDir(), "web.img")
	d.do("clone", "web", "--from", source, dest, "--region-size", region, "--hydration-threshold", "2", "--hydration-batch-size", "1")
	fio(t, d.uri("web"), size/2, "--rw=randwrite", "--bs=4k", "--end_fsync=1", "--do_verify=1")
	d.do("hydrate", "web", "--stop")
	d.signal(syscall.SIGKILL)
	d.wait()
	d.start("--engine", engine)
	fioVerify(t, d.uri("web"), size/2)
	if !bytes.Equal(exported(t, d, "web")[size/2:], golden[size/2:]) {
		t.Error("what was not written is not the source's")
	}
	d.do("hydrate", "web", "--start", "--wait", "--threshold", "64", "--batch-size", "8")
	want := exported(t, d, "web")
	fioVerify(t, d.uri("web"), size/2)
	d.do("detach", "web")
	got, err := os.ReadFile(dest)
	if err != nil || !bytes.Equal(got, want) || !bytes.Equal(got[size/2:], golden[size/2:]) {
		t.Errorf("the destination is not what the export showed (%v)", err)
	}
	if now, err := os.ReadFile(source); err != nil || !bytes.Equal(now, golden) {
		t.Errorf("the source has changed (%v)", err)
	}
}

// exported is all that an export holds.
func exported(t testing.TB, d *daemon, export string) []byte {
	t.Helper()
	x := d.open(export, 1)
	defer x.Close()
	held, err := contents(x)
	if err != nil {
		t.Fatal(err)
	}
	return held
}
