package ovf

import (
	"bufio"
	"fmt"
	"io"
	"regexp"
	"strings"
)

// Manifest is the checksums of an archive's files: by name, the algorithm (SHA1, SHA256, SHA512) and the sum in
// lower-case hexadecimal.
type Manifest map[string]Sum

// Sum is one checksum.
type Sum struct{ Algorithm, Hex string }

// ReadManifest reads a .mf file.
func ReadManifest(r io.Reader) (Manifest, error) {
	line := regexp.MustCompile(`^(SHA1|SHA256|SHA512)\s*\(([^()/]{1,255})\)\s*=\s*([0-9a-fA-F]{40,128})$`)
	size := map[string]int{"SHA1": 40, "SHA256": 64, "SHA512": 128}
	out := Manifest{}
	scanner := bufio.NewScanner(io.LimitReader(r, 1<<20))
	for scanner.Scan() {
		text := strings.TrimSpace(scanner.Text())
		if text == "" {
			continue
		}
		m := line.FindStringSubmatch(text)
		if m == nil || len(m[3]) != size[m[1]] {
			return nil, fmt.Errorf("%w: the manifest has a line %.80q", ErrFormat, text)
		}
		out[m[2]] = Sum{Algorithm: m[1], Hex: strings.ToLower(m[3])}
	}
	if err := scanner.Err(); err != nil {
		return nil, fmt.Errorf("%w: the manifest: %w", ErrFormat, err)
	}
	return out, nil
}
