// Package undo is a stack of actions that take back the steps of a creation
// that failed half-way.
//
// It is used like this:
//
//	var stack undo.Stack
//	defer func() { err = stack.Unwind(err) }()
//	... make a thing ...
//	stack.Push("removing the thing", removeThing)
//	... all went well ...
//	stack.Release()
//
// It is not a transaction: an action that fails is reported and the rest still
// runs. Called by everything that makes several things of which none may be
// left behind alone.
package undo

import (
	"errors"
	"fmt"
	"slices"
)

// Stack holds the actions. The zero value is ready to use. It is not safe for
// concurrent use.
type Stack struct {
	actions []action
}

type action struct {
	doing string
	run   func() error
}

// Push adds an action. Doing is a gerund phrase that names it in errors.
func (s *Stack) Push(doing string, run func() error) {
	s.actions = append(s.actions, action{doing: doing, run: run})
}

// Release forgets all actions: what was made stays.
func (s *Stack) Release() { s.actions = nil }

// Unwind runs the actions, the last pushed first, and forgets them. It returns
// cause joined with the errors of the actions.
func (s *Stack) Unwind(cause error) error {
	errs := []error{cause}
	for _, a := range slices.Backward(s.actions) {
		if err := a.run(); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", a.doing, err))
		}
	}
	s.actions = nil
	return errors.Join(errs...)
}
