package rbd

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"atoll.dev/atoll/internal/storage/datastore"
)

const hostConf = `# of the host
[global]
	mon host = 192.0.2.1
	keyring = /etc/ceph/$cluster.$name.keyring
[client]
	log file = /var/log/ceph/client.log ; a comment
	rbd-cache = false
	Admin_Socket = /run/ceph/x.asok
	key = AQDnever==
`

func TestPortable(t *testing.T) {
	got := string(portable([]byte(hostConf)))
	for _, want := range []string{"mon host = 192.0.2.1", "rbd-cache = false", "[client]", "client_mount_timeout = 15", "# of the host"} {
		if !strings.Contains(got, want) {
			t.Errorf("%q is missing in:\n%s", want, got)
		}
	}
	for _, bad := range []string{"/etc/ceph", "/var/log", "asok", "AQD"} {
		if strings.Contains(got, bad) {
			t.Errorf("%q is in:\n%s", bad, got)
		}
	}
}

func TestOwnersIn(t *testing.T) {
	for text, want := range map[string][]peer{
		"": nil, "[]\n": nil,
		`[{"id":"auto 1","locker":"client.4123","address":"192.0.2.1:0/77"}]`: {{Address: "192.0.2.1:0/77", ID: "auto 1", Locker: "client.4123"}},
	} {
		if got, err := ownersIn([]byte(text)); err != nil || !slices.Equal(got, want) {
			t.Errorf("%q: %q, %v", text, got, err)
		}
	}
	if _, err := ownersIn([]byte("{")); !errors.Is(err, datastore.ErrUnavailable) {
		t.Error(err)
	}
}

func TestKeyOf(t *testing.T) {
	keyring := []byte("[client.admin]\n\tkey = AQDadmin==\n\tcaps mon = \"allow *\"\n[client.atoll]\n\tkey = AQDatoll==\n[client.none]\n")
	for user, want := range map[string]string{"client.admin": "AQDadmin==", "client.atoll": "AQDatoll==", "client.none": "", "client": ""} {
		if got := keyOf(keyring, user); got != want {
			t.Errorf("%s: %q", user, got)
		}
	}
}

func TestReadSmall(t *testing.T) {
	file := filepath.Join(t.TempDir(), "conf")
	if _, err := readSmall(file); !os.IsNotExist(err) {
		t.Error(err)
	}
	if err := os.WriteFile(file, make([]byte, maxConf+1), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := readSmall(file); err == nil {
		t.Error("a large file was read")
	}
}
