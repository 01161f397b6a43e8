package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestCutRequest(t *testing.T) {
	var got []string
	pending := []byte("garbage{\xff{\"execute\":\"guest-ping\"}\n{\"execute\":\"a\"}\n{\"exec")
	for {
		request, rest, ok := cutRequest(pending)
		pending = rest
		if !ok {
			break
		}
		got = append(got, string(request))
	}
	if want := []string{`{"execute":"guest-ping"}`, `{"execute":"a"}`}; !slices.Equal(got, want) || string(pending) != `{"exec` {
		t.Errorf("got %q, rest %q", got, pending)
	}
	// A request without an end of line is one when it is complete.
	request, rest, ok := cutRequest([]byte(`{"execute":"guest-ping"}`))
	if !ok || string(request) != `{"execute":"guest-ping"}` || len(rest) != 0 {
		t.Errorf("got %q, %q, %v", request, rest, ok)
	}
}

func TestAnswer(t *testing.T) {
	a := &agent{runs: map[int64]*run{}, files: map[int64]*os.File{}}
	for request, want := range map[string]string{
		`{"execute":"guest-ping"}`:                                         `{"return":{}}`,
		`{"execute":"guest-sync","arguments":{"id":42}}`:                   `{"return":42}`,
		`{"execute":"guest-sync-delimited","arguments":{"id":7},"id":"x"}`: "\xff" + `{"id":"x","return":7}`,
		`{"execute":"guest-nothing"}`:                                      `{"error":{"class":"CommandNotFound","desc":"The command guest-nothing has not been found"}}`,
		`{"execute":"guest-fsfreeze-status"}`:                              `{"return":"thawed"}`,
		`{"execute":"guest-exec-status","arguments":{"pid":1}}`:            `{"error":{"class":"GenericError","desc":"Invalid parameter 'pid': 1"}}`,
		`{"execute":"guest-shutdown","arguments":{"mode":"explode"}}`:      `{"error":{"class":"GenericError","desc":"mode is invalid (valid values are: halt|powerdown|reboot"}}`,
	} {
		if got := strings.TrimSuffix(string(a.answer([]byte(request))), "\n"); got != want {
			t.Errorf("%s: got %s, want %s", request, got, want)
		}
	}
	if got := string(a.answer([]byte("{"))); !strings.Contains(got, "Invalid JSON") {
		t.Errorf("broken JSON: got %s", got)
	}
}

func FuzzAnswer(f *testing.F) {
	f.Add([]byte(`{"execute":"guest-sync","arguments":{"id":42}}`))
	f.Add([]byte(`{"execute":"guest-file-read","arguments":{"handle":-1,"count":-1}}`))
	a := &agent{runs: map[int64]*run{}, files: map[int64]*os.File{}}
	f.Fuzz(func(_ *testing.T, data []byte) {
		request, _, ok := cutRequest(data)
		for _, dangerous := range []string{"exec", "shutdown", "suspend", "set", "freeze", "thaw", "trim", "file-open"} {
			if strings.Contains(string(request), dangerous) {
				return
			}
		}
		if ok {
			a.answer(request)
		}
	})
}

