package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"cowherd/api"
)

// dmsetup runs a line of a script for dmsetup, with standard input.
func dmsetup(t *testing.T, stdin string, args ...string) result {
	t.Helper()
	var stdout, stderr bytes.Buffer
	status := run(t.Context(), append([]string{"dm"}, args...), strings.NewReader(stdin), &stdout, &stderr)
	return result{status, stdout.String(), stderr.String()}
}

// wantText checks the whole of what is printed.
func (r result) wantText(t *testing.T, want string) {
	t.Helper()
	if r.status != exitOK || r.stdout != want || r.stderr != "" {
		t.Errorf("status %d, errors %q, output\n%s\nwant\n%s", r.status, r.stderr, r.stdout, want)
	}
}

// TestDM is a script for dmsetup. What is printed was printed by dmsetup with a kernel, but for device names and numbers.
func TestDM(t *testing.T) {
	dir := serve(t)
	t.Setenv("LC_ALL", "C")
	image := filepath.Join(dir, "a")
	if err := os.WriteFile(image, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Chdir(dir)
	for _, verb := range []string{"ls", "info", "table", "status", "deps"} {
		dmsetup(t, "", verb).wantText(t, "No devices found\n")
	}
	dmsetup(t, "", "info", "-c").wantText(t, "No devices found\n")
	dmsetup(t, "", "ls", "--tree").wantText(t, "No devices found\n")
	dmsetup(t, "", "create", "lin", "--table", "0 1000 linear ./a 0").wantText(t, "")
	dmsetup(t, "", "create", "lin", "--table", "0 1000 linear ./a 0").want(t, exitError, "", "already")
	table := filepath.Join(dir, "table")
	if err := os.WriteFile(table, []byte("# two\n0 1000 linear "+image+" 0\n\n1000 24 zero\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	dmsetup(t, "", "create", "two", table).wantText(t, "")
	dmsetup(t, "0 500 linear /dev/mapper/lin 100\n", "create", "-u", "UUID-1", "top").wantText(t, "")
	dmsetup(t, "", "create", "empty", "--notable").wantText(t, "")
	dmsetup(t, "", "table").wantText(t, "empty: \nlin: 0 1000 linear "+image+" 0\ntop: 0 500 linear lin 100\n"+
		"two: 0 1000 linear "+image+" 0\ntwo: 1000 24 zero \n")
	dmsetup(t, "", "table", "lin").wantText(t, "0 1000 linear "+image+" 0\n")
	dmsetup(t, "", "table", "empty").wantText(t, "\n")
	dmsetup(t, "", "table", "-u", "UUID-1").wantText(t, "0 500 linear lin 100\n")
	dmsetup(t, "", "table", "-j", "253", "-m", "0").wantText(t, "0 1000 linear "+image+" 0\n")
	dmsetup(t, "", "status", "--target", "zero").wantText(t, "two: 1000 24 zero \n")
	dmsetup(t, "", "ls").wantText(t, "empty\t(253:3)\nlin\t(253:0)\ntop\t(253:2)\ntwo\t(253:1)\n")
	dmsetup(t, "", "ls", "--target", "zero").wantText(t, "two\t(253, 1)\n")
	dmsetup(t, "", "ls", "-o", "blkdevname").wantText(t, "empty\t(253:3)\nlin\t(dm-0)\ntop\t(dm-2)\ntwo\t(dm-1)\n")
	dmsetup(t, "", "ls", "--tree").wantText(t, "empty (253:3)\ntop (253:2)\n `-lin (253:0)\n    `-"+image+" (0:1)\n"+
		"two (253:1)\n `-"+image+" (0:1)\n")
	dmsetup(t, "", "ls", "--tree", "-o", "inverted,nodevice").wantText(t, image+"\n |-lin\n |  `-top\n `-two\nempty\n")
	dmsetup(t, "", "ls", "--tree", "-o", "uuid,active,open,rw,nodevice").wantText(t, "empty [ACTIVE, RW, 0, ]\n"+
		"top [ACTIVE, RW, 0, UUID-1]\n `-lin [ACTIVE, RW, 1, ]\n    `-"+image+"\ntwo [ACTIVE, RW, 0, ]\n `-"+image+"\n")
	dmsetup(t, "", "deps", "top").wantText(t, "1 dependencies\t: (253, 0)\n")
	dmsetup(t, "", "deps", "-o", "devname", "top").wantText(t, "1 dependencies\t: (lin)\n")
	dmsetup(t, "", "deps", "top", "empty").wantText(t, "top: 1 dependencies\t: (253, 0)\nempty: 0 dependencies\t:\n")
	dmsetup(t, "", "remove", "lin").want(t, exitError, "", `mapped device "top"`)

	dmsetup(t, "", "suspend", "lin").wantText(t, "")
	dmsetup(t, "", "reload", "lin", "-r", "--table", "0 2000 linear ./a 0").wantText(t, "")
	dmsetup(t, "", "table", "--inactive", "lin").wantText(t, "0 2000 linear "+image+" 0\n")
	dmsetup(t, "", "info", "lin").wantText(t, `Name:              lin
State:             SUSPENDED
Tables present:    LIVE & INACTIVE
Open count:        1
Event number:      0
Major, minor:      253, 0
Number of targets: 1

`)
	dmsetup(t, "", "resume", "lin").wantText(t, "")
	dmsetup(t, "", "rename", "lin", "linear").wantText(t, "")
	dmsetup(t, "", "-v", "status", "linear").wantText(t, `Name:              linear
State:             ACTIVE (READ-ONLY)
Tables present:    LIVE
Open count:        1
Event number:      1
Major, minor:      253, 0
Number of targets: 1

0 2000 linear 
`)
	dmsetup(t, "", "wait", "-v", "linear", "0").wantText(t, "Event number:      1\n")
	dmsetup(t, "", "load", "two", "--table", "0 8 zero").wantText(t, "")
	dmsetup(t, "", "clear", "two").wantText(t, "")
	dmsetup(t, "", "rename", "two", "--setuuid", "UUID-2").wantText(t, "")
	dmsetup(t, "", "message", "two", "0", "hi").want(t, exitError, "", "does not support messages")
	dmsetup(t, "", "create", "bad", "--table", "0 8 linear ./a").want(t, exitError, "", "invalid argument count")
	dmsetup(t, "", "info", "bad").want(t, exitError, "", "device does not exist")
	dmsetup(t, "", "wipe_table", "top").wantText(t, "")
	dmsetup(t, "", "table", "top").wantText(t, "0 500 error \n")
	dmsetup(t, "", "remove", "linear", "top").wantText(t, "")
	dmsetup(t, "", "remove_all").wantText(t, "")
	dmsetup(t, "", "ls").wantText(t, "No devices found\n")
}

// TestDMColumns: the columns of info -c.
func TestDMColumns(t *testing.T) {
	serve(t)
	dmsetup(t, "", "create", "--concise", "b,UUID-1,7,,0 8 zero,8 8 linear mem:1M 0;a,,,ro,0 8 linear b 0;c").wantText(t, "")
	dmsetup(t, "", "table", "--concise").wantText(t,
		"a,,0,ro,0 8 linear b 0;b,UUID-1,7,rw,0 8 zero ,8 8 linear mem:1M 0;c,,1,rw\n")
	dmsetup(t, "", "info", "-c").wantText(t, `Name             Maj Min Stat Open Targ Event  UUID                            
a                253   0 L--r    0    1      0                                 
b                253   7 L--w    1    2      0 UUID-1                          
c                253   1 ---w    0    0      0                                 
`)
	dmsetup(t, "", "info", "-c", "--noheadings", "-o", "name").wantText(t, "a\nb\nc\n")
	dmsetup(t, "", "info", "-C", "--separator", ",", "--noheadings", "-o", "name,major").wantText(t, "a,253\nb,253\nc,253\n")
	dmsetup(t, "", "info", "-c", "--nameprefixes", "--noheadings", "-o", "name,open").wantText(t,
		"DM_NAME='a':DM_OPEN='0'\nDM_NAME='b':DM_OPEN='1'\nDM_NAME='c':DM_OPEN='0'\n")
	dmsetup(t, "", "info", "-c", "--nameprefixes", "--unquoted", "--noheadings", "-o", "name", "a").wantText(t, "DM_NAME=a\n")
	dmsetup(t, "", "info", "-c", "--noheadings", "-o", "name", "-O", "-minor").wantText(t, "b\nc\na\n")
	dmsetup(t, "", "info", "-c", "--noheadings", "-o", "name,devs_used,names_using_dev,tables_loaded,read_only", "a", "b").
		wantText(t, "a:b::Live:Read-only\nb::a:Live:Writeable\n")
	dmsetup(t, "", "info", "-c", "-o", "colour").want(t, exitUsage, "", "unrecognised field: colour")
	dmsetup(t, "", "help").want(t, exitOK, "device_ref_count", "")
	dmsetup(t, "", "ls", "--json").want(t, exitOK, `"uuid": "UUID-1"`, "")
	dmsetup(t, "", "targets").want(t, exitOK, "linear           v1.4.0\n", "")
	dmsetup(t, "", "version").want(t, exitOK, "Driver version:    4.48.0\n", "")
}

// TestDMScripts: what scripts do beside the plain verbs, as dmsetup prints it with a kernel (TestScripts of test/interop).
func TestDMScripts(t *testing.T) {
	serve(t)
	t.Setenv("LC_ALL", "C")
	for _, x := range []string{
		"a,,,,0 100 zero", "b,,,,0 50 linear a 0", "c,,,,0 50 linear a 50",
		"d,UUID-D,,,0 20 linear b 0,20 20 linear c 0", "e",
	} {
		dmsetup(t, "", "create", "--concise", x).wantText(t, "")
	}
	for _, test := range []struct{ args, want string }{
		{"ls --tree -o blkdevname,nodevice", "d <dm-3>\n |-c <dm-2>\n |  `-a <dm-0>\n `-b <dm-1>\n    `-a <dm-0>\ne\n"},
		{"ls --tree -o compact", "d (253:3)-+-c (253:2)---a (253:0)\n          `-b (253:1)---a (253:0)\ne (253:4)\n"},
		{"ls --tree -o inverted,compact", "a (253:0)-+-b (253:1)---d (253:3)\n          `-c (253:2)---d (253:3)\ne (253:4)\n"},
		{"ls --tree -o utf,nodevice", "d\n ├─c\n │  └─a\n └─b\n    └─a\ne\n"},
		{"ls --tree -o vt100,nodevice", "d\n \x1b(0\x0ftq\x1b(Bc\n \x1b(0\x0fx\x1b(B  \x1b(0\x0fmq\x1b(Ba\n \x1b(0\x0fmq\x1b(Bb\n" +
			"    \x1b(0\x0fmq\x1b(Ba\ne\n"},
		{"ls --tree -o compact,uuid,nodevice", "d [UUID-D]\n |-c []\n |  `-a []\n `-b []\n    `-a []\ne []\n"},
		{"-v deps -o devname -S name=e", "Name:              e\nState:             ACTIVE\nTables present:    None\n" +
			"Open count:        0\nEvent number:      0\nMajor, minor:      253, 4\nNumber of targets: 0\n\n0 dependencies\t:\n\n"},
		{"ls -o devname", "a\t(a)\nb\t(b)\nc\t(c)\nd\t(d)\ne\t(253:4)\n"},
		{"status -v d", "Name:              d\nState:             ACTIVE\nTables present:    LIVE\nOpen count:        0\n" +
			"Event number:      0\nMajor, minor:      253, 3\nNumber of targets: 2\nUUID: UUID-D\n\n0 20 linear \n20 20 linear \n"},
		{"info -c -o devno,major,minor --nameprefixes a", "DevNo Maj Min\nDM_DEVNO='253:0' DM_MAJOR='253' DM_MINOR='0'\n"},
		{"info -c -o subsystem,lv_layer d", "Subsys LVLayer\nUUID          \n"},
		{"splitname vg--x-lv--1-real", "VG   LV   LVLayer\nvg-x lv-1 real   \n"},
		{"splitname vg-lv-a-b", "VG   LV   LVLayer\nvg   lv   a      \n"},
		{"splitname plain", "VG    LV   LVLayer\nplain             \n"},
		{"splitname --noheadings -c -o vg_name,lv_name vg-lv", "vg:lv\n"},
		{"target-version zero linear", "zero             v1.2.0\nlinear           v1.4.0\n"},
		{"udevcreatecookie", ""},
		{"udevcomplete_all 5 -y", ""},
		{"mknodes a", ""},
		{"load e extra --table 0,8,zero", ""}, // the table of the command line wins
		{"clear e", ""},
	} {
		args := strings.Fields(test.args)
		for i := range args {
			if strings.HasPrefix(args[i], "0,") {
				args[i] = strings.ReplaceAll(args[i], ",", " ")
			}
		}
		dmsetup(t, "", args...).wantText(t, test.want)
	}
	dmsetup(t, "", "target-version", "nosuch").want(t, exitError, "", `no type "nosuch"`)
	dmsetup(t, "", "create", "f", "-n", "--table", "0 8 zero").want(t, exitUsage, "", "incompatible")
}

// TestDMSelect: --select.
func TestDMSelect(t *testing.T) {
	serve(t)
	dmsetup(t, "", "create", "--concise", "a,,,,0 100 zero;b,,,,0 50 linear a 0;c,,,,0 50 linear a 50;"+
		"d,UUID-D,,,0 20 linear b 0,20 20 linear c 0;e").wantText(t, "")
	for _, test := range []struct{ selection, names string }{
		{"name=a", "a"}, {"name!=a", "b c d e"}, {"name=~[ab]", ""}, {"name=~'[ab]'", "a b"}, {"name=~(a|d)", "a d"},
		{"name!~^[a-c]$", "d e"}, {"open>0", "a b c"}, {"open>=1 && segments=1", "a b c"}, {"name=a||name=d", "a d"},
		{"name=a#name=d", "a d"}, {"!(name=a) && minor<3", "b c"}, {"minor<=2,minor!=1", "a c"}, {"!open>0", "d e"},
		{` name = "d" && uuid!~^X`, "d"}, {"tables_loaded=None", "e"}, {"names_using_dev=d", "b c"}, {"major=252", ""},
		{"name=a || name=b && minor=7", "a"}, {"(name=a || name=b) && minor=1", "b"}, {"vg_name=x", ""},
	} {
		want := strings.ReplaceAll(test.names, " ", "\n")
		if want != "" {
			want += "\n"
		}
		dmsetup(t, "", "info", "-c", "--noheadings", "-o", "name", "-S", test.selection).wantText(t, want)
	}
	dmsetup(t, "", "info", "-c", "--noheadings", "-o", "name,selected", "-S", "name!=a").wantText(t, "a:0\nb:1\nc:1\nd:1\ne:1\n")
	dmsetup(t, "", "table", "-S", "name=a").wantText(t, "a: 0 100 zero \n")
	dmsetup(t, "", "table", "-S", "name=x").wantText(t, "")
	dmsetup(t, "", "suspend", "-S", "name=~[ab]||name=b").wantText(t, "")
	dmsetup(t, "", "info", "-c", "--noheadings", "-o", "name,attr").wantText(t, "a:L--w\nb:L-sw\nc:L--w\nd:L--w\ne:---w\n")
	dmsetup(t, "", "resume", "-S", "suspended=Suspended").wantText(t, "")
	dmsetup(t, "", "remove", "-S", "name=nosuch").wantText(t, "")
	dmsetup(t, "", "remove", "-S", "tables_loaded=None").wantText(t, "")
	dmsetup(t, "", "info", "-c", "--noheadings", "-o", "name").wantText(t, "a\nb\nc\nd\n")
	for _, bad := range []string{
		"name", "=a", "name=", "name='a", "(name=a", "name=a)", "name=a name=b", "colour=red", "open=x", "name>a", "name=~'('",
		"name=a &&", "||", "!", "open=-1", "name=~[a",
	} {
		dmsetup(t, "", "info", "-c", "-S", bad).want(t, exitUsage, "", "")
	}
}

// FuzzSelection: a selection is taken or refused, and a selection that is taken tells something of any device.
func FuzzSelection(f *testing.F) {
	for _, text := range []string{"", "name=a", "!(name=~[ab],open>=1)||uuid!='x'#minor<3"} {
		f.Add(text)
	}
	all := []api.DMDevice{{Name: "a", UUID: "LVM-x"}}
	f.Fuzz(func(_ *testing.T, text string) {
		if s, err := parseSelection(text); err == nil {
			s(&all[0], all)
		}
	})
}

func TestDMUsage(t *testing.T) {
	serve(t)
	for _, test := range []struct{ args, text string }{
		{"create", "please provide a name"},
		{"remove", "no device specified"},
		{"suspend", "no device specified"},
		{"frobnicate", "unexpected argument frobnicate"},
		{"ls --bogus", "unknown flag --bogus"},
		{"ls extra", "unexpected argument extra"},
		{"ls -o colour", "devno, blkdevname or devname"},
		{"ls --tree -o colour", "of a tree"},
		{"wait x y", "event_nr"},
	} {
		dmsetup(t, "", strings.Fields(test.args)...).want(t, exitUsage, "", test.text)
	}
	dmsetup(t, "", "wait", "nosuch").want(t, exitError, "", "no mapped device")
}
