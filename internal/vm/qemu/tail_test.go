package qemu

import (
	"bytes"
	"strings"
	"testing"
)

func TestTail(t *testing.T) {
	text := strings.Repeat("0123456789abcdef", 100)
	for _, chunk := range []int{1, 3, 16, 63, 64, 65, 1000} {
		g := NewTail(64)
		for i := 0; i < len(text); i += chunk {
			end := min(i+chunk, len(text))
			g.Add([]byte(text[i:end]))
			want := text[max(0, end-64):end]
			if got := string(g.Bytes()); got != want {
				t.Fatalf("after %d bytes in chunks of %d: %q, want %q", end, chunk, got, want)
			}
		}
	}
	g := NewTail(64)
	g.Drain(bytes.NewReader([]byte(text)))
	if got := string(g.Bytes()); got != text[len(text)-64:] {
		t.Errorf("drained %q", got)
	}
}

func TestLastLines(t *testing.T) {
	for in, want := range map[string]string{
		"":                           "",
		"\n\n":                       "",
		"a\r\n\nb\nc":                "b | c",
		"\x1b[31mred\x07\u009b\nx\n": "[31mred | x",
	} {
		if got := LastLines(in, 2); got != want {
			t.Errorf("%q becomes %q, want %q", in, got, want)
		}
	}
}
