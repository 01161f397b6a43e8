package qemuimg

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"atoll.dev/atoll/internal/datadir/handover"
)

// TestNode: every layer is spelled out, and what is below the first one is null.
func TestNode(t *testing.T) {
	name, err := Name(Node([]handover.Layer{
		{File: "/a", Format: handover.FormatRaw},
		{RBD: &handover.RBD{Pool: "p", Image: "b", User: "u"}, Format: handover.FormatQCOW2, Key: "v/k1"},
	}))
	want := `json:{"backing":{"driver":"raw","file":{"driver":"file","filename":"/a"}},"driver":"qcow2",` +
		`"encrypt":{"format":"luks","key-secret":"kv_k1"},"file":{"driver":"rbd","image":"b","pool":"p","user":"u"}}`
	if err != nil || name != want {
		t.Errorf("%s, %v", name, err)
	}
	name, err = Name(Node([]handover.Layer{{File: "/a", Format: handover.FormatQCOW2}}))
	if err != nil || !strings.Contains(name, `"backing":null`) {
		t.Errorf("%s, %v", name, err)
	}
}

// tool is a qemu-img that is a shell script.
func tool(t *testing.T, script string) *Tool {
	t.Helper()
	path := filepath.Join(t.TempDir(), "qemu-img")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+script+"\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	return &Tool{Path: path}
}

func TestErrors(t *testing.T) {
	top := handover.Layer{File: "/a", Format: handover.FormatQCOW2, Size: 1 << 20}
	for script, want := range map[string]error{
		`echo 'qemu-img: Failed to get "write" lock' >&2; exit 1`:         ErrLocked,
		`echo 'qemu-img: error: No space left on device' >&2; exit 1`:     ErrSpace,
		`echo 'qemu-img: Invalid password, cannot unlock' >&2; exit 1`:    ErrSecret,
		`for i in $(seq 100000); do echo long >&2; done; exec sleep 1000`: context.DeadlineExceeded,
	} {
		patience := time.Minute
		if errors.Is(want, context.DeadlineExceeded) {
			patience = 2 * time.Second
		}
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		if err := tool(t, script).Resize(ctx, top, nil, 1<<20); !errors.Is(err, want) {
			t.Errorf("%s: %v", script, err)
		}
		cancel()
	}
	if err := (&Tool{Path: ""}).Resize(t.Context(), top, nil, 1); err == nil {
		t.Error("resized what is not there")
	}
}

func TestCheckAndProgress(t *testing.T) {
	top := handover.Layer{File: "/a", Format: handover.FormatQCOW2, Size: 1 << 20}
	found, err := tool(t, `echo '{"corruptions":2,"leaks":3,"check-errors":1}'; exit 2`).Check(t.Context(), top, nil)
	if err != nil || found != (Check{Corruptions: 2, Leaks: 3, Errors: 1}) {
		t.Errorf("%+v, %v", found, err)
	}
	if _, err := tool(t, `exit 1`).Check(t.Context(), top, nil); err == nil {
		t.Error("a check that failed was taken for one that found nothing")
	}
	var told []int64
	err = tool(t, `printf '    (0.00/100%%)\r'; sleep 0.1; printf '    (42.50/100%%)\r'; sleep 0.1; printf '(100.00/100%%)\r'`).
		Commit(t.Context(), []handover.Layer{top}, nil, func(done, total int64) { told = append(told, done*100/total) })
	if err != nil || len(told) == 0 || told[len(told)-1] != 100 {
		t.Errorf("%v, %v", told, err)
	}
}

// TestSecrets: a passphrase comes through a pipe and is in no argument.
func TestSecrets(t *testing.T) {
	dir := t.TempDir()
	script := `echo "$@" >` + dir + `/args; env >>` + dir + `/args
while [ $# -gt 0 ]; do case $1 in secret,*) cat "${1##*file=}" >` + dir + `/key;; esac; shift; done`
	top := handover.Layer{File: "/a", Format: handover.FormatQCOW2, Size: 1 << 20, Key: "v/k1"}
	if err := tool(t, script).Resize(t.Context(), top, Secrets{"v/k1": []byte("open sesame")}, 1<<20); err != nil {
		t.Fatal(err)
	}
	key, err := os.ReadFile(filepath.Join(dir, "key"))
	if err != nil || string(key) != "open sesame" {
		t.Errorf("%q, %v", key, err)
	}
	args, err := os.ReadFile(filepath.Join(dir, "args"))
	if err != nil || strings.Contains(string(args), "sesame") || !strings.Contains(string(args), "id=kv_k1") {
		t.Errorf("%s, %v", args, err)
	}
}
