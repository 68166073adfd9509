//go:build interop

package interop

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"cowherd/block"
)

// tablesSize is the size of the two devices that recorded tables lie on.
const tablesSize = 64 * mib

// guests is how many guests share the tables: each table takes a second or two under emulation.
const guests = 4

// tryTables defines t, which tries a table and reports what comes of it. It is run by a shell in the guest and by one
// that has cowherd's dm for dmsetup; A and B are the devices.
const tryTables = `
t() {
	dd if=/dev/zero of=$B bs=1k count=64 conv=notrunc 2>/dev/null
	forget
	printf '== %s\n' "$1"
	printf '%b\n' "$1" | sed "s,\$A,$A,g; s,\$B,$B,g" >$tmp/table
	if dmsetup create x $tmp/table 2>$tmp/error; then
		dmsetup table x
		dmsetup status x
		dmsetup remove x
	else
		echo refused: $(cause)
	fi
}
`

// inGuest is what differs in the guest: the cause is in the kernel's log.
const inGuest = `
set +e
A=/dev/vda B=/dev/vdb tmp=/tmp
forget() { dmesg -c >/dev/null; }
cause() {
	dmesg | grep -v 'not in table devices list' | sed -n 's/.*device-mapper: table: [0-9:]*: //p' |
		sed -n '1s/ (-E[A-Z]*)$//; 1s/^vda too/$A too/; 1p' | grep . || head -n 1 $tmp/error
}
`

// onHost is what differs where cowherd's dm is dmsetup.
const onHost = `
dmsetup() { "$cowherd" --control "$control" dm "$@"; }
forget() { :; }
cause() { cat $tmp/error; }
`

// recordedTables reads what Linux is on record for, in order: the tables, and what comes of each.
func recordedTables(t *testing.T) (tables []string, results map[string]string) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root, "dm/testdata/tables.txt"))
	if err != nil {
		t.Fatal(err)
	}
	return splitTables(string(text))
}

// splitTables cuts a report at its tables.
func splitTables(text string) (tables []string, results map[string]string) {
	results = map[string]string{}
	for _, part := range strings.Split("\n"+text, "\n== ")[1:] {
		table, result, _ := strings.Cut(part, "\n")
		tables = append(tables, table)
		results[table] = strings.TrimSuffix(result, "\n")
	}
	return tables, results
}

// tryAll calls t for some tables.
func tryAll(tables []string) string {
	var b strings.Builder
	for _, table := range tables {
		fmt.Fprintf(&b, "t '%s'\n", table)
	}
	return b.String()
}

// TestTables: tables, good and bad, are taken and refused alike by dmsetup with a kernel and by cowherd dm, for the same
// reasons, and are shown in the same lines. What the kernel does is on record too (dm/testdata).
func TestTables(t *testing.T) {
	t.Parallel()
	needLab(t)
	tables, recorded := recordedTables(t)
	d := newDaemon(t)
	d.start()
	a, b := newImage(t, tablesSize), newImage(t, tablesSize)
	ours := hostShell(t, d, a, b, tryTables+tryAll(tables))
	ours = strings.NewReplacer(a, "$A", b, "$B").Replace(ours)
	_, cowherds := splitTables(ours)
	for i := range guests {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			t.Parallel()
			mine := tables[len(tables)*i/guests : len(tables)*(i+1)/guests]
			g := kernel(t, inGuest+tryTables+tryAll(mine), newImage(t, tablesSize), newImage(t, tablesSize))
			_, linux := splitTables(strings.NewReplacer("254:0", "$A", "254:16", "$B", "/dev/vda", "$A", " /tmp/table.", "").
				Replace(g.Output))
			for _, table := range mine {
				compareTable(t, table, linux[table], recorded[table], cowherds[table])
			}
		})
	}
	d.stop()
}

// compareTable compares what Linux, the record and cowherd make of a table.
func compareTable(t *testing.T, table, linux, recorded, cowherd string) {
	t.Helper()
	if linux != recorded {
		t.Errorf("%s\nLinux:     %s\non record: %s", table, linux, recorded)
	}
	cause, refused := strings.CutPrefix(linux, "refused: ")
	same := cowherd == linux
	if refused {
		cause = strings.ToLower(strings.TrimSuffix(strings.TrimSuffix(cause, "."), " "))
		same = strings.HasPrefix(cowherd, "refused: ") && strings.Contains(strings.ToLower(cowherd), cause)
	}
	if !same {
		t.Errorf("%s\nLinux:   %s\ncowherd: %s", table, linux, cowherd)
	}
}

