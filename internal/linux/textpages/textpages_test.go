package textpages

import (
	"context"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
)

const maps = `00400000-01a00000 r-xp 00000000 fe:00 123    /opt/atoll
01a00000-02000000 r--p 01600000 fe:00 123    /opt/atoll
02000000-02100000 rw-p 01c00000 fe:00 123    /opt/atoll
02100000-02200000 rw-p 00000000 00:00 0
7f00-7e00 r-xp 00000000 fe:00 123    /opt/atoll
7f0000000000-7f0000001000 r-xp 00000000 fe:00 9 /opt/atoll.so
7fff0000-7fff1000 r-xp 00000000 00:00 0      [vdso]
`

func TestReadOnly(t *testing.T) {
	want := []span{{0x400000, 0x1a00000}, {0x1a00000, 0x2000000}}
	if got := readOnly([]byte(maps), "/opt/atoll"); !slices.Equal(got, want) {
		t.Fatalf("got %x", got)
	}
}

func TestReleaseShrinksAndTheProgramGoesOn(t *testing.T) {
	before := fileResident(t)
	if err := Release(); err != nil {
		t.Fatal(err)
	}
	after := fileResident(t)
	if after >= before {
		t.Errorf("resident program pages: %d kB before, %d kB after", before, after)
	}
}

func TestRunEndsWithItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			if err := Run(ctx); err != nil {
				t.Error(err)
			}
			close(done)
		}()
		cancel()
		<-done
	})
}

func fileResident(t *testing.T) int {
	t.Helper()
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		if rest, ok := strings.CutPrefix(line, "RssFile:"); ok {
			kb, err := strconv.Atoi(strings.Fields(rest)[0])
			if err != nil {
				t.Fatal(err)
			}
			return kb
		}
	}
	t.Fatal("no RssFile")
	return 0
}

func FuzzReadOnly(f *testing.F) {
	f.Add([]byte(maps))
	f.Fuzz(func(t *testing.T, text []byte) {
		for _, s := range readOnly(text, "/opt/atoll") {
			if s.start >= s.end {
				t.Fatalf("bad span %x", s)
			}
		}
	})
}
