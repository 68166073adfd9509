package transfer

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	// journalVersion is in the header; another one is refused.
	journalVersion = 1
	// journalMax bounds the size in bytes of a journal that is read: a line a second for more than a week.
	journalMax = 64 << 20
)

// An Identity is what a device is known by when a copy is gone on with.
type Identity struct {
	// Kind is "file", "device" or "nbd".
	Kind string `json:"kind"`
	// Name is an absolute path, or a URI. It tells NBD exports from each other; for others it is for people.
	Name string `json:"name"`
	// Size in bytes.
	Size int64 `json:"size_bytes"`
	// Device and Inode are a file's; Device alone is a block device's number.
	Device uint64 `json:"device,omitempty"`
	Inode  uint64 `json:"inode,omitempty"`
	// Modified is when a source that is a file was last written, in nanoseconds since 1970; 0 for others.
	Modified int64 `json:"modified_ns,omitempty"`
	// Taken is when a snapshot behind an export was taken, in nanoseconds since 1970; 0 for others, and when it is not
	// known.
	Taken int64 `json:"taken_ns,omitempty"`
}

// same tells in words why now is not what i was; "" if it is.
func (i Identity) same(now Identity) string {
	switch {
	case i.Kind != now.Kind, i.Kind == "nbd" && i.Name != now.Name, i.Device != now.Device, i.Inode != now.Inode:
		return fmt.Sprintf("it is another one: it was the %s %s", i.Kind, i.Name)
	case i.Size != now.Size:
		return fmt.Sprintf("it had %d bytes, and has %d now", i.Size, now.Size)
	case i.Taken != now.Taken:
		return "it is another snapshot of the same name"
	case i.Modified != now.Modified:
		return "it has been written since"
	}
	return ""
}

// A Journal is a file that tells how far a copy has come, so that it can be gone on with after a crash. As long as it is
// there the destination is incomplete.
//
// It is lines of text, each with a CRC-32C (Castagnoli) of what follows, in eight hexadecimal digits, a space, and an
// object in JSON: first the header, then marks, each with the number of bytes from the start of the source that are
// durable in the destination. The last line may be torn, and does not count then. A wrong line elsewhere is an error.
type Journal struct {
	file *os.File
	path string
	head journalHeader
	done int64
}

// journalHeader is the first line.
type journalHeader struct {
	Version     int      `json:"cowherd_copy"`
	Source      Identity `json:"source"`
	Destination Identity `json:"destination"`
}

// journalMark is every other line.
type journalMark struct {
	Done int64 `json:"done_bytes"`
}

// castagnoli is the table of CRC-32C. It is made at its first use, which takes 0.15 ms: not at the start of every command.
func castagnoli() *crc32.Table { return crc32.MakeTable(crc32.Castagnoli) }

// CreateJournal makes the journal of a copy that begins. A journal that is there already is replaced if replace is true,
// else it is EEXIST. It is durable when CreateJournal returns.
func CreateJournal(path string, source, destination Identity, replace bool) (*Journal, error) {
	flags := os.O_RDWR | os.O_CREATE | os.O_EXCL
	if replace {
		flags = os.O_RDWR | os.O_CREATE
	}
	j, err := openJournal(path, flags)
	if err != nil {
		return nil, err
	}
	j.head = journalHeader{journalVersion, source, destination}
	err = j.file.Truncate(0)
	if err == nil {
		err = j.append(j.head)
	}
	if err == nil {
		err = syncDirectory(filepath.Dir(path))
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("journal %s: %w", path, err), j.file.Close())
	}
	return j, nil
}

// OpenJournal opens the journal of a copy that was begun from source to destination. It is refused with ESTALE when they
// are not what they were, and with EINVAL when it is damaged.
func OpenJournal(path string, source, destination Identity) (*Journal, error) {
	j, err := openJournal(path, os.O_RDWR)
	if err != nil {
		return nil, err
	}
	if err := j.load(source, destination); err != nil {
		return nil, errors.Join(fmt.Errorf("journal %s: %w", path, err), j.file.Close())
	}
	return j, nil
}

// openJournal opens the file and locks it, so that no copy runs twice.
func openJournal(path string, flags int) (*Journal, error) {
	f, err := os.OpenFile(path, flags, 0o600)
	if err != nil {
		return nil, fmt.Errorf("journal: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = fmt.Errorf("this copy is running: %w", syscall.EBUSY)
		}
		return nil, errors.Join(fmt.Errorf("journal %s: %w", path, err), f.Close())
	}
	return &Journal{file: f, path: path}, nil
}

