package hardware

import (
	"context"
	"fmt"
	"regexp"
	"strconv"
	"time"

	"atoll.dev/atoll/internal/vm"
	"atoll.dev/atoll/internal/vm/qmp"
)

// An emulating QEMU has a buffer for the code that it has translated, in regions. Each vCPU has a region for itself
// and takes another when that is full; when there is none left, all of it is thrown away and translated again. A vCPU
// that is added at a moment when no region is left makes QEMU abort (assertion in tcg/region.c, seen with 7.2). So the
// machine stands still while vCPUs are added, and before that QEMU is made to throw its translations away if there are
// too many.

// flushTimeout is how long that may take: as long as a guest needs to run through enough code.
const flushTimeout = 20 * time.Second

// regionBytes is the least that QEMU makes a region of, if there are enough.
const regionBytes = 2 << 20

// plugCPUs adds vCPUs until there are n.
func (m *Machine) plugCPUs(ctx context.Context, n int) (int, error) {
	if m.accel != vm.TCG {
		return m.qmp.PlugCPUs(ctx, n)
	}
	present := m.shape.CPUs
	fits := func() (bool, error) {
		t, err := m.translations(ctx)
		return t.fits(sockets(m.machine.CPU)*m.machine.CPU.CoresPerSocket, present, n), err
	}
	if err := m.Pause(ctx); err != nil {
		return present, err
	}
	ok, err := fits()
	if err == nil && !ok {
		if err = m.flush(ctx); err == nil {
			ok, err = fits()
		}
	}
	switch {
	case err != nil:
	case !ok:
		err = fmt.Errorf("%w: qemu's buffer of translated code is full, and stays so since the guest does too little; try again", ErrHotPlug)
	default:
		present, err = m.qmp.PlugCPUs(ctx, n)
	}
	if resumeErr := m.Resume(context.WithoutCancel(ctx)); err == nil {
		err = resumeErr
	}
	return present, err
}

// flush lets a machine that is paused run until QEMU has thrown its translations away. Translating each instruction by
// itself, and so all of the code again, makes that soon.
func (m *Machine) flush(ctx context.Context) error {
	before, err := m.translations(ctx)
	if err != nil {
		return err
	}
	if err := m.Resume(ctx); err != nil {
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
	if pauseErr := m.Pause(ctx); err == nil {
		err = pauseErr
	}
	return err
}

func (m *Machine) singleStep(ctx context.Context, how string) error {
	return m.do(ctx, "making qemu translate again", qmp.Command{
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

func (m *Machine) translations(ctx context.Context) (translations, error) {
	const doing = "looking at translated code"
	var answer struct {
		Text string `json:"human-readable-text"`
	}
	if err := m.do(ctx, doing, qmp.Command{Name: "x-query-jit", Result: &answer}); err != nil {
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

// fits tells whether there are regions for vCPUs up to number n, of at most limit, now that there are present.
func (t translations) fits(limit, present, n int) bool {
	regions := int64(min(translated<<20/regionBytes, limit*8))
	regions = max(regions, int64(limit))
	if t.size < regions {
		return false
	}
	taken := t.used/(t.size/regions) + int64(present)
	return taken+int64(n-present) <= regions
}
