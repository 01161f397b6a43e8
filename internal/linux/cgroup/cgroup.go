// Package cgroup removes trees of control groups, in all hierarchies a host has
// mounted (version 1, version 2 or both), and enables controllers for groups of
// version 2 in a way that can be undone.
//
// It does not make groups or set limits. It is called by `atoll down`, and before
// the kubelet starts. What can
// go wrong: a process in the tree cannot be killed (in an uninterruptible
// sleep); the groups above it then stay and are named in the error.
package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Roots returns the mount points of all cgroup hierarchies.
func Roots() ([]string, error) {
	b, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return nil, fmt.Errorf("reading the mount table: %w", err)
	}
	var out []string
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) > 2 && (f[2] == "cgroup" || f[2] == "cgroup2") && !slices.Contains(out, f[1]) {
			out = append(out, f[1])
		}
	}
	return out, nil
}

// Find returns the groups called name directly below the root of each
// hierarchy.
func Find(name string) ([]string, error) {
	roots, err := Roots()
	if err != nil {
		return nil, err
	}
	var out []string
	for _, root := range roots {
		path := filepath.Join(root, name)
		if info, err := os.Stat(path); err == nil && info.IsDir() {
			out = append(out, path)
		}
	}
	return out, nil
}

// Remove kills the processes in a group and the groups below it and removes
// them all. A group that is not there is not an error.
func Remove(path string) error {
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		groups, err := tree(path)
		if err != nil || len(groups) == 0 {
			return err
		}
		var left error
		for _, group := range slices.Backward(groups) { // children first
			if err := kill(group); err != nil {
				return err
			}
			if err := unix.Rmdir(group); err != nil && !errors.Is(err, unix.ENOENT) {
				left = fmt.Errorf("removing cgroup %s: %w", group, err)
			}
		}
		if left == nil || time.Now().After(deadline) {
			return left
		}
	}
}

// tree lists a group and those below it, parents first.
func tree(path string) ([]string, error) {
	var out []string
	err := filepath.WalkDir(path, func(p string, d fs.DirEntry, err error) error {
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return nil
		case err != nil:
			return err
		case d.IsDir():
			out = append(out, p)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("listing cgroup %s: %w", path, err)
	}
	return out, nil
}

// kill sends SIGKILL to the processes of one group and thaws it, because a
// frozen process of version 1 does not die.
func kill(group string) error {
	b, err := os.ReadFile(filepath.Join(group, "cgroup.procs"))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EOPNOTSUPP) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("listing the processes of cgroup %s: %w", group, err)
	}
	for field := range strings.FieldsSeq(string(b)) {
		pid, err := strconv.Atoi(field)
		if err != nil || pid <= 1 || pid == os.Getpid() {
			continue
		}
		if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("killing process %d of cgroup %s: %w", pid, group, err)
		}
	}
	for file, thawed := range map[string]string{"freezer.state": "THAWED", "cgroup.freeze": "0"} {
		state := filepath.Join(group, file)
		if _, err := os.Stat(state); err != nil {
			continue
		}
		if err := os.WriteFile(state, []byte(thawed), 0); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("thawing cgroup %s: %w", group, err)
		}
	}
	return nil
}
