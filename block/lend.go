package block

// A Lender is a device whose bytes lie in memory, and that can show them where they are: what is read from it only to be
// written elsewhere need not be copied twice. It is an optional power of a Device, and of a leaf alone.
type Lender interface {
	// Lend returns the bytes from offset on as far as they lie side by side, 1 to length of them; nil when the range is not
	// within the device. It neither blocks nor fails otherwise. The bytes are a read that has not ended: nobody may write
	// to that range of the device until the borrower is done with them, and the borrower must not write to them at all. A
	// Request may carry them as Data, but for OpRead. They stay valid for as long as they are referred to.
	Lend(offset, length int64) []byte
}
