package nbd

import (
	"bytes"
	"fmt"
	"io/fs"
	"strings"
	"testing"
	"time"

	"cowherd/block"
)

const testSize = 1 << 20

// testFlags are what an export of a fileDevice has in simple mode.
const testFlags = flagHasFlags | flagSendFlush | flagSendFUA | flagSendTrim | flagSendWriteZeroes | flagSendCache |
	flagSendFastZero

func testExport(t testing.TB) *Export {
	return &Export{Name: "disk", Description: "a test's", Device: newFileDevice(t, testSize)}
}

// blockSizeInfo is what INFO says of an export of a fileDevice.
func blockSizeInfo() []byte {
	return message(uint16(infoBlockSize), uint32(1), uint32(4096), uint32(LengthMax))
}

func exportInfo(flags uint16) []byte { return message(uint16(infoExport), uint64(testSize), flags) }

func TestGreeting(t *testing.T) {
	s := startServer(t, Config{}, testExport(t))
	t.Run("unknown client flags", func(t *testing.T) {
		c := s.dial()
		c.receive(18)
		c.send(uint32(4))
		c.expectEnd()
	})
	t.Run("wrong option magic", func(t *testing.T) {
		c := s.dial()
		c.greet()
		c.send(uint64(magicOption+1), uint32(optList), uint32(0))
		c.expectEnd()
	})
	t.Run("not fixed", func(t *testing.T) {
		c := s.dial()
		c.receive(18)
		c.send(uint32(0))
		c.option(optList)
		c.expectEnd()
	})
	t.Run("not fixed, export name", func(t *testing.T) {
		c := s.dial()
		c.receive(18)
		c.send(uint32(0))
		c.option(optExportName, "disk")
		c.expect(uint64(testSize), uint16(testFlags), make([]byte, 124))
		c.disconnect()
	})
}

func TestExportName(t *testing.T) {
	s := startServer(t, Config{}, testExport(t))
	for _, name := range []string{"disk", ""} {
		c := s.dial()
		c.greet()
		c.option(optExportName, name)
		c.expect(uint64(testSize), uint16(testFlags))
		c.request(cmdRead, 0, 1, 0, 4)
		c.expectSimple(1, 0, "\x00\x00\x00\x00")
		c.disconnect()
	}
	for _, name := range []string{"none", strings.Repeat("x", stringMax+1), strings.Repeat("x", optionMax+1)} {
		c := s.dial()
		c.greet()
		c.option(optExportName, name)
		c.expectEnd()
	}
}

func TestList(t *testing.T) {
	s := startServer(t, Config{}, testExport(t))
	c := s.dial()
	c.greet()
	c.option(optList)
	c.expectReply(optList, repServer, text("disk"), "a test's")
	c.expectReply(optList, repAck)
	c.option(optList, "x")
	c.expectRefusal(optList, repErrInvalid)
	c.option(optAbort, "ignored")
	c.expectReply(optAbort, repAck)
	c.expectEnd()
}

func TestInfoAndGo(t *testing.T) {
	s := startServer(t, Config{}, testExport(t))
	c := s.dial()
	c.greet()

	c.option(optInfo, text("disk"), uint16(0))
	c.expectReply(optInfo, repInfo, exportInfo(testFlags))
	c.expectReply(optInfo, repInfo, blockSizeInfo())
	c.expectReply(optInfo, repAck)

	c.option(optStructuredReply, "x")
	c.expectRefusal(optStructuredReply, repErrInvalid)
	c.option(optStructuredReply)
	c.expectReply(optStructuredReply, repAck)

	c.option(optInfo, text("none"), uint16(0))
	c.expectRefusal(optInfo, repErrUnknown)

	c.option(optGo, text(""), uint16(4), uint16(infoName), uint16(infoDescription), uint16(infoBlockSize), uint16(99))
	c.expectReply(optGo, repInfo, exportInfo(testFlags|flagSendDF))
	c.expectReply(optGo, repInfo, blockSizeInfo())
	c.expectReply(optGo, repInfo, uint16(infoName), "disk")
	c.expectReply(optGo, repInfo, uint16(infoDescription), "a test's")
	c.expectReply(optGo, repAck)
	c.disconnect()
}

