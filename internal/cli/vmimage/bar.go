package vmimage

import (
	"fmt"
	"io"
	"strings"
	"time"

	"atoll.dev/atoll/internal/cli/text"
)

// bar shows how far something is, on a terminal; elsewhere it says so now and then.
type bar struct {
	out      io.Writer
	title    string
	terminal bool
	last     time.Time
	begun    time.Time
	first    int64
	drawn    bool
	said     string
}

// drawEvery and sayEvery are how often.
const (
	drawEvery = 200 * time.Millisecond
	sayEvery  = 10 * time.Second
	width     = 30
)

func (c Config) bar(title string) *bar {
	return &bar{out: c.ErrOut, title: title, terminal: text.IsTerminal(c.ErrOut)}
}

// show draws how much is done.
func (b *bar) show(done, total int64) {
	every := sayEvery
	if b.terminal {
		every = drawEvery
	}
	if b.begun.IsZero() {
		b.begun, b.first = time.Now(), done
		if !b.terminal {
			b.last = b.begun
		}
	}
	if time.Since(b.last) < every {
		return
	}
	b.last = time.Now()
	line := b.title + " " + text.Size(done)
	if total > 0 {
		part := int(min(done*width/max(total, 1), width))
		line = fmt.Sprintf("%-12s [%s%s] %3d%%  %s of %s", b.title, strings.Repeat("=", part), strings.Repeat(" ", width-part), done*100/total, text.Size(done), text.Size(total))
	}
	if took := time.Since(b.begun).Seconds(); took > 1 && done > b.first && total > 100*100 {
		line += fmt.Sprintf("  %s/s", text.Size(int64(float64(done-b.first)/took)))
	}
	b.print(line)
}

// say shows a text, once.
func (b *bar) say(text string) {
	if text = b.title + ": " + text; text != b.said {
		b.said = text
		b.print(text)
	}
}

func (b *bar) print(text string) {
	if b.terminal {
		text = text[:min(len(text), 110)]
		_, _ = fmt.Fprintf(b.out, "\r\033[K%s", strings.ReplaceAll(text, "\n", " "))
		b.drawn = true
		return
	}
	_, _ = fmt.Fprintln(b.out, text)
}

// end removes what was drawn.
func (b *bar) end() {
	if b.drawn {
		_, _ = fmt.Fprint(b.out, "\r\033[K")
		b.drawn = false
	}
}
