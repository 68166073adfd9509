//go:build interop

package interop

import (
	"strings"
	"testing"
)

// scripts is what scripts for dmsetup do beside the plain verbs. No device lies on a disk, which has no name in a guest's
// tree.
const scripts = `
export LC_ALL=C
x create a --table "0 100 zero"
x create b --table "0 50 linear /dev/mapper/a 0"
x create c --table "0 50 linear /dev/mapper/a 50"
x create d -u UUID-D --table "0 20 linear /dev/mapper/b 0
20 20 linear /dev/mapper/c 0"
x create e --notable
x ls --tree
x ls --tree -o nodevice
x ls --tree -o blkdevname
x ls --tree -o device,active,open,rw,uuid
x ls --tree -o uuid,rw,open,active,nodevice
x ls --tree -o inverted
x ls --tree -o inverted,compact
x ls --tree -o compact
x ls --tree -o notrunc
x ls --tree -o ascii
x ls --tree -o utf
x ls --tree -o utf,compact
x ls --tree -o vt100,compact
x ls --tree -o compact,uuid,nodevice
x ls --tree -o vt100
x ls -o devname
x ls -o devno
x ls -o bad
x deps
x deps -o devname
x deps d e
x -v deps d e
x -v deps
x -v table
x -v status
x -v status e
x deps nosuch
x -v deps d
x info -c -S name=a
x info -c -o name -S 'name=~[ab]'
x info -c --noheadings -o name -S 'open>0'
x info -c --noheadings -o name -S 'open>0 && segments=1'
x info -c --noheadings -o name -S 'name=a||name=d'
x info -c --noheadings -o name,selected -S 'name!=a'
x info -c --noheadings -o name -S 'uuid=UUID-D'
x info -c --noheadings -o name -S '!(name=a) && minor<3'
x info -c --noheadings -o name -S 'tables_loaded=None'
x info -c --noheadings -o name -S 'suspended=Active'
x info -c --noheadings -o name -S 'names_using_dev=d'
x info -c --noheadings -o name -S 'bogus=1'
x info -c --noheadings -o name -S 'nosuchname'
x table -S name=a
x status -S name=d
x remove -S name=nosuch
x info -S name=a
x ls -S name=a
x deps -S name=d
x deps -S name=nosuch
x status -S 'name=~^[a-c]$'
x table -S bogus=1
x info -c -S 'name=~(a|d)' -o name
x info -c -o name,selected -S 'open>=1'
x info -c -o name -S 'name="d" && uuid!~^X'
x info -c -o name -S 'minor<=2,minor!=1'
x suspend -S name=a
x resume -S 'suspended=Suspended'
x suspend -S name=nosuch
x info -c --noheadings -o name,attr
x info -c --noheadings -o name,uuid
x info -c --noheadings --separator ' ' -o name,open
x info -c --separator ';' -o name,open
x info -c --noheadings -o +devno a
x info -c -o name --noheadings --nameprefixes a
x info -c -o devno,major,minor --nameprefixes a
x info -c -o blkdevs_used,devnos_used,device_ref_count,devnos_using_dev
x info -c -o name,tables_loaded -O tables_loaded,-name
x info -c --noheadings -j 253 -m 3
x info -j 253 -m 3
x info -u UUID-D
x info -c -o name nosuch
x create -u LVM-abc vg--1-lv-real --notable
x info -c -o name,subsystem,vg_name,lv_name,lv_layer
x remove vg--1-lv-real
x info -c -o subsystem,vg_name,lv_name,lv_layer
x splitname vg--x-lv--1-real
x splitname vg-lv
x splitname vg-lv LVM
x splitname plain
x splitname -c vg-lv
x splitname vg-lv-a-b
x splitname vg-lv other
x splitname
x splitname --noheadings -c -o vg_name,lv_name vg-lv
x target-version zero
x target-version nosuch
x target-version zero linear
x targets extra
x mknodes
x mknodes a
x udevcreatecookie
x table --showkeys a
x table -c a
x table --concise a d
x table --concise
x status a d
x status -v a d
x status --noflush a
x status --target zero
x status --target nosuch
x table --target linear d
x table --target zero d
x table --target zero -v d
x wait a 7
x wait --noflush a 7
x suspend a b
x info -c --noheadings -o name,attr
x resume a b
x suspend --noflush --nolockfs a
x resume --noflush --nolockfs a
x suspend
x resume
x clear
x clear e
x clear nosuch
x load e "0 8 zero"
x load e --table "0 8 zero" extra
x create f --table "0 8 zero" extra
x create g --table "0 8 zero" -n
x create h --notable --table "0 8 zero"
x create i "0 8 zero"
x create a%b --notable
x create 'sp ace' --notable
x create -u UUID-D j --notable
x create k --notable -j 253 -m 9
x create k2 --notable -j 253 -m 9
x create k3 --notable -j 252 -m 11
x load k --table "0 8 zero" --readonly
x info k
x resume k
x info -c k
x load k --table "0 8 zero
8 8 bogus"
x load k --table "8 8 zero"
x load k --table "0 8 zero # not a comment"
x load k --table "0 8 zero extra"
x load k --table "  0   8   zero  "
x load k --table "0 8"
x load k --table ""
echo '$ load k <empty'; dmsetup load k </dev/null; echo "[$?]"
echo '$ load k <several'; printf '# c\n\n0 8 zero\n 8 8 error\n' | dmsetup load k; echo "[$?]"
x table --inactive k
x info k
x wipe_table k
x table k
x rename k
x rename k a
x rename k k
x rename k kk
x rename kk 'x/y'
x rename kk --setuuid UUID-D
x rename --setuuid kk UUID-K
x info kk
x rename a --setuuid ''
x message a 0
x message a x hi
x message a -1 hi
x remove a
x remove b
x remove --force b
x info b
x table b
x info -c --noheadings -o name,attr,open
x remove --deferred a
x info a
x remove --deferred c
x remove -u UUID-D
x ls
x remove b
x remove_all --deferred
x remove_all -f
x remove_all extra
x remove
x ls
x ls --tree
x deps
x version extra
`

// TestScripts is TestSurface for what scripts do beside the plain verbs.
func TestScripts(t *testing.T) {
	t.Parallel()
	needLab(t)
	d := newDaemon(t)
	d.start()
	a, b := newImage(t, tablesSize), newImage(t, tablesSize)
	script := "x() { echo \"\\$ $*\"; dmsetup \"$@\" 2>/dev/null; echo \"[$?]\"; }\n" + scripts
	ours := hostShell(t, d, a, b, script)
	g := kernel(t, "set +e\nA=/dev/vda B=/dev/vdb tmp=/tmp\n"+script, newImage(t, tablesSize), newImage(t, tablesSize))
	theirs := strings.NewReplacer("linear 253:0", "linear a", "linear 253:1", "linear b", "linear 253:2", "linear c").
		Replace(g.Output)
	mine, linux := commandsOf(ours), commandsOf(theirs)
	if len(mine) != len(linux) {
		t.Fatalf("%d commands were run here, %d by Linux", len(mine), len(linux))
	}
	for i := range mine {
		if mine[i] != linux[i] {
			t.Errorf("cowherd: %s\nLinux: %s", mine[i], linux[i])
		}
	}
	d.stop()
}
