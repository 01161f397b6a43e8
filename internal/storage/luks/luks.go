// Package luks writes and reads LUKS1 headers, as QEMU uses them inside qcow2 images.
//
// A header holds the master key of an image eight times at most, each encrypted with a passphrase (a key
// slot). The passphrases here are random keys of 256 bits, so that the slow hash against guessing does its
// least; that is why it is not left to qemu-img, which spends two seconds per image on tuning the hash.
// Data are never encrypted here, that is QEMU's.
//
// The format is the LUKS On-Disk Format Specification 1.2.3, with aes-xts-plain64, 64 bytes of key and
// sha256. Callers are the storage engines. What can go wrong: not such a header (ErrFormat), or no slot that
// the passphrase opens (ErrPassphrase).
package luks

import (
	"bytes"
	"crypto/aes"
	"crypto/hmac"
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/crypto/xts"
)

// Errors to tell apart.
var (
	// ErrFormat: not a LUKS header of the kind this package writes.
	ErrFormat = errors.New("not a known LUKS header")
	// ErrPassphrase: no key slot opens.
	ErrPassphrase = errors.New("passphrase opens no key slot")
	// ErrSlots: all key slots are taken.
	ErrSlots = errors.New("no free key slot")
)

// The layout, the same as QEMU's.
const (
	slots        = 8
	stripes      = 4000
	keyBytes     = 64
	sector       = 512
	firstSlot    = 4096
	materialSize = keyBytes * stripes
	slotSpacing  = (materialSize + 4095) &^ 4095
	// Size is the length of a header in bytes.
	Size = firstSlot + slots*slotSpacing

	// iterations is the least that the specification allows.
	iterations    = 1000
	maxIterations = 10_000_000
	slotActive    = 0x00ac71f3
	slotDisabled  = 0x0000dead
)

// phdr is the fixed part.
type phdr struct {
	Magic      [6]byte
	Version    uint16
	Cipher     [32]byte
	Mode       [32]byte
	Hash       [32]byte
	Payload    uint32 // sectors
	KeyBytes   uint32
	Digest     [20]byte
	Salt       [32]byte
	Iterations uint32
	UUID       [40]byte
	Slots      [slots]slot
}

// slot is one place for a passphrase.
type slot struct {
	Active     uint32
	Iterations uint32
	Salt       [32]byte
	Offset     uint32 // sectors
	Stripes    uint32
}

// luksMagic starts every header.
var luksMagic = [6]byte{'L', 'U', 'K', 'S', 0xba, 0xbe}

// New returns a header with a new random master key that passphrase opens.
func New(passphrase []byte) ([]byte, error) {
	master := make([]byte, keyBytes)
	h := phdr{Magic: luksMagic, Version: 1, Payload: Size / sector, KeyBytes: keyBytes, Iterations: iterations}
	var id [16]byte
	for _, b := range [][]byte{master, h.Salt[:], id[:]} {
		if _, err := rand.Read(b); err != nil {
			return nil, fmt.Errorf("making a LUKS key: %w", err)
		}
	}
	id[6], id[8] = id[6]&0x0f|0x40, id[8]&0x3f|0x80
	copy(h.Cipher[:], "aes")
	copy(h.Mode[:], "xts-plain64")
	copy(h.Hash[:], "sha256")
	copy(h.UUID[:], fmt.Sprintf("%x-%x-%x-%x-%x", id[:4], id[4:6], id[6:8], id[8:10], id[10:]))
	digest, err := pbkdf2.Key(sha256.New, string(master), h.Salt[:], iterations, len(h.Digest))
	if err != nil {
		return nil, fmt.Errorf("hashing a LUKS key: %w", err)
	}
	copy(h.Digest[:], digest)
	for i := range h.Slots {
		h.Slots[i] = slot{Active: slotDisabled, Offset: uint32((firstSlot + i*slotSpacing) / sector), Stripes: stripes}
	}
	out := make([]byte, Size)
	if err := h.fill(out, 0, master, passphrase); err != nil {
		return nil, err
	}
	return out, h.encode(out)
}

