package down

import (
	"slices"
	"testing"
)

func TestParseMountPoints(t *testing.T) {
	text := `22 1 0:20 / /proc rw,nosuid - proc proc rw
23 1 8:1 /x /mnt/with\040space\011tab rw - ext4 /dev/sda rw
24 1 8:1 / /back\134slash rw - ext4 /dev/sda rw
25 1 8:1 / /odd\9 rw - ext4 /dev/sda rw

short line
`
	want := []string{"/proc", "/mnt/with space\ttab", `/back\slash`, `/odd\9`}
	if got := parseMountPoints(text); !slices.Equal(got, want) {
		t.Errorf("parseMountPoints = %q, want %q", got, want)
	}
}

func FuzzParseMountPoints(f *testing.F) {
	f.Add(`23 1 8:1 /x /mnt/with\040space rw - ext4 /dev/sda rw`)
	f.Fuzz(func(_ *testing.T, s string) { parseMountPoints(s) })
}
