package tail

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestPrint(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.log")
	var lines []string
	for range 5000 {
		lines = append(lines, strings.Repeat("a line that is long enough to need blocks ", 3))
	}
	lines = append(lines, "last but one", "last")
	for _, end := range []string{"\n", ""} {
		if err := os.WriteFile(path, []byte(strings.Join(lines, "\n")+end), 0o600); err != nil {
			t.Fatal(err)
		}
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range []int{0, 1, 2, 4000, 9999} {
			var out bytes.Buffer
			if err := Print(t.Context(), &out, f, n, false); err != nil {
				t.Fatal(err)
			}
			got := slices.Collect(strings.Lines(out.String()))
			if want := min(n, len(lines)); len(got) != want {
				t.Errorf("end %q, n %d: %d lines", end, n, len(got))
			}
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
