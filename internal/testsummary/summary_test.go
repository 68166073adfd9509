package main

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"testing/iotest"
)

// ev is the line of one event of package p; text is its output.
func ev(action, test, text string) string {
	line, err := json.Marshal(event{Action: action, Package: "p", Test: test, Output: text})
	if err != nil {
		panic(err)
	}
	return string(line)
}

func TestSummary(t *testing.T) {
	tests := []struct {
		name  string
		lines []string
		want  string
		well  bool
	}{
		{
			name:  "nothing ran",
			lines: nil,
			want:  "0 passed, 0 failed, 0 skipped\n",
		},
		{
			name: "only skips",
			lines: []string{
				ev("run", "TestA", ""),
				ev("output", "TestA", "=== RUN   TestA\n"),
				ev("output", "TestA", "    a_test.go:7: fio is not installed\n"),
				ev("output", "TestA", "--- SKIP: TestA (0.00s)\n"),
				ev("skip", "TestA", ""), ev("pass", "", ""),
			},
			want: "ok    p                                   0.0s  0 passed, 0 failed, 1 skipped\n" +
				"skipped:\n  p TestA: fio is not installed\n" +
				"0 passed, 0 failed, 1 skipped\n",
		},
		{
			name: "a skip in one of two runs, one in both",
			lines: []string{
				"run: plain",
				ev("run", "TestA", ""), ev("pass", "TestA", ""),
				ev("run", "TestB", ""), ev("skip", "TestB", ""), ev("pass", "", ""),
				"run: race",
				ev("run", "TestA", ""), ev("output", "TestA", "    a_test.go:7: the race detector allocates\n"),
				ev("skip", "TestA", ""),
				ev("run", "TestB", ""), ev("skip", "TestB", ""), ev("pass", "", ""),
			},
			want: "--- plain\n" +
				"ok    p                                   0.0s  1 passed, 0 failed, 1 skipped\n" +
				"--- race\n" +
				"ok    p                                   0.0s  0 passed, 0 failed, 2 skipped\n" +
				"skipped:\n  p TestB: no reason given (plain, race)\n  p TestA: the race detector allocates (race)\n" +
				"plain: 1 passed, 0 failed, 1 skipped\nrace: 0 passed, 0 failed, 2 skipped\n" +
				"1 passed, 0 failed, 3 skipped\n",
			well: true,
		},
		{
			name: "leaves are counted, a failed parent only for itself",
			lines: []string{
				ev("run", "TestA", ""), ev("run", "TestA/one", ""), ev("run", "TestA/x/y", ""),
				ev("output", "TestA/x/y", "=== RUN   TestA/x/y\n"), ev("output", "TestA/x/y", "    a_test.go:9: wrong\n"),
				ev("output", "TestA/one", "unseen\n"),
				ev("pass", "TestA/one", ""), ev("fail", "TestA/x/y", ""), ev("fail", "TestA", ""),
				ev("run", "TestB", ""), ev("run", "TestB/one", ""), ev("pass", "TestB/one", ""), ev("fail", "TestB", ""),
				ev("output", "", "FAIL\n"), ev("output", "", "exit status 1\n"), ev("fail", "", ""),
			},
			want: "    a_test.go:9: wrong\nexit status 1\n" +
				"FAIL  p                                   0.0s  2 passed, 2 failed, 0 skipped\n" +
				"failed:\n  p TestA/x/y\n  p TestB\n" +
				"2 passed, 2 failed, 0 skipped\n",
		},
		{
			name: "a package fails, none of its tests does",
			lines: []string{
				ev("run", "TestA", ""), ev("pass", "TestA", ""), ev("output", "", "a goroutine leaked\n"), ev("fail", "", ""),
			},
			want: "a goroutine leaked\n" +
				"FAIL  p                                   0.0s  1 passed, 1 failed, 0 skipped\n" +
				"failed:\n  p\n1 passed, 1 failed, 0 skipped\n",
		},
		{
			name:  "a test does not end",
			lines: []string{ev("run", "TestA", ""), ev("run", "TestA/sub", ""), ev("fail", "", "")},
			want: "the package ended before the test did\nthe package ended before the test did\n" +
				"FAIL  p                                   0.0s  0 passed, 1 failed, 0 skipped\n" +
				"failed:\n  p TestA/sub\n0 passed, 1 failed, 0 skipped\n",
		},
		{
			name:  "the events end early",
			lines: []string{ev("run", "TestA", ""), ev("pass", "TestA", "")},
			want: "the events ended before the package did\n" +
				"FAIL  p                                   0.0s  1 passed, 1 failed, 0 skipped\n" +
				"failed:\n  p\n1 passed, 1 failed, 0 skipped\n",
		},
		{
			name: "what is no event is passed on",
			lines: []string{
				"{no event", "skipped: the rest: it rains", `{"ImportPath":"q","Action":"build-output","Output":"q.go:1: bad\n"}`,
				ev("output", "", "ok  \tp\t(cached)\n"), ev("run", "TestA", ""), ev("pass", "TestA", ""), ev("pass", "", ""),
				`{"Action":"skip","Package":"q"}`,
			},
			want: "{no event\nskipped: the rest: it rains\nq.go:1: bad\n" +
				"ok    p                                 cached  1 passed, 0 failed, 0 skipped\n" +
				"--    q                                         no tests\n" +
				"skipped:\n  the rest: it rains\n" +
				"1 passed, 0 failed, 0 skipped\n",
			well: true,
		},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			var out strings.Builder
			s := newSummary(&out)
			if err := s.read(strings.NewReader(strings.Join(test.lines, "\n"))); err != nil {
				t.Fatal(err)
			}
			if well := s.finish(); well != test.well {
				t.Errorf("all is well: %v, want %v", well, test.well)
			}
			if out.String() != test.want {
				t.Errorf("got:\n%swant:\n%s", out.String(), test.want)
			}
		})
	}
}

func TestReadError(t *testing.T) {
	broken := errors.New("broken pipe")
	if err := newSummary(&strings.Builder{}).read(iotest.ErrReader(broken)); !errors.Is(err, broken) {
		t.Errorf("got %v, want %v", err, broken)
	}
}