// Check tells whether passphrase opens the header.
func Check(header, passphrase []byte) error {
	h, err := decode(header)
	if err != nil {
		return err
	}
	_, _, err = h.unlock(header, passphrase)
	return err
}

// Add returns a copy of header that next opens as well. A header that it opens already is returned as it
// is. The change is to be written slot first, then the start of the header: see Parts.
func Add(header, passphrase, next []byte) ([]byte, error) {
	h, err := decode(header)
	if err != nil {
		return nil, err
	}
	if _, _, err := h.unlock(header, next); err == nil {
		return header, nil
	}
	master, _, err := h.unlock(header, passphrase)
	if err != nil {
		return nil, err
	}
	free := slices.IndexFunc(h.Slots[:], func(s slot) bool { return s.Active != slotActive })
	if free < 0 {
		return nil, ErrSlots
	}
	out := bytes.Clone(header)
	if err := h.fill(out, free, master, next); err != nil {
		return nil, err
	}
	return out, h.encode(out)
}

// Keep returns a copy of header that only passphrase opens; what the other slots held is overwritten.
func Keep(header, passphrase []byte) ([]byte, error) {
	h, err := decode(header)
	if err != nil {
		return nil, err
	}
	_, own, err := h.unlock(header, passphrase)
	if err != nil {
		return nil, err
	}
	out := bytes.Clone(header)
	for i := range h.Slots {
		if i == own {
			continue
		}
		h.Slots[i].Active, h.Slots[i].Iterations, h.Slots[i].Salt = slotDisabled, 0, [32]byte{}
		clear(out[int(h.Slots[i].Offset)*sector:][:materialSize])
	}
	return out, h.encode(out)
}

// Parts splits a header into the key material and the start that refers to it. Written in this order, with a
// sync between, a new slot is in place before it counts.
func Parts(header []byte) (start, material []byte) { return header[:firstSlot], header[firstSlot:] }

// StartSize is the length of the first of Parts.
const StartSize = firstSlot

// decode reads and checks the fixed part.
func decode(header []byte) (phdr, error) {
	var h phdr
	if len(header) < Size {
		return h, fmt.Errorf("%w: %d bytes", ErrFormat, len(header))
	}
	if _, err := binary.Decode(header, binary.BigEndian, &h); err != nil {
		return h, fmt.Errorf("%w: %w", ErrFormat, err)
	}
	switch {
	case h.Magic != luksMagic || h.Version != 1:
		return h, fmt.Errorf("%w: magic %x, version %d", ErrFormat, h.Magic, h.Version)
	case text(h.Cipher[:]) != "aes" || text(h.Mode[:]) != "xts-plain64" || text(h.Hash[:]) != "sha256" || h.KeyBytes != keyBytes:
		return h, fmt.Errorf("%w: %s-%s-%s with %d bytes of key", ErrFormat, text(h.Cipher[:]), text(h.Mode[:]), text(h.Hash[:]), h.KeyBytes)
	case h.Iterations == 0 || h.Iterations > maxIterations:
		return h, fmt.Errorf("%w: %d iterations", ErrFormat, h.Iterations)
	case h.Payload != Size/sector:
		return h, fmt.Errorf("%w: data at sector %d", ErrFormat, h.Payload)
	}
	for i, s := range h.Slots {
		if s.Active != slotActive && s.Active != slotDisabled || s.Iterations > maxIterations || s.Active == slotActive && s.Iterations == 0 ||
			s.Stripes != stripes || int(s.Offset) != (firstSlot+i*slotSpacing)/sector {
			return h, fmt.Errorf("%w: key slot %d", ErrFormat, i)
		}
	}
	return h, nil
}

