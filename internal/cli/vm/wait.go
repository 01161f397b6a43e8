package vm

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"
	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/wait"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"atoll.dev/atoll/internal/cli/cluster"
	"atoll.dev/atoll/internal/cli/text"
)

// lookEvery is how often a command that waits looks.
const lookEvery = 500 * time.Millisecond

// waiting are the flags of commands that wait.
type waiting struct {
	no      bool
	timeout time.Duration
}

func (w *waiting) add(cmd *cobra.Command, what string) {
	cmd.Flags().BoolVar(&w.no, "no-wait", false, "do not wait until "+what)
	cmd.Flags().DurationVar(&w.timeout, "timeout", 10*time.Minute, "how long to wait; what was begun goes on after it")
}

// progress tells a person how something that takes long is: on a terminal in one line that changes, elsewhere in a line
// for each change.
type progress struct {
	c      *commands
	name   string
	start  time.Time
	said   string
	open   bool // a line is on the terminal
	silent bool
}

func (c *commands) progress(name string) *progress {
	return &progress{c: c, name: name, start: c.now()}
}

// say tells how it is now.
func (p *progress) say(what string) {
	if p.silent {
		return
	}
	if text.IsTerminal(p.c.ErrOut) {
		p.c.Tell("\r\033[K%s: %s (%ds)", p.name, what, int(p.c.now().Sub(p.start).Seconds()))
		p.open, p.said = true, what
		return
	}
	if what != p.said {
		p.c.Tell("%s: %s\n", p.name, what)
	}
	p.said = what
}

// end clears the terminal's line.
func (p *progress) end() {
	if p.open {
		p.c.Tell("\r\033[K")
	}
	p.open = false
}

// look is one look at what is waited for: whether it is done, and how it is in words.
type look func(ctx context.Context) (done bool, how string, err error)

// await looks until it is done.
func (c *commands) await(ctx context.Context, name string, w waiting, once look) error {
	ctx, cancel := context.WithTimeout(ctx, w.timeout)
	defer cancel()
	p := c.progress(name)
	defer p.end()
	var failed error
	err := wait.PollUntilContextCancel(ctx, lookEvery, true, func(ctx context.Context) (bool, error) {
		done, how, err := once(ctx)
		if err != nil && cluster.Temporary(err) {
			how, err = err.Error(), nil
		}
		if err != nil || done {
			return done, err
		}
		p.say(how)
		return false, nil
	})
	switch {
	case err == nil:
		return nil
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		failed = fmt.Errorf("%s is not done after %s: %s; it goes on, see `atoll vm events %s`", name, w.timeout, cmp.Or(p.said, "nothing is known"), name)
	case ctx.Err() != nil:
		failed = fmt.Errorf("interrupted while %s was: %s; it goes on", name, cmp.Or(p.said, "beginning"))
	default:
		failed = err
	}
	return failed
}

// awaitMachine looks at a virtual machine until it is as done says.
func (c *commands) awaitMachine(ctx context.Context, s *session, name string, w waiting, done func(*vmopv1.VirtualMachine) (bool, string, error)) error {
	return c.await(ctx, name, w, func(ctx context.Context) (bool, string, error) {
		vm, err := s.machine(ctx, name)
		if err != nil {
			return false, "", err
		}
		ok, how, err := done(vm)
		if how == "" {
			how = state(vm)
			if why := problem(vm); why != "" {
				how += ": " + why
			}
		}
		return ok, how, err
	})
}

// machine reads a virtual machine. An error says which there are.
func (s *session) machine(ctx context.Context, name string) (*vmopv1.VirtualMachine, error) {
	vm := &vmopv1.VirtualMachine{}
	err := s.Get(ctx, client.ObjectKey{Namespace: s.namespace, Name: name}, vm)
	if apierrors.IsNotFound(err) {
		return nil, fmt.Errorf("no virtual machine %q in namespace %q; `atoll vm ls -A` lists them: %w", name, s.namespace, err)
	}
	if err != nil {
		return nil, fmt.Errorf("reading virtual machine %s: %w", name, err)
	}
	return vm, nil
}

// is tells whether a condition has a status.
func is(c *metav1.Condition, status metav1.ConditionStatus) bool {
	return c != nil && c.Status == status
}
