package cgroup

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/datadir/atomicfile"
)

const (
	available = "cgroup.controllers"
	enabled   = "cgroup.subtree_control"
)

// IsUnified tells whether a group is of version 2.
func IsUnified(group string) bool {
	_, err := os.Stat(filepath.Join(group, available))
	return err == nil
}

// Delegate lets the children of a version 2 group use all its controllers. Those that they could not use before are
// noted in the file record first, if it has a name, for Withdraw.
func Delegate(group, record string) error {
	missing, err := words(filepath.Join(group, available))
	if err != nil {
		return fmt.Errorf("delegating controllers of %s: %w", group, err)
	}
	has, err := words(filepath.Join(group, enabled))
	if err != nil {
		return fmt.Errorf("delegating controllers of %s: %w", group, err)
	}
	missing = slices.DeleteFunc(missing, func(name string) bool { return slices.Contains(has, name) })
	if len(missing) == 0 {
		return nil
	}
	if record != "" {
		if err := note(record, group, missing); err != nil {
			return err
		}
	}
	for _, name := range missing {
		if err := os.WriteFile(filepath.Join(group, enabled), []byte("+"+name), 0o644); err != nil {
			return fmt.Errorf("delegating controllers of %s: %w", group, err)
		}
	}
	return nil
}

// Withdraw undoes what Delegate has noted in record, and removes that. A controller that children of the group still use
// stays, as does a group that is gone.
func Withdraw(record string) error {
	all, err := notes(record)
	if err != nil {
		return err
	}
	var errs []error
	for group, names := range all {
		for _, name := range names {
			err := os.WriteFile(filepath.Join(group, enabled), []byte("-"+name), 0o644)
			if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.EBUSY) {
				errs = append(errs, fmt.Errorf("withdrawing controller %s of %s: %w", name, group, err))
			}
		}
	}
	if err := os.Remove(record); err != nil && !errors.Is(err, fs.ErrNotExist) {
		errs = append(errs, fmt.Errorf("forgetting controllers: %w", err))
	}
	return errors.Join(errs...)
}

// note adds to the record.
func note(record, group string, names []string) error {
	all, err := notes(record)
	if err != nil {
		return err
	}
	if all == nil {
		all = map[string][]string{}
	}
	for _, name := range names {
		if !slices.Contains(all[group], name) {
			all[group] = append(all[group], name)
		}
	}
	text, err := json.Marshal(all)
	if err != nil {
		return fmt.Errorf("noting controllers: %w", err)
	}
	if _, err := atomicfile.WriteIfChanged(record, text, 0o600); err != nil {
		return fmt.Errorf("noting controllers: %w", err)
	}
	return nil
}

// notes are the controllers in the record, by group.
func notes(record string) (map[string][]string, error) {
	text, err := os.ReadFile(record)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading the record of controllers: %w", err)
	}
	var all map[string][]string
	if err := json.Unmarshal(text, &all); err != nil {
		return nil, fmt.Errorf("reading the record of controllers %s: %w", record, err)
	}
	return all, nil
}

func words(path string) ([]string, error) {
	text, err := os.ReadFile(path)
	return strings.Fields(string(text)), err
}
