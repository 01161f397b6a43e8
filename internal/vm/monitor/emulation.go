package monitor

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"time"

	"atoll.dev/atoll/internal/vm/qmp"
)

// An emulating QEMU has a buffer for the code that it has translated, in regions. Each vCPU has a region for itself
// and takes another when that is full; when there is none left, all of it is thrown away and translated again. A vCPU
// that is added at a moment when no region is left makes QEMU abort (assertion in tcg/region.c, seen with 7.2). So the
// machine stands still while vCPUs are added, and before that QEMU is made to throw its translations away if there are
// too many.

// ErrTranslations says that vCPUs cannot be added to an emulating QEMU now, since its translations leave no room.
var ErrTranslations = errors.New("qemu's buffer of translated code is full, and stays so since the guest does too little; try again")

// flushTimeout is how long that may take: as long as a guest needs to run through enough code.
const flushTimeout = time.Minute

// regionBytes is the least that QEMU makes a region of, if there are enough.
const regionBytes = 2 << 20

// Emulated is a machine under an emulating QEMU.
type Emulated struct {
	// BufferMiB is the size of the buffer, tb-size of QEMU; Limit is how many vCPUs there can be, its maxcpus.
	BufferMiB, Limit int
	// Pause and Resume have the machine stand still and go on.
	Pause, Resume func(context.Context) error
}

// PlugEmulatedCPUs is PlugCPUs for an emulating QEMU. It fails with ErrTranslations rather than risk the machine.
func (m *Monitor) PlugEmulatedCPUs(ctx context.Context, e Emulated, n int) (present int, err error) {
	if _, present, err = m.cpuSlots(ctx); err != nil || present >= n {
		return present, err
	}
	fits := func() (bool, error) {
		t, err := m.translations(ctx)
		return t.fits(e, present, n), err
	}
	if err := e.Pause(ctx); err != nil {
		return present, err
	}
	ok, err := fits()
	if err == nil && !ok {
		if err = m.flush(ctx, e); err == nil {
			ok, err = fits()
		}
	}
	switch {
	case err != nil:
	case !ok:
		err = ErrTranslations
	default:
		present, err = m.PlugCPUs(ctx, n)
	}
	if resumeErr := e.Resume(context.WithoutCancel(ctx)); err == nil {
		err = resumeErr
	}
	return present, err
}

// flush lets a machine that is paused run until QEMU has thrown its translations away. Translating each instruction by
// itself, and so all of the code again, makes that soon.
func (m *Monitor) flush(ctx context.Context, e Emulated) error {
	before, err := m.translations(ctx)
	if err != nil {
		return err
	}
	if err := e.Resume(ctx); err != nil {
		return err
	}
	if err := m.singleStep(ctx, "on"); err != nil {
		return err
	}
	wait, cancel := context.WithTimeout(ctx, flushTimeout)
	defer cancel()
	for now := before; err == nil && now.flushes == before.flushes; {
		select {
		case <-time.After(10 * time.Millisecond):
			now, err = m.translations(ctx)
		case <-wait.Done():
			now.flushes++ // as good as it gets
		}
	}
	ctx = context.WithoutCancel(ctx)
	if offErr := m.singleStep(ctx, "off"); err == nil {
		err = offErr
	}
	if pauseErr := e.Pause(ctx); err == nil {
		err = pauseErr
	}
	return err
}

func (m *Monitor) singleStep(ctx context.Context, how string) error {
	return m.Do(ctx, "making qemu translate again", qmp.Command{
		Name: "human-monitor-command", Args: map[string]any{"command-line": "singlestep " + how},
	})
}

// translations is how full the buffer is.
type translations struct {
	used, size int64 // bytes
	flushes    int64
}

var (
	codeSize   = regexp.MustCompile(`gen code size +(\d+)/(\d+)`)
	flushCount = regexp.MustCompile(`TB flush count +(\d+)`)
)

func (m *Monitor) translations(ctx context.Context) (translations, error) {
	const doing = "looking at translated code"
	var answer struct {
		Text string `json:"human-readable-text"`
	}
	if err := m.Do(ctx, doing, qmp.Command{Name: "x-query-jit", Result: &answer}); err != nil {
		return translations{}, err
	}
	size, flushes := codeSize.FindStringSubmatch(answer.Text), flushCount.FindStringSubmatch(answer.Text)
	if size == nil || flushes == nil {
		return translations{}, fmt.Errorf("%s: qemu says it in other words", doing)
	}
	var t translations
	for i, text := range []string{size[1], size[2], flushes[1]} {
		n, err := strconv.ParseInt(text, 10, 64)
		if err != nil {
			return translations{}, fmt.Errorf("%s: %w", doing, err)
		}
		*[]*int64{&t.used, &t.size, &t.flushes}[i] = n
	}
	return t, nil
}

// fits tells whether there are regions for vCPUs up to number n now that there are present.
func (t translations) fits(e Emulated, present, n int) bool {
	regions := int64(min(e.BufferMiB<<20/regionBytes, e.Limit*8))
	regions = max(regions, int64(e.Limit))
	if t.size < regions {
		return false
	}
	taken := t.used/(t.size/regions) + int64(present)
	return taken+int64(n-present) <= regions
}