// encode writes the fixed part over the start of out.
func (h *phdr) encode(out []byte) error {
	if _, err := binary.Encode(out, binary.BigEndian, h); err != nil {
		return fmt.Errorf("writing a LUKS header: %w", err)
	}
	return nil
}

// fill puts the master key into a slot.
func (h *phdr) fill(out []byte, n int, master, passphrase []byte) error {
	s := &h.Slots[n]
	s.Active, s.Iterations = slotActive, iterations
	if _, err := rand.Read(s.Salt[:]); err != nil {
		return fmt.Errorf("making a LUKS slot: %w", err)
	}
	cipher, err := s.cipher(passphrase)
	if err != nil {
		return err
	}
	material := out[int(s.Offset)*sector:][:materialSize]
	if err := split(material, master); err != nil {
		return err
	}
	for i := 0; i < materialSize; i += sector {
		cipher.Encrypt(material[i:i+sector], material[i:i+sector], uint64(i/sector))
	}
	return nil
}

// unlock returns the master key and the slot it was found in.
func (h *phdr) unlock(header, passphrase []byte) ([]byte, int, error) {
	for i := range h.Slots {
		s := &h.Slots[i]
		if s.Active != slotActive {
			continue
		}
		cipher, err := s.cipher(passphrase)
		if err != nil {
			return nil, 0, err
		}
		material := bytes.Clone(header[int(s.Offset)*sector:][:materialSize])
		for k := 0; k < materialSize; k += sector {
			cipher.Decrypt(material[k:k+sector], material[k:k+sector], uint64(k/sector))
		}
		master := merge(material)
		digest, err := pbkdf2.Key(sha256.New, string(master), h.Salt[:], int(h.Iterations), len(h.Digest))
		if err != nil {
			return nil, 0, fmt.Errorf("hashing a LUKS key: %w", err)
		}
		if hmac.Equal(digest, h.Digest[:]) {
			return master, i, nil
		}
	}
	return nil, 0, ErrPassphrase
}

// cipher is what encrypts the material of a slot.
func (s *slot) cipher(passphrase []byte) (*xts.Cipher, error) {
	key, err := pbkdf2.Key(sha256.New, string(passphrase), s.Salt[:], int(s.Iterations), keyBytes)
	if err != nil {
		return nil, fmt.Errorf("hashing a LUKS passphrase: %w", err)
	}
	c, err := xts.NewCipher(aes.NewCipher, key)
	if err != nil {
		return nil, fmt.Errorf("preparing a LUKS cipher: %w", err)
	}
	return c, nil
}

// split spreads a key over all of out such that losing any part of it loses the key.
func split(out, key []byte) error {
	if _, err := rand.Read(out[:len(out)-len(key)]); err != nil {
		return fmt.Errorf("making a LUKS slot: %w", err)
	}
	sum := make([]byte, len(key))
	for i := range stripes - 1 {
		mix(sum, out[i*len(key):][:len(key)])
	}
	for i, b := range key {
		out[(stripes-1)*len(key)+i] = b ^ sum[i]
	}
	return nil
}

// merge is the inverse of split.
func merge(material []byte) []byte {
	sum := make([]byte, keyBytes)
	for i := range stripes - 1 {
		mix(sum, material[i*keyBytes:][:keyBytes])
	}
	for i := range sum {
		sum[i] ^= material[(stripes-1)*keyBytes+i]
	}
	return sum
}

// mix adds a stripe to sum and spreads it.
func mix(sum, stripe []byte) {
	for i := range sum {
		sum[i] ^= stripe[i]
	}
	var in [4 + sha256.Size]byte
	for i := 0; i < len(sum); i += sha256.Size {
		binary.BigEndian.PutUint32(in[:], uint32(i/sha256.Size))
		copy(in[4:], sum[i:i+sha256.Size])
		digest := sha256.Sum256(in[:])
		copy(sum[i:], digest[:])
	}
}

// text is a string with zeros behind it.
func text(b []byte) string { return string(bytes.TrimRight(b, "\x00")) }
