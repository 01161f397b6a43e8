package daemon

import (
	"errors"
	"testing"

	"atoll.dev/atoll/internal/pool/wire"
)

// TestYield: a micro-VM that a pod waits for does not keep the lowest priority, even where it was lowered in part.
func TestYield(t *testing.T) {
	fails := errors.New("autogroup")
	for name, c := range map[string]struct {
		lowering error
		raising  []error // of each attempt
		then     func(*clone)
	}{
		"hurry":           {nil, []error{nil}, (*clone).hurry},
		"rest":            {nil, []error{nil}, (*clone).rest},
		"lowered in part": {fails, []error{nil}, (*clone).hurry},
		"raised in part":  {nil, []error{fails, nil}, func(c *clone) { c.rest(); c.hurry() }},
	} {
		t.Run(name, func(t *testing.T) {
			nice := 0
			m := newClone(wire.Init{}, files{})
			m.setNice = func(n int) error {
				if n > 0 {
					nice = n
					return c.lowering
				}
				if len(c.raising) == 0 {
					t.Fatal("raised again")
				}
				err := c.raising[0]
				c.raising = c.raising[1:]
				if err == nil {
					nice = 0
				}
				return err
			}
			m.aside(true)
			if nice != lastNice {
				t.Errorf("stands aside with nice %d", nice)
			}
			c.then(m)
			if nice != 0 {
				t.Errorf("a pod has a micro-VM with nice %d", nice)
			}
			m.aside(false)
		})
	}
}
