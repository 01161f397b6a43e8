package podkernel

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"strings"
)

const (
	maxImage  = 1 << 30
	maxConfig = 4 << 20
)

// image is what a kernel image says about itself.
type image struct {
	elf     bool
	release string
	config  []byte // .config, nil when it is not in there
}

// read reads a bzImage or an ELF kernel for x86-64.
func read(name string) (image, error) {
	st, err := os.Stat(name)
	if err != nil {
		return image{}, err
	}
	if !st.Mode().IsRegular() || st.Size() > maxImage {
		return image{}, errors.New("not a kernel image")
	}
	data, err := os.ReadFile(name)
	if err != nil {
		return image{}, err
	}
	switch {
	case len(data) > 20 && bytes.HasPrefix(data, []byte("\x7fELF\x02\x01")) && data[18] == 62 && data[19] == 0:
		return readELF(data)
	case len(data) > 0x210 && string(data[0x202:0x206]) == "HdrS":
		return readBzImage(data)
	}
	return image{}, errors.New("not a kernel image")
}

// readBzImage finds the release by the field kernel_version of the header. See
// Documentation/x86/boot.rst in the kernel source.
func readBzImage(data []byte) (image, error) {
	at := int(binary.LittleEndian.Uint16(data[0x20e:])) + 0x200
	if at == 0x200 || at >= len(data) {
		return image{}, errors.New("a kernel image that does not say its version")
	}
	return named(data[at:], image{})
}

// readELF finds the release in the kernel's banner, and the configuration between the marks of
// CONFIG_IKCONFIG.
func readELF(data []byte) (image, error) {
	_, banner, ok := bytes.Cut(data, []byte("Linux version "))
	if !ok {
		return image{}, errors.New("an ELF file, but not of a kernel")
	}
	i := image{elf: true}
	if _, packed, ok := bytes.Cut(data, []byte("IKCFG_ST")); ok {
		if z, err := gzip.NewReader(bytes.NewReader(packed)); err == nil {
			z.Multistream(false)
			if i.config, err = io.ReadAll(io.LimitReader(z, maxConfig)); err != nil {
				i.config = nil
			}
		}
	}
	return named(banner, i)
}

// named adds the release, the first word of text. It becomes part of file names.
func named(text []byte, i image) (image, error) {
	const longest = 64 // of uname -r
	word, _, ok := strings.Cut(string(text[:min(len(text), longest+1)]), " ")
	if !ok || word == "" || word[0] == '.' || strings.ContainsFunc(word, func(r rune) bool { return r <= ' ' || r > '~' || r == '/' }) {
		return image{}, errors.New("a kernel image whose version cannot be read")
	}
	i.release = word
	return i, nil
}
