package disk

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"strings"
)

// Layout of the disk, in sectors.
const (
	sectorSize = 512
	coreSector = 2048
	espSector  = 4096
	align      = 2048
	tableSize  = 33 // sectors of a partition table: header and 128 entries
)

// guid is in the mixed byte order of GPT.
type guid [16]byte

// newGUID reads the usual form, which is constant here.
func newGUID(text string) guid {
	raw, err := hex.DecodeString(strings.ReplaceAll(text, "-", ""))
	if err != nil || len(raw) != 16 {
		return guid{}
	}
	var out guid
	copy(out[:], raw)
	for _, swap := range [][2]int{{0, 3}, {1, 2}, {4, 5}, {6, 7}} {
		out[swap[0]], out[swap[1]] = out[swap[1]], out[swap[0]]
	}
	return out
}

// partition is an entry of the table; sectors include the last one.
type partition struct {
	Kind, ID    guid
	First, Last uint64
	Attributes  uint64
	Name        [72]byte
}

// gptHeader is the header of UEFI 2.10, table 5.5.
type gptHeader struct {
	Signature   [8]byte
	Revision    uint32
	Size        uint32
	CRC         uint32
	_           uint32
	This, Other uint64
	First, Last uint64
	Disk        guid
	Entries     uint64
	Count, Each uint32
	EntriesCRC  uint32
}

// writeDisk puts the parts together in a sparse file.
func writeDisk(name string, boot, core []byte, esp *fat, dataFile string, dataSize int64) (err error) {
	espSectors := roundUp(uint64(esp.size())/sectorSize, align)
	dataFirst := espSector + espSectors
	dataSectors := uint64(dataSize) / sectorSize
	total := roundUp(dataFirst+dataSectors+tableSize, align)
	partitions := []partition{
		{Kind: newGUID("21686148-6449-6E6F-744E-656564454649"), ID: newGUID("6a746f6c-6c00-4000-8000-000000000001"), First: coreSector, Last: espSector - 1, Name: partitionName("bios")},
		{Kind: newGUID("C12A7328-F81F-11D2-BA4B-00A0C93EC93B"), ID: newGUID("6a746f6c-6c00-4000-8000-000000000002"), First: espSector, Last: dataFirst - 1, Name: partitionName("boot")},
		{Kind: newGUID("0FC63DAF-8483-4772-8E79-3D69D8477DE4"), ID: newGUID("6a746f6c-6c00-4000-8000-000000000003"), First: dataFirst, Last: dataFirst + dataSectors - 1, Name: partitionName("data")},
	}
	file, err := os.Create(name)
	if err != nil {
		return fmt.Errorf("creating disk: %w", err)
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	if err := file.Truncate(int64(total) * sectorSize); err != nil {
		return err
	}
	primary, backup, err := tables(partitions, total)
	if err != nil {
		return err
	}
	for _, part := range []struct {
		data   []byte
		sector uint64
	}{
		{masterBootRecord(boot, total), 0},
		{primary, 1},
		{core, coreSector},
		{backup, total - tableSize},
	} {
		if _, err := file.WriteAt(part.data, int64(part.sector)*sectorSize); err != nil {
			return err
		}
	}
	if err := esp.writeTo(io.NewOffsetWriter(file, espSector*sectorSize), espSector); err != nil {
		return err
	}
	data, err := os.Open(dataFile)
	if err != nil {
		return err
	}
	defer func() { _ = data.Close() }()
	return copySparse(io.NewOffsetWriter(file, int64(dataFirst)*sectorSize), data)
}

// copySparse copies what is not zero.
func copySparse(to io.WriterAt, from io.Reader) error {
	block, zero := make([]byte, 64<<10), make([]byte, 64<<10)
	for at := int64(0); ; {
		n, err := io.ReadFull(from, block)
		if n > 0 && !bytes.Equal(block[:n], zero[:n]) {
			if _, err := to.WriteAt(block[:n], at); err != nil {
				return err
			}
		}
		at += int64(n)
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func roundUp(n, to uint64) uint64 { return (n + to - 1) / to * to }

// masterBootRecord is GRUB's code with a table of one entry that covers the disk.
func masterBootRecord(boot []byte, total uint64) []byte {
	out := make([]byte, sectorSize)
	copy(out[:440], boot)
	entry := out[446:462]
	copy(entry, []byte{0x00, 0x00, 0x02, 0x00, 0xee, 0xff, 0xff, 0xff})
	binary.LittleEndian.PutUint32(entry[8:], 1)
	binary.LittleEndian.PutUint32(entry[12:], uint32(min(total-1, 0xffffffff)))
	out[510], out[511] = 0x55, 0xaa
	return out
}

// tables returns the partition table for the beginning of the disk, from sector
// 1 on, and that for its end.
func tables(partitions []partition, total uint64) (primary, backup []byte, err error) {
	var entries bytes.Buffer
	if err := binary.Write(&entries, binary.LittleEndian, partitions); err != nil {
		return nil, nil, err
	}
	entries.Write(make([]byte, 128*128-entries.Len()))
	header := func(this, other, at uint64) ([]byte, error) {
		h := gptHeader{
			Signature: [8]byte([]byte("EFI PART")), Revision: 0x10000, Size: 92,
			This: this, Other: other, First: tableSize + 1, Last: total - tableSize - 1,
			Disk: newGUID("6a746f6c-6c00-4000-8000-000000000000"), Entries: at, Count: 128, Each: 128,
			EntriesCRC: crc32.ChecksumIEEE(entries.Bytes()),
		}
		for range 2 {
			var out bytes.Buffer
			if err := binary.Write(&out, binary.LittleEndian, h); err != nil {
				return nil, err
			}
			if h.CRC != 0 {
				return append(out.Bytes(), make([]byte, sectorSize-out.Len())...), nil
			}
			h.CRC = crc32.ChecksumIEEE(out.Bytes())
		}
		return nil, errors.New("the checksum of a partition table is zero")
	}
	first, err := header(1, total-1, 2)
	if err != nil {
		return nil, nil, err
	}
	last, err := header(total-1, 1, total-tableSize)
	if err != nil {
		return nil, nil, err
	}
	return append(first, entries.Bytes()...), append(bytes.Clone(entries.Bytes()), last...), nil
}
