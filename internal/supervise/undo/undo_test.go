package undo

import (
	"errors"
	"slices"
	"strings"
	"testing"
)

func TestUnwind(t *testing.T) {
	var order []string
	cause, broken := errors.New("cause"), errors.New("broken")
	var s Stack
	s.Push("removing a", func() error { order = append(order, "a"); return nil })
	s.Push("removing b", func() error { order = append(order, "b"); return broken })
	s.Push("removing c", func() error { order = append(order, "c"); return nil })
	err := s.Unwind(cause)
	if !errors.Is(err, cause) || !errors.Is(err, broken) || !strings.Contains(err.Error(), "removing b") {
		t.Errorf("Unwind = %v, want cause and the failed action", err)
	}
	if want := []string{"c", "b", "a"}; !slices.Equal(order, want) {
		t.Errorf("order = %v, want %v", order, want)
	}
	if err := s.Unwind(nil); err != nil {
		t.Errorf("second Unwind = %v, want nil", err)
	}
}

func TestRelease(t *testing.T) {
	var s Stack
	s.Push("removing a", func() error { t.Error("ran a released action"); return nil })
	s.Release()
	if err := s.Unwind(nil); err != nil {
		t.Errorf("Unwind = %v, want nil", err)
	}
}