// newImage is a file of zeroes.
func newImage(t *testing.T, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image")
	f, err := os.Create(path)
	if err == nil {
		err = errors.Join(f.Truncate(size), f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// hostShell runs a script with cowherd's dm for dmsetup, A and B being two images, and returns what it prints.
func hostShell(t *testing.T, d *daemon, a, b, script string) string {
	t.Helper()
	program, err := build()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sh", "-c", onHost+script)
	cmd.Env = append(os.Environ(), "cowherd="+program, "control="+d.control, "A="+a, "B="+b, "tmp="+t.TempDir())
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v\n%s%s", err, out, &stderr)
	}
	return string(out)
}

// surface is verbs in an order that matters: what each prints and whether it succeeds.
const surface = `
x() { echo "\$ $*"; dmsetup "$@" 2>/dev/null; echo "[$?]"; }
x ls
x info
x table
x status
x info -c
x ls --tree
x create lin --table "0 1000 linear $A 0"
x create lin --table "0 1000 linear $A 0"
printf '0 1000 linear %s 0\n\n# comment\n1000 24 linear %s 8\n1024 1024 zero\n2048 100 error\n' $A $B >$tmp/t
x create multi $tmp/t
echo '$ create multi2 -u UUID-1 <t'; dmsetup create multi2 -u UUID-1 <$tmp/t; echo "[$?]"
x create empty --notable
x create top --table "0 500 linear /dev/mapper/lin 100"
x create str --table "0 4096 striped 2 16 $A 0 $B 1024"
x create ro -r --table "0 100 linear $A 0"
x ls
x ls --target linear
x ls -o blkdevname
x table
x status
x table --target linear
x status --target zero
x table lin
x table lin multi
x table empty
x info
x info top
x info -c
x info -c --noheadings -o name
x info -c --noheadings -o name,open,attr
x info -c -o name,uuid,attr,open
x info -c -o name,suspended,readonly,tables_loaded,device_count,names_using_dev
x info -C --separator , --noheadings -o name,major,minor
x info -c --nameprefixes --noheadings -o name,open
x info -c --nameprefixes --noheadings --unquoted -o name,open
x info -c -O open -o name,open
x info -c -O -name -o name
x info -c lin top
x deps top
x deps -o devname top
x deps -o blkdevname top
x deps empty
x suspend lin
x suspend lin
x info lin
x reload lin --table "0 2000 linear $A 0"
x info lin
x table --inactive lin
x table lin
x status --inactive lin
x clear lin
x info lin
x resume lin
x resume lin
x load lin --table "0 2000 linear $A 0"
x resume lin
x table lin
x rename lin lin2
x rename lin2 top
x rename nosuch other
x rename lin2 --setuuid FOO
x rename lin2 --setuuid BAR
x info lin2
x info -c -u FOO
x table -u FOO
x remove lin2
x remove nosuch
x info nosuch
x table nosuch
x status nosuch
x suspend nosuch
x resume nosuch
x load nosuch --table "0 1 zero"
x resume empty
x remove top lin2
x message multi 0 hi
x message empty 0 hi
x message multi 100000 hi
x wait ro 5
x -v status ro
x -v table ro
x create -v vv --table "0 100 linear $A 0"
x create --concise "con1,,,rw,0 100 zero,100 100 error;con2,UUID-2,,ro,0 8 zero"
x info con2
x table con1
x create nothing --table ""
x info nothing
x reload nothing --table "0 8 zero"
x info nothing
x wipe_table multi
x table multi
x remove -f multi2
x create a/b --notable
x create
x remove
x frobnicate
x ls extra
x remove_all
x ls
`

// numbers are the numbers of devices that both give to what they lie on.
var numbers = regexp.MustCompile(`\b(254|0):[0-9]+\b`)

// TestSurface: a script of dmsetup's verbs prints the same, line by line, and succeeds and fails at the same places.
func TestSurface(t *testing.T) {
	t.Parallel()
	needLab(t)
	d := newDaemon(t)
	d.start()
	a, b := newImage(t, tablesSize), newImage(t, tablesSize)
	ours := strings.NewReplacer(a, "$A", b, "$B").Replace(hostShell(t, d, a, b, surface))
	g := kernel(t, "set +e\nA=/dev/vda B=/dev/vdb tmp=/tmp\n"+surface, newImage(t, tablesSize), newImage(t, tablesSize))
	theirs := strings.NewReplacer("254:0", "$A", "254:16", "$B", "/dev/vda", "$A", "/dev/vdb", "$B", "linear 253:0", "linear lin").
		Replace(g.Output)
	mine, linux := commandsOf(ours), commandsOf(theirs)
	if len(mine) != len(linux) {
		t.Fatalf("%d commands were run here, %d by Linux:\n%s", len(mine), len(linux), theirs)
	}
	for i := range mine {
		if mine[i] != linux[i] {
			t.Errorf("cowherd: %s\nLinux: %s", mine[i], linux[i])
		}
	}
	d.stop()
}

// commandsOf cuts what a script of commands prints, without what the two need not have alike: read-ahead, the usage of
// a wrong command line, and where temporary files are.
func commandsOf(text string) []string {
	var commands []string
	for _, part := range strings.Split("\n"+text, "\n$ ")[1:] {
		command, output, _ := strings.Cut(part, "\n")
		var kept []string
		for line := range strings.SplitSeq(output, "\n") {
			if !strings.HasPrefix(line, "Read Ahead:") {
				kept = append(kept, numbers.ReplaceAllString(line, "N:N"))
			}
		}
		end := kept[len(kept)-1]
		if end == "" && len(kept) > 1 {
			end = kept[len(kept)-2]
		}
		if end == "[1]" || end == "[2]" { // what it says then is another matter
			kept = []string{"[failed]"}
		}
		words := strings.Fields(command)
		for i, word := range words {
			if strings.HasSuffix(word, "/t") {
				words[i] = "t"
			}
		}
		commands = append(commands, strings.Join(words, " ")+"\n"+strings.Join(kept, "\n"))
	}
	return commands
}

// TestLogWrites: the same writes, flushes and marks give the same log, byte for byte.
func TestLogWrites(t *testing.T) {
	t.Parallel()
	needLab(t)
	const size = 8 * mib
	w := workload{Seed: 5, Count: 150, Min: 1, Max: 32}
	origin, theirs := newImage(t, size), newImage(t, tablesSize)
	g := kernel(t, fmt.Sprintf(`
		dmsetup create lw --table "0 %d log-writes /dev/vda /dev/vdb"
		dmsetup message lw 0 mark begin
		io write /dev/mapper/lw %v
		dmsetup message lw 0 mark middle
		io write /dev/mapper/lw %v
		echo "status: $(dmsetup status lw)"
		dmsetup remove lw
	`, size/512, w, w), origin, theirs)

	d := newDaemon(t)
	d.start()
	lower, ours := newImage(t, size), newImage(t, tablesSize)
	d.do("dm", "create", "lw", "--table", fmt.Sprintf("0 %d log-writes %s %s", size/512, lower, ours))
	d.do("dm", "message", "lw", "0", "mark", "begin")
	for i := range 2 {
		device := d.open("lw")
		if err := errors.Join(w.each(size, func(p []byte, offset int64) error { return block.Write(device, p, offset) }),
			block.Flush(device), device.Close()); err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			d.do("dm", "message", "lw", "0", "mark", "middle")
		}
	}
	if got, want := strings.TrimSpace(d.do("dm", "status", "lw")), g.report("status"); got != want {
		t.Errorf("status %q; Linux: %q", got, want)
	}
	d.do("dm", "remove", "lw")
	d.stop()
	if x, y := mustRead(t, lower), mustRead(t, origin); !bytes.Equal(x, y) {
		t.Error("the devices differ")
	}
	x, y := mustRead(t, ours), mustRead(t, theirs)
	for at := 0; at < len(x); at += 512 {
		if !bytes.Equal(x[at:at+512], y[at:at+512]) {
			t.Fatalf("sector %d of the log:\n%x\nLinux:\n%x", at/512, x[at:at+64], y[at:at+64])
		}
	}
}

// mustRead reads a file.
func mustRead(t *testing.T, path string) []byte {
	t.Helper()
	p, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return p
}