func TestMalformedOptions(t *testing.T) {
	s := startServer(t, Config{}, testExport(t))
	c := s.dial()
	c.greet()
	c.option(optStructuredReply)
	c.expectReply(optStructuredReply, repAck)
	for _, data := range [][]byte{
		nil,
		message(uint32(4), "dis"),
		text("disk"),
		message(text("disk"), uint16(1)),
		message(text("disk"), uint16(0), uint16(0)),
		message(uint32(0xffffffff), "disk", uint16(0)),
		message(text(strings.Repeat("x", stringMax+1)), uint16(0)),
	} {
		c.option(optGo, data)
		c.expectRefusal(optGo, repErrInvalid)
	}
	for _, data := range [][]byte{
		nil,
		text("disk"),
		message(text("disk"), uint32(1)),
		message(text("disk"), uint32(0xffffffff), text("base:")),
		message(text("disk"), uint32(1), uint32(9), "base:"),
		message(text("disk"), uint32(1), text("base:"), "x"),
		message(text("disk"), uint32(1), text("no colon")),
	} {
		for _, number := range []uint32{optListMetaContext, optSetMetaContext} {
			c.option(number, data)
			c.expectRefusal(number, repErrInvalid)
		}
	}
	c.option(99, make([]byte, 1000))
	c.expectReply(99, repErrUnsupported)
	c.option(99, make([]byte, optionMax+1))
	c.expectRefusal(99, repErrTooBig)
	c.option(optStartTLS)
	c.expectRefusal(optStartTLS, repErrPolicy)
	c.option(optStartTLS, "x")
	c.expectRefusal(optStartTLS, repErrInvalid)
	c.goTo("disk")
	c.disconnect()

	c = s.dial()
	c.greet()
	c.send(uint64(magicOption), uint32(optList), uint32(drainMax+1))
	c.expectEnd()
}

func TestMetaContextOptions(t *testing.T) {
	e := testExport(t)
	e.Contexts = []Context{{Name: "cowherd:copied", Extents: allData}, {Name: "cowherd:x", Extents: allData}}
	s := startServer(t, Config{}, e)
	c := s.dial()
	c.greet()
	c.option(optSetMetaContext, text("disk"), uint32(0))
	c.expectRefusal(optSetMetaContext, repErrInvalid) // no structured replies yet
	c.option(optStructuredReply)
	c.expectReply(optStructuredReply, repAck)

	base, copied, x := "base:allocation", "cowherd:copied", "cowherd:x"
	for _, tc := range []struct {
		queries []string
		list    []string
		set     []string
	}{
		{nil, []string{base, copied, x}, nil},
		{[]string{"base:"}, []string{base}, nil},
		{[]string{"cowherd:"}, []string{copied, x}, nil},
		{[]string{base}, []string{base}, []string{base}},
		{[]string{x, base, x}, []string{base, x}, []string{base, x}},
		{[]string{"other:thing", "base:other"}, nil, nil},
		{[]string{"cowherd:cop"}, nil, nil},
	} {
		queries := message(text("disk"), uint32(len(tc.queries)))
		for _, q := range tc.queries {
			queries = append(queries, text(q)...)
		}
		c.option(optListMetaContext, queries)
		for _, name := range tc.list {
			c.expectReply(optListMetaContext, repMetaContext, uint32(0), name)
		}
		c.expectReply(optListMetaContext, repAck)
		c.option(optSetMetaContext, queries)
		for _, name := range tc.set {
			id := map[string]uint32{base: 0, copied: 1, x: 2}[name]
			c.expectReply(optSetMetaContext, repMetaContext, id, name)
		}
		c.expectReply(optSetMetaContext, repAck)
	}
	c.option(optListMetaContext, text("none"), uint32(0))
	c.expectRefusal(optListMetaContext, repErrUnknown)
	c.option(optAbort)
	c.expectReply(optAbort, repAck)
}

// TestContextsOfAnotherExport: what was selected counts only for the export that it was selected for.
func TestContextsOfAnotherExport(t *testing.T) {
	s := startServer(t, Config{}, testExport(t))
	c := s.dial()
	c.greet()
	c.option(optStructuredReply)
	c.expectReply(optStructuredReply, repAck)
	c.option(optSetMetaContext, text("disk"), uint32(1), text("base:allocation"))
	c.expectReply(optSetMetaContext, repMetaContext, uint32(0), "base:allocation")
	c.expectReply(optSetMetaContext, repAck)
	c.goTo("") // the same device by another name
	c.request(cmdBlockStatus, 0, 1, 0, 4096)
	c.expectError(true, 1, wireInvalid)
	c.disconnect()
}