func TestUserData(t *testing.T) {
	config, err := parseUserData([]byte("#cloud-config\nhostname: a\nruncmd:\n- echo 1\n- [ls, -l]\nwrite_files:\n- path: /a\n  content: aGVsbG8=\n  encoding: b64\nusers: [default]\n"))
	if err != nil {
		t.Fatal(err)
	}
	if config.Hostname != "a" || len(config.RunCmd) != 2 || config.RunCmd[0][2] != "echo 1" || config.RunCmd[1][1] != "-l" {
		t.Errorf("got %+v", config)
	}
	file := config.WriteFiles[0]
	file.Path = filepath.Join(t.TempDir(), "deep", "file")
	file.Permissions = "0600"
	if err := file.write(); err != nil {
		t.Fatal(err)
	}
	if data, _ := os.ReadFile(file.Path); string(data) != "hello" {
		t.Errorf("wrote %q", data)
	}
	for data, says := range map[string]string{
		"hello":                             "neither #cloud-config",
		"#cloud-config\nruncmd: [{a: b}]\n": "a command is",
		"#cloud-config\n: :\n- x":           "user-data",
	} {
		if _, err := parseUserData([]byte(data)); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%q: got %v", data, err)
		}
	}
	meta := metaData{InstanceID: "i-1", Hostname: "box.example.org"}
	config, err = parseUserData(fillIn([]byte("## template: jinja\n#cloud-config\nfqdn: '{{ ds.meta_data.hostname }}'\nhostname: '{{ ds.meta_data.instance_id }}'\n"), meta))
	if err != nil || config.FQDN != "box.example.org" || config.Hostname != "i-1" {
		t.Errorf("with placeholders: %+v, %v", config, err)
	}
	if config, err := parseUserData(fillIn([]byte("#cloud-config\nhostname: '{{ ds.meta_data.instance_id }}'\n"), meta)); err != nil || config.Hostname != "{{ ds.meta_data.instance_id }}" {
		t.Errorf("without saying so: %+v, %v", config, err)
	}
	if config, err := parseUserData([]byte("#!/bin/sh\ntrue\n")); err != nil || len(config.RunCmd) != 1 {
		t.Errorf("script: got %+v, %v", config, err)
	}
	if _, err := decode([]byte("H4sIAAAAAAAA/8tIzcnJBwCGphA2BQAAAA=="), "b64"); err != nil {
		t.Error(err)
	}
}

func TestNetplan(t *testing.T) {
	for _, text := range []string{
		`{"version":2,"ethernets":{"eth0":{"match":{"macaddress":"02:00:00:00:00:01"},"set-name":"eth0","addresses":["10.1.2.3/32"],"dhcp4":false,"routes":[{"to":"default","via":"10.1.0.1","on-link":true}],"nameservers":{"addresses":["10.96.0.10"],"search":["svc"]}}}}`,
		"network:\n  version: 2\n  ethernets:\n    eth0:\n      match: {macaddress: '02:00:00:00:00:01'}\n      dhcp4: no\n      addresses: [10.1.2.3/32]\n      routes: [{to: default, via: 10.1.0.1, on-link: true}]\n      nameservers: {addresses: [10.96.0.10], search: [svc]}\n",
	} {
		plan, err := parseNetplan([]byte(text))
		if err != nil {
			t.Fatal(err)
		}
		eth := plan.Ethernets["eth0"]
		if eth.Addresses[0] != "10.1.2.3/32" || bool(eth.DHCP4) || !eth.Routes[0].OnLink || eth.Match.MAC == "" {
			t.Errorf("got %+v", eth)
		}
		if got := string(resolvConf(eth)); got != "nameserver 10.96.0.10\nsearch svc\noptions ndots:5\n" {
			t.Errorf("resolv.conf is %q", got)
		}
	}
	if _, err := parseNetplan([]byte("version: 1\nconfig: []\n")); err == nil {
		t.Error("version 1 was taken")
	}
}

func TestBlockLabel(t *testing.T) {
	write := func(fill func([]byte)) string {
		data := make([]byte, 64<<10)
		fill(data)
		name := filepath.Join(t.TempDir(), "disk")
		if err := os.WriteFile(name, data, 0o600); err != nil {
			t.Fatal(err)
		}
		return name
	}
	iso := write(func(b []byte) {
		copy(b[16*2048:], "\x01CD001")
		copy(b[16*2048+40:], "cidata                          ")
	})
	if got := blockLabel(iso, "iso9660"); got != "cidata" {
		t.Errorf("iso9660: got %q", got)
	}
	ext := write(func(b []byte) {
		copy(b[1024+0x38:], "\x53\xef")
		copy(b[1024+0x78:], "tinydata\x00junk")
	})
	if got := blockLabel(ext, "ext4"); got != "tinydata" {
		t.Errorf("ext4: got %q", got)
	}
	if got := blockLabel(iso, "vfat") + blockLabel(ext, "iso9660") + blockLabel("/nonexistent", "ext4"); got != "" {
		t.Errorf("others: got %q", got)
	}
}
