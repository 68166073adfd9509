package size

import (
	"math"
	"strings"
	"testing"
)

func TestParse(t *testing.T) {
	tests := []struct {
		in   string
		want int64
	}{
		{"0", 0}, {"1", 1}, {"4096", 4096}, {"4096B", 4096}, {"0512", 512},
		{"1s", 512}, {"512s", 262144}, {"0s", 0},
		{"4k", 4096}, {"4K", 4096}, {"64KiB", 65536}, {"64kib", 65536}, {"64KIB", 65536},
		{"1M", 1 << 20}, {"1MiB", 1 << 20}, {"4GiB", 4 << 30}, {"3T", 3 << 40}, {"2PiB", 2 << 50}, {"1E", 1 << 60},
		{"1.5G", 3 << 29}, {"0.5k", 512}, {"1.0k", 1024}, {"0.0009765625k", 1}, {"2.25M", 9 << 18},
		{"1.00000000000000000000000000000000000000000000000000000000000000000000k", 1024},
		{"0.000000000000000000867361737988403547205962240695953369140625E", 1},
		{"7.9999999999999999991326382620115964527940377593040466308593750E", math.MaxInt64},
		{"9223372036854775807", math.MaxInt64}, {"7E", 7 << 60}, {"18014398509481983s", 18014398509481983 * 512},
	}
	for _, test := range tests {
		got, err := Parse(test.in)
		if err != nil || got != test.want {
			t.Errorf("Parse(%q) = %d, %v; want %d", test.in, got, err, test.want)
		}
	}
}

func TestParseErrors(t *testing.T) {
	tests := []struct{ in, want string }{
		{"", "digit"}, {"k", "digit"}, {"-1", "digit"}, {"+1", "digit"}, {" 1", "digit"}, {"x", "digit"},
		{"1 k", "unknown unit"}, {"1x", "unknown unit"}, {"1kk", "unknown unit"}, {"1kiBs", "unknown unit"},
		{"1b", "unknown unit"}, {"1S", "unknown unit"}, {"0x10", "unknown unit"}, {"1e3", "unknown unit"},
		{"1é", "unknown unit"}, {"1\x00", "unknown unit"}, {"1k ", "unknown unit"}, {"1_000", "unknown unit"},
		{"1kB", "two meanings"}, {"1MB", "two meanings"}, {"1gb", "two meanings"},
		{".5k", "not a number"}, {"1.k", "not a number"}, {"1.2.3k", "not a number"}, {".", "not a number"},
		{"1.5", "whole number"}, {"1.0", "whole number"}, {"1.5s", "whole number"}, {"0.3k", "whole number"},
		{"0.00048828125k", "whole number"}, {"1." + strings.Repeat("1", 100) + "E", "whole number"},
		{"9223372036854775808", "too large"}, {"8E", "too large"}, {"18446744073709551616", "too large"},
		{"18014398509481984s", "too large"}, {"7.99999999999999999999E", "whole number"},
		{"99999999999999999999999999G", "too large"},
	}
	for _, test := range tests {
		got, err := Parse(test.in)
		if err == nil {
			t.Errorf("Parse(%q) = %d, want an error with %q", test.in, got, test.want)
		} else if !strings.Contains(err.Error(), test.want) {
			t.Errorf("Parse(%q): %v, want %q in it", test.in, err, test.want)
		}
	}
}

func TestExact(t *testing.T) {
	tests := []struct {
		in   int64
		want string
	}{
		{0, "0"}, {1, "1"}, {1000, "1000"}, {1024, "1KiB"}, {1536, "1536"}, {4096, "4KiB"}, {256 << 20, "256MiB"},
		{3 << 29, "1536MiB"}, {1 << 60, "1EiB"}, {math.MaxInt64, "9223372036854775807"}, {-4096, "-4KiB"},
	}
	for _, test := range tests {
		if got := Exact(test.in); got != test.want {
			t.Errorf("Exact(%d) = %q, want %q", test.in, got, test.want)
		}
	}
}

func TestHuman(t *testing.T) {
	tests := []struct {
		in   int64
		want string
	}{
		{0, "0 B"}, {1, "1 B"}, {1023, "1023 B"}, {1024, "1 KiB"}, {1536, "1.5 KiB"}, {1023 << 10, "1023 KiB"},
		{1<<20 - 1, "1 MiB"}, {1 << 20, "1 MiB"}, {3 << 29, "1.5 GiB"}, {1 << 60, "1 EiB"}, {math.MaxInt64, "8 EiB"},
		{-1, "-1 B"}, {-2048, "-2 KiB"}, {math.MinInt64, "-8 EiB"},
	}
	for _, test := range tests {
		if got := Human(test.in); got != test.want {
			t.Errorf("Human(%d) = %q, want %q", test.in, got, test.want)
		}
	}
}

func TestSize(t *testing.T) {
	var s Size
	if err := s.UnmarshalText([]byte("64k")); err != nil || s != 65536 || s.String() != "64KiB" {
		t.Errorf("got %d (%s), %v", int64(s), s, err)
	}
	if err := s.UnmarshalText([]byte("no")); err == nil || s != 65536 {
		t.Errorf("a wrong size gave %v and changed the value to %d", err, int64(s))
	}
}

// FuzzParse checks that whatever Parse takes is a size that Exact writes and Parse reads again, and that nothing is
// taken for a number of bytes that a longer spelling of the same number is not.
func FuzzParse(f *testing.F) {
	for _, s := range []string{"0", "512s", "4k", "64KiB", "1.5G", "7.5E", "9223372036854775807", "-1", "1kB", "1.5s"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		n, err := Parse(s)
		if err != nil {
			return
		}
		if n < 0 {
			t.Fatalf("Parse(%q) = %d", s, n)
		}
		if again, err := Parse(Exact(n)); err != nil || again != n {
			t.Fatalf("Parse(%q) = %d, written as %q, is read as %d, %v", s, n, Exact(n), again, err)
		}
		if again, err := Parse("0" + s); err != nil || again != n {
			t.Fatalf("Parse(%q) = %d, but with a zero before it %d, %v", s, n, again, err)
		}
	})
}
