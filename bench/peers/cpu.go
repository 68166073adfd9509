package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// tick is the unit of CPU times in /proc, the same on all of Linux's architectures that cowherd is built for.
const tick = time.Second / 100

// processCPU is the CPU time that a process and its children have used, threads and children that have ended included.
// The part of processes that live is exact; that of children that were waited for comes in ticks.
func processCPU(pid int) (time.Duration, error) {
	const schedulerClock = 2 // of the process with this id, in the kernel's numbering of clocks
	var used unix.Timespec
	if err := unix.ClockGettime(int32(^pid<<3|schedulerClock), &used); err != nil {
		return 0, fmt.Errorf("CPU clock of process %d: %w", pid, err)
	}
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	ended, err := endedChildren(string(stat))
	if err != nil {
		return 0, err
	}
	total := time.Duration(used.Nano()) + ended
	for _, child := range children(pid) {
		if n, err := processCPU(child); err == nil { // else it has just ended
			total += n
		}
	}
	return total, nil
}

// endedChildren reads the CPU time of children that were waited for from the text of /proc/PID/stat.
func endedChildren(stat string) (time.Duration, error) {
	// The name of the program, in brackets, may hold anything. Behind it come the state and 49 numbers.
	const user, system = 13, 14
	fields := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:])
	if len(fields) <= system {
		return 0, fmt.Errorf("/proc/PID/stat has no CPU times of children: %q", stat)
	}
	return ticks(fields[user], fields[system])
}

// children are the processes that a process has started and not waited for.
func children(pid int) []int {
	var found []int
	lists, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid)) // the pattern is well-formed
	for _, list := range lists {
		text, err := os.ReadFile(list)
		if err != nil {
			continue // the thread has ended
		}
		for _, field := range strings.Fields(string(text)) {
			if child, err := strconv.Atoi(field); err == nil {
				found = append(found, child)
			}
		}
	}
	return found
}

// machineCPU is the time that all CPUs together have been busy since the machine was started.
func machineCPU() (time.Duration, error) {
	stat, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, err
	}
	return busyTime(string(stat))
}

// busyTime reads the sum of the times that are not idle from the text of /proc/stat. Time stolen by other virtual
// machines counts: it was not to be had.
func busyTime(stat string) (time.Duration, error) {
	line, _, _ := strings.Cut(stat, "\n")
	fields := strings.Fields(line)
	if len(fields) < 9 || fields[0] != "cpu" {
		return 0, fmt.Errorf("/proc/stat begins with %q", line)
	}
	// user, nice, system, idle, iowait, irq, softirq, steal
	return ticks(fields[1], fields[2], fields[3], fields[6], fields[7], fields[8])
}

// ticks adds numbers of ticks.
func ticks(fields ...string) (time.Duration, error) {
	total := time.Duration(0)
	for _, field := range fields {
		n, err := strconv.ParseInt(field, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("CPU time: %w", err)
		}
		total += time.Duration(n) * tick
	}
	return total, nil
}
