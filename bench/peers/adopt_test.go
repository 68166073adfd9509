package main

import (
	"errors"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestAdopt puts a process in the background, which is counted and ended with its adopter.
func TestAdopt(t *testing.T) {
	dir := t.TempDir()
	file := dir + "/pid"
	// The inner shell ends at once; what it leaves uses CPU time.
	script := "(while :; do :; done) & echo $! >" + file + ".new && mv " + file + ".new " + file
	p, err := spawnAdopted(dir, "sh", "-c", script)
	if err != nil {
		t.Fatal(err)
	}
	pid := waitForPID(t, file)
	for used := time.Duration(0); used < 20*time.Millisecond; {
		if used, err = processCPU(p.cmd.Process.Pid); err != nil {
			t.Fatal(err)
		}
	}
	if log := p.stop(); log != "" {
		t.Errorf("it printed %q", log)
	}
	if err := syscall.Kill(pid, 0); !errors.Is(err, syscall.ESRCH) {
		t.Errorf("what was left in the background is still there: %v", err)
	}
}

// waitForPID reads a process's number from a file that will be there.
func waitForPID(t *testing.T, file string) int {
	t.Helper()
	for begin := time.Now(); time.Since(begin) < startLimit; {
		if text, err := os.ReadFile(file); err == nil {
			pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
			if err != nil {
				t.Fatal(err)
			}
			return pid
		}
	}
	t.Fatal("nothing was started")
	return 0
}

// TestAdoptEnds ends by itself when nothing is left, and says what it cannot start.
func TestAdoptEnds(t *testing.T) {
	dir := t.TempDir()
	p, err := spawnAdopted(dir, "true")
	if err != nil {
		t.Fatal(err)
	}
	<-p.exited
	if p, err = spawnAdopted(dir, "/nonexistent/server"); err != nil {
		t.Fatal(err)
	}
	<-p.exited
	if log := p.stop(); !strings.Contains(log, "/nonexistent/server") {
		t.Errorf("it printed %q", log)
	}
	if err := adopt(nil); err == nil {
		t.Error("no program is accepted")
	}
}
