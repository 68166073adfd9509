package service

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"cowherd/api"
)

// Of the state file.
const (
	stateName    = "state.json"
	stateNewName = "state.json.new" // while it is being written
	stateFormat  = "cowherd state"
	stateVersion = 1
	stateMax     = 64 << 20 // bytes that are read
)

// stateFile is what a daemon must know when it is started anew:
//
//	{"format": "cowherd state", "version": 1, "crc32c": "89abcdef", "content": {"devices": [...]}}
//
// A change writes a new file, makes it durable and gives it the old one's name, so that after a crash at any moment
// there is a whole file, from before the change or from after it. A file that is damaged all the same (crc32c is that
// of content without white space) is refused and left as it is.
type stateFile struct {
	dir string
	// writing holds one message while nobody changes the file: changes are made of I/O, for which no mutex is held.
	writing chan struct{}
	// content is what the file holds. It is replaced by a change, never changed itself.
	content atomic.Pointer[content]
}

// content is what the state file holds.
type content struct {
	Devices []savedDevice `json:"devices"` // by name
}

// savedDevice is an origin that was attached and not detached.
type savedDevice struct {
	Request   api.AttachRequest `json:"request"`
	Since     time.Time         `json:"since"`
	Lost      string            `json:"lost,omitempty"` // why it could not be opened last time
	Snapshots []savedSnapshot   `json:"snapshots,omitempty"`
	Cloned    bool              `json:"cloned,omitempty"` // a clone's metadata was made: it is not to be made anew
}

// savedSnapshot is a snapshot that was taken and not removed.
type savedSnapshot struct {
	Request     api.SnapshotRequest `json:"request"`
	Since       time.Time           `json:"since"`
	Phase       phase               `json:"phase"`
	OriginBytes int64               `json:"origin_bytes"`
	Made        bool                `json:"made,omitempty"`    // the store is a file that the daemon made, and removes
	Stopped     bool                `json:"stopped,omitempty"` // phaseMerging: by the user
	Lost        string              `json:"lost,omitempty"`    // phaseLost: why
}

// phase is what is to be done about a snapshot when the daemon is started anew.
type phase string

const (
	// phaseKept: a persistent snapshot is opened again; a transient one is said to be gone.
	phaseKept phase = "kept"
	// phaseTaking: the store was being made, and nobody has been told of the snapshot. As phaseRemoving.
	phaseTaking phase = "taking"
	// phaseMerging: it is opened again, and merged before anybody may use the origin.
	phaseMerging phase = "merging"
	// phaseRemoving: the origin may have gone on without it. Its store is made invalid, and it is forgotten.
	phaseRemoving phase = "removing"
	// phaseLost: the origin has gone on without it, because it could not be opened. Its store is made invalid, if it can
	// be reached, and it is shown until somebody removes it.
	phaseLost phase = "lost"
)

// openStateFile reads the state file in dir; there need not be one.
func openStateFile(dir string) (*stateFile, error) {
	f := &stateFile{dir: dir, writing: make(chan struct{}, 1)}
	f.writing <- struct{}{}
	if err := os.Remove(filepath.Join(dir, stateNewName)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("state file: %w", err)
	}
	text, err := readAtMost(f.path(), stateMax)
	if errors.Is(err, fs.ErrNotExist) {
		f.content.Store(&content{})
		return f, nil
	}
	if err != nil {
		return nil, fmt.Errorf("state file: %w", err)
	}
	c, err := decodeState(text)
	if err != nil {
		return nil, api.Errorf(syscall.EINVAL, "state file %s: %v. It is left as it is. To begin with nothing attached, "+
			"move it away; persistent snapshots can then be opened by \"cowherd snapshot --reopen\", if their devices have "+
			"not been written since", f.path(), err)
	}
	f.content.Store(c)
	return f, nil
}

func (f *stateFile) path() string { return filepath.Join(f.dir, stateName) }

// readAtMost reads a file that is not longer than limit bytes.
func readAtMost(path string, limit int64) ([]byte, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	text, err := io.ReadAll(io.LimitReader(file, limit+1))
	if err == nil && int64(len(text)) > limit {
		err = fmt.Errorf("%s is longer than %d bytes", path, limit)
	}
	return text, err
}

// stateBody is the state file as it is written.
type stateBody struct {
	Format  string          `json:"format"`
	Version int             `json:"version"`
	CRC32C  string          `json:"crc32c"`
	Content json.RawMessage `json:"content"`
}

// checksum is that of content, however it is indented.
func checksum(content []byte) (string, error) {
	var plain bytes.Buffer
	if err := json.Compact(&plain, content); err != nil {
		return "", err
	}
	return fmt.Sprintf("%08x", crc32.Checksum(plain.Bytes(), crc32.MakeTable(crc32.Castagnoli))), nil
}

// encodeState is the file for c.
func encodeState(c *content) ([]byte, error) {
	plain, err := json.Marshal(c)
	if err != nil {
		return nil, err
	}
	body := stateBody{Format: stateFormat, Version: stateVersion, Content: plain}
	if body.CRC32C, err = checksum(plain); err != nil {
		return nil, err
	}
	text, err := json.MarshalIndent(body, "", "  ")
	return append(text, '\n'), err
}

