package cgroup

import (
	"os"
	"path/filepath"
	"testing"
)

// TestDelegate uses a directory in place of a group, in which the last write is what is left.
func TestDelegate(t *testing.T) {
	group := t.TempDir()
	record := filepath.Join(t.TempDir(), "record")
	write := func(file, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(group, file), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	holds := func(want string) {
		t.Helper()
		if got, err := os.ReadFile(filepath.Join(group, enabled)); err != nil || string(got) != want {
			t.Errorf("%q, %v, want %q", got, err, want)
		}
	}
	if IsUnified(group) {
		t.Error("a group without controllers is of version 2")
	}
	write(available, "cpu memory hugetlb\n")
	write(enabled, "cpu memory\n")
	if !IsUnified(group) {
		t.Error("a group with controllers is not of version 2")
	}
	if err := Delegate(group, record); err != nil {
		t.Fatal(err)
	}
	holds("+hugetlb")
	write(enabled, "cpu memory hugetlb\n")
	if err := Delegate(group, record); err != nil { // nothing is missing, and nothing is forgotten
		t.Fatal(err)
	}
	if err := Withdraw(record); err != nil {
		t.Fatal(err)
	}
	holds("-hugetlb")
	write(enabled, "cpu memory\n")
	if err := Withdraw(record); err != nil {
		t.Fatal(err)
	}
	holds("cpu memory\n")
	if err := os.WriteFile(record, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Withdraw(record); err == nil {
		t.Error("half a record was taken")
	}
}