// load reads the journal and cuts a torn line off.
func (j *Journal) load(source, destination Identity) error {
	text, err := io.ReadAll(io.LimitReader(j.file, journalMax+1))
	if err != nil {
		return err
	}
	head, done, length, err := parseJournal(text)
	if err != nil {
		return err
	}
	if why := head.Source.same(source); why != "" {
		return fmt.Errorf("the source cannot be gone on with: %s: %w", why, syscall.ESTALE)
	}
	if why := head.Destination.same(destination); why != "" {
		return fmt.Errorf("the destination cannot be gone on with: %s: %w", why, syscall.ESTALE)
	}
	if done > source.Size {
		return fmt.Errorf("it says that %d of %d bytes are done: %w", done, source.Size, syscall.EINVAL)
	}
	j.head, j.done = head, done
	if err := j.file.Truncate(int64(length)); err != nil {
		return err
	}
	_, err = j.file.Seek(int64(length), io.SeekStart)
	return err
}

// parseJournal reads a journal. length is that of the lines that count, in bytes.
func parseJournal(text []byte) (head journalHeader, done int64, length int, err error) {
	if len(text) > journalMax {
		return head, 0, 0, fmt.Errorf("it is longer than %d bytes: %w", journalMax, syscall.EINVAL)
	}
	for number := 1; length < len(text); number++ {
		line, rest, whole := bytes.Cut(text[length:], []byte("\n"))
		body, good := checked(line)
		if !whole || !good {
			if len(rest) > 0 || number == 1 {
				return head, 0, 0, fmt.Errorf("line %d is damaged: %w", number, syscall.EINVAL)
			}
			break // torn
		}
		if number == 1 {
			err = strict(body, &head)
			if err == nil && head.Version != journalVersion {
				err = fmt.Errorf("version %d is unknown", head.Version)
			}
		} else {
			var mark journalMark
			err = strict(body, &mark)
			if err == nil && mark.Done < done {
				err = fmt.Errorf("%d bytes are less than were done before", mark.Done)
			}
			done = mark.Done
		}
		if err != nil {
			return head, 0, 0, fmt.Errorf("line %d: %w: %w", number, err, syscall.EINVAL)
		}
		length += len(line) + 1
	}
	if length == 0 {
		return head, 0, 0, fmt.Errorf("it has no header: %w", syscall.EINVAL)
	}
	return head, done, length, nil
}

// checked is what a line says, without its checksum. It is not good when the checksum is another one.
func checked(line []byte) (body []byte, good bool) {
	sum, body, found := bytes.Cut(line, []byte(" "))
	if !found || len(sum) != 8 {
		return nil, false
	}
	want, err := strconv.ParseUint(string(sum), 16, 32)
	return body, err == nil && uint32(want) == crc32.Checksum(body, castagnoli())
}

// strict decodes an object that has no other fields than those of v.
func strict(body []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(body))
	d.DisallowUnknownFields()
	return d.Decode(v)
}

// append writes a line, durably.
func (j *Journal) append(v any) error {
	body, err := json.Marshal(v)
	if err != nil {
		return err
	}
	line := fmt.Appendf(nil, "%08x %s\n", crc32.Checksum(body, castagnoli()), body)
	if _, err := j.file.Write(line); err != nil {
		return err
	}
	return unix.Fdatasync(int(j.file.Fd()))
}

// Done is how many bytes from the start were durable when the journal was written last.
func (j *Journal) Done() int64 { return j.done }

// Path is where the journal is.
func (j *Journal) Path() string { return j.path }

// Record notes that all before done is durable in the destination. It is so itself when Record returns. Not safe for
// concurrent use.
func (j *Journal) Record(done int64) error {
	if done <= j.done {
		return nil
	}
	if err := j.append(journalMark{done}); err != nil {
		return fmt.Errorf("journal %s: %w", j.path, err)
	}
	j.done = done
	return nil
}

// Close leaves the journal for later.
func (j *Journal) Close() error { return j.file.Close() }

// Remove ends the journal: the copy is complete.
func (j *Journal) Remove() error {
	if err := errors.Join(os.Remove(j.path), j.file.Close()); err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	return syncDirectory(filepath.Dir(j.path))
}

// syncDirectory makes the names in a directory durable.
func syncDirectory(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
