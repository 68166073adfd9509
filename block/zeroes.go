package block

// zeroes is what zeroes are written from where a device cannot make them itself. It is never written to.
var zeroes [64 << 10]byte

// SubmitZeroes submits r, an OpWriteZeroes of any length, to d: in pieces that the device takes, and as plain writes if
// it has no other way. Like d.Submit it takes r.
func SubmitZeroes(d Device, r *Request) {
	limits := d.Limits()
	most := limits.WriteZeroesMax / int64(limits.LogicalBlock) * int64(limits.LogicalBlock)
	if r.Length <= most {
		d.Submit(r)
		return
	}
	plain := most == 0
	if plain {
		most = int64(len(zeroes))
	}
	f := NewFan(r)
	for offset, end := r.Offset, r.End(); offset < end; {
		n := min(most, end-offset)
		p := f.Part(offset, n)
		if plain {
			p.Op, p.Data = OpWrite, zeroes[:n]
			p.Flags &^= NoUnmap | Fast
		}
		d.Submit(p)
		offset += n
	}
	f.Done(nil)
}