// decodeState reads a file. The error says what is wrong with it.
func decodeState(text []byte) (*content, error) {
	var head struct {
		Format  string `json:"format"`
		Version int    `json:"version"`
	}
	if err := json.Unmarshal(text, &head); err != nil {
		return nil, fmt.Errorf("it is damaged: %w", err)
	}
	if head.Format != stateFormat || head.Version != stateVersion {
		return nil, fmt.Errorf("it is of the format %q, version %d; %q, version %d is known here", head.Format, head.Version,
			stateFormat, stateVersion)
	}
	var body stateBody
	if err := decodeStrictly(text, &body); err != nil {
		return nil, fmt.Errorf("it is damaged: %w", err)
	}
	sum, err := checksum(body.Content)
	if err == nil && sum != body.CRC32C {
		err = fmt.Errorf("the checksum of its content is %s, and should be %s", sum, body.CRC32C)
	}
	if err != nil {
		return nil, fmt.Errorf("it is damaged: %w", err)
	}
	c := &content{}
	if err := decodeStrictly(body.Content, c); err != nil {
		return nil, fmt.Errorf("its content: %w", err)
	}
	if err := c.check(); err != nil {
		return nil, fmt.Errorf("its content: %w", err)
	}
	return c, nil
}

// decodeStrictly decodes one JSON value without fields that to does not have.
func decodeStrictly(text []byte, to any) error {
	decoder := json.NewDecoder(bytes.NewReader(text))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(to); err != nil {
		return err
	}
	if _, err := decoder.Token(); !errors.Is(err, io.EOF) {
		return errors.New("there is something behind it")
	}
	return nil
}

// check tells whether names and phases are what the daemon would have written.
func (c *content) check() error {
	names := map[string]bool{}
	once := func(name string) error {
		if names[name] {
			return fmt.Errorf("%q is there twice", name)
		}
		names[name] = true
		return nil
	}
	for i := range c.Devices {
		d := &c.Devices[i]
		if err := errors.Join(checkName("device", d.Request.Name), once(d.Request.Name)); err != nil {
			return err
		}
		for j := range d.Snapshots {
			s := &d.Snapshots[j]
			origin, _, err := splitName(s.Request.Name)
			if err := errors.Join(err, once(s.Request.Name)); err != nil {
				return err
			}
			if origin != d.Request.Name {
				return fmt.Errorf("%q is among the snapshots of %q", s.Request.Name, d.Request.Name)
			}
			switch s.Phase {
			case phaseKept, phaseTaking, phaseMerging, phaseRemoving, phaseLost:
			default:
				return fmt.Errorf("%q is in the unknown phase %q", s.Request.Name, s.Phase)
			}
		}
	}
	return nil
}

// device is the device of a name; nil: there is none. What it returns belongs to c.
func (c *content) device(name string) *savedDevice {
	for i := range c.Devices {
		if c.Devices[i].Request.Name == name {
			return &c.Devices[i]
		}
	}
	return nil
}

// snapshot is the snapshot of a whole name; nil: there is none. What it returns belongs to c.
func (c *content) snapshot(name string) *savedSnapshot {
	origin, _, _ := strings.Cut(name, "@")
	d := c.device(origin)
	if d == nil {
		return nil
	}
	for i := range d.Snapshots {
		if d.Snapshots[i].Request.Name == name {
			return &d.Snapshots[i]
		}
	}
	return nil
}

// put adds a device, or replaces the one of its name.
func (c *content) put(d savedDevice) {
	c.forget(d.Request.Name)
	c.Devices = append(c.Devices, d)
	slices.SortFunc(c.Devices, func(a, b savedDevice) int { return strings.Compare(a.Request.Name, b.Request.Name) })
}

// forget removes a device with its snapshots, if it is there.
func (c *content) forget(name string) {
	c.Devices = slices.DeleteFunc(c.Devices, func(d savedDevice) bool { return d.Request.Name == name })
}

// putSnapshot adds a snapshot to its device, which is there, or replaces the one of its name.
func (c *content) putSnapshot(s savedSnapshot) {
	c.forgetSnapshot(s.Request.Name)
	origin, _, _ := strings.Cut(s.Request.Name, "@")
	if d := c.device(origin); d != nil {
		d.Snapshots = append(d.Snapshots, s)
	}
}

// forgetSnapshot removes a snapshot, if it is there.
func (c *content) forgetSnapshot(name string) {
	origin, _, _ := strings.Cut(name, "@")
	if d := c.device(origin); d != nil {
		d.Snapshots = slices.DeleteFunc(d.Snapshots, func(s savedSnapshot) bool { return s.Request.Name == name })
	}
}

// clone is a copy that can be changed.
func (c *content) clone() *content {
	made := &content{Devices: slices.Clone(c.Devices)}
	for i := range made.Devices {
		made.Devices[i].Snapshots = slices.Clone(made.Devices[i].Snapshots)
	}
	return made
}

// now is what the file holds. It must not be changed.
func (f *stateFile) now() *content { return f.content.Load() }

// change applies what to the content. When it returns nil that is durable; after an error it may be there after a
// restart or not.
func (f *stateFile) change(what func(*content)) error {
	<-f.writing
	defer func() { f.writing <- struct{}{} }()
	c := f.now().clone()
	what(c)
	text, err := encodeState(c)
	if err == nil {
		err = f.replace(text)
	}
	if err != nil {
		return fmt.Errorf("state file: %w", err)
	}
	f.content.Store(c)
	return nil
}

// replace puts text in place of what the file holds.
func (f *stateFile) replace(text []byte) error {
	path := filepath.Join(f.dir, stateNewName)
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = file.Write(text)
	if err == nil {
		err = file.Sync()
	}
	if err = errors.Join(err, file.Close()); err == nil {
		err = os.Rename(path, f.path())
	}
	if err != nil {
		return errors.Join(err, os.Remove(path))
	}
	return syncDir(f.dir)
}

// syncDir makes durable which files a directory holds.
func syncDir(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}