func TestRefusedExports(t *testing.T) {
	wide := testExport(t)
	wide.Name = "wide"
	limits := wide.Device.Limits()
	limits.LogicalBlock = 128 << 10
	wide.Device.(*fileDevice).limits = limits
	s := startServer(t, Config{}, wide)
	c := s.dial()
	c.greet()
	c.option(optGo, text("wide"), uint16(0))
	c.expectRefusal(optGo, repErrPolicy)
	c.option(optExportName, "wide")
	c.expectEnd()
}

func TestHandshakeTimeout(t *testing.T) {
	s := startServer(t, Config{HandshakeTimeout: 20 * time.Millisecond}, testExport(t))
	c := s.dial()
	c.receive(18)
	c.expectEnd()
}

func TestConnectionsMax(t *testing.T) {
	s := startServer(t, Config{ConnectionsMax: 2}, testExport(t))
	a, b := s.dial(), s.dial()
	a.enter("disk", true)
	b.greet()
	c := s.dial()
	c.expectEnd()
	a.disconnect()
	b.goTo("disk")
	b.disconnect()
}

func TestNewServerRefuses(t *testing.T) {
	if _, err := NewServer(Config{}); err == nil {
		t.Error("a server without exports")
	}
	if _, err := NewServer(Config{Exports: exportsOf(), TLSMode: TLSRequire}); err == nil {
		t.Error("TLS wanted without a configuration")
	}
}

func TestBlockSizes(t *testing.T) {
	for _, tc := range []struct {
		logical, preferred int
		min, want          uint32
	}{
		{1, 0, 1, 512}, {1, 4096, 1, 4096}, {512, 1, 512, 512}, {4096, 512, 4096, 4096},
		{512, 5000, 512, 8192}, {512, 1 << 30, 512, LengthMax}, {65536, 4096, 65536, 65536},
	} {
		d := fileDeviceOf(-1, testSize)
		d.limits.LogicalBlock, d.limits.PreferredIO = tc.logical, tc.preferred
		minimum, preferred, maximum := (&Export{Device: d}).blockSizes()
		if minimum != tc.min || preferred != tc.want || maximum != LengthMax {
			t.Errorf("%+v: %d, %d, %d", tc, minimum, preferred, maximum)
		}
	}
}

func TestExportFlags(t *testing.T) {
	d := fileDeviceOf(-1, 1000)
	d.limits.LogicalBlock = 512
	e := &Export{Device: d, MultiConn: true}
	if e.size() != 512 {
		t.Errorf("size %d", e.size())
	}
	if got := e.flags(true); got != testFlags|flagSendDF|flagCanMultiConn {
		t.Errorf("flags %#x", got)
	}
	d.limits.DiscardMax = 0
	if got := e.flags(false); got != testFlags&^flagSendTrim|flagCanMultiConn {
		t.Errorf("flags without discard %#x", got)
	}
	e.ReadOnly, e.MultiConn = true, false
	want := uint16(flagHasFlags | flagReadOnly | flagSendFlush | flagSendFUA | flagSendCache)
	if got := e.flags(false); got != want {
		t.Errorf("flags of a read-only export %#x", got)
	}
	d.limits.ReadOnly, e.ReadOnly = true, false
	if got := e.flags(false); got != want {
		t.Errorf("flags of a read-only device %#x", got)
	}
}

func TestWireErrno(t *testing.T) {
	for _, tc := range []struct {
		err  error
		want uint32
	}{
		{nil, 0},
		{errReadOnly, 1}, {fmt.Errorf("x: %w", errNoSpace), 28}, {errUnaligned, 22}, {errNotFast, 95},
		{errNoMemory, 12}, {fs.ErrClosed, 5},
		{&block.Error{Errno: 30}, 1}, {&block.Error{Errno: 13}, 1}, {&block.Error{Errno: 122}, 28},
		{&block.Error{Errno: 27}, 28}, {&block.Error{Errno: 75}, 75}, {&block.Error{Errno: 108}, 108},
		{&block.Error{Errno: 38}, 95}, {&block.Error{Errno: 61}, 5},
	} {
		if got := wireErrno(tc.err); got != tc.want {
			t.Errorf("%v: %d, want %d", tc.err, got, tc.want)
		}
	}
}

func TestCut(t *testing.T) {
	if got := cut("aé", 2); got != "a" {
		t.Errorf("%q", got)
	}
	if got := cut(strings.Repeat("é", 300), errorTextMax); len(got) != 256 || bytes.ContainsRune([]byte(got), 0xfffd) {
		t.Errorf("%q", got)
	}
}
