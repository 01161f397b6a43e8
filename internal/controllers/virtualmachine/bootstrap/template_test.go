package bootstrap

import (
	"strings"
	"testing"
	"time"

	machinev1 "atoll.dev/atoll/api/machine/v1"
)

func TestTemplateFunctions(t *testing.T) {
	in := input(t, "")
	in.VM.Spec.Network = nil
	r, err := in.newRenderer()
	if err != nil {
		t.Fatal(err)
	}
	for template, want := range map[string]string{
		`{{ V1alpha2_FirstIP }}`:                                 machinev1.PlaceholderCIDR4,
		`{{ V1alpha5_FirstIPFromNIC 1 }}`:                        "192.0.2.7/24",
		`{{ V1alpha3_FormatIP V1alpha3_FirstIP "" }}`:            machinev1.PlaceholderIP4,
		`{{ V1alpha3_FormatIP V1alpha3_FirstIP "/24" }}`:         machinev1.PlaceholderIP4 + "/24",
		`{{ V1alpha1_FormatIP "192.168.1.10" "255.255.255.0" }}`: "192.168.1.10/24",
		`{{ V1alpha1_FormatIP "192.168.1.37/28" "" }}`:           "192.168.1.37",
		`{{ V1alpha4_FormatIP "2001:db8::1/64" "/48" }}`:         "2001:db8::1/48",
		`{{ V1alpha2_IP "192.168.1.1" }}`:                        "192.168.1.1/24",
		`{{ V1alpha2_SubnetMask "192.168.1.1/26" }}`:             "255.255.255.192",
		`{{ V1alpha2_SubnetMask V1alpha2_FirstIP }}`:             machinev1.PlaceholderNetmask4,
		`{{ V1alpha2_FirstNicMacAddr }}`:                         "02-00-00-00-00-01",
		`{{ V1alpha2_FormatNameservers -1 "," }}`:                machinev1.PlaceholderDNS,
		`{{ index (V1alpha2_IPsFromNIC 1) 0 }}`:                  "192.0.2.7/24",
		`{{ range V1alpha2_IPsFromNIC 1 }}<{{ . }}>{{ end }}`:    "<192.0.2.7/24>",
		`{{ .V1alpha2.VM.Spec.BiosUUID }}`:                       `{{ .V1alpha2.VM.Spec.BiosUUID }}`, // v1alpha2 has none
		`{{ .V1alpha3.VM.Spec.BiosUUID }}`:                       "6a746f6c-6c00-4000-8000-0000000000aa",
		`plain`:                                                  "plain",
		`{{ if .V1alpha5.Net.Devices }}yes{{ else }}no{{ end }}`: "yes",
		`{{ range $i, $d := .V1alpha5.Net.Devices }}{{ range $d.IPAddresses }}{{ $i }}{{ end }}{{ end }}`: "01",
	} {
		got, err := r.render("test", template)
		if got != want {
			t.Errorf("%s: got %q (%v), want %q", template, got, err, want)
		}
	}
}

// What would keep the server busy is refused at once.
func TestHostileTemplates(t *testing.T) {
	in := input(t, "")
	r, err := in.newRenderer()
	if err != nil {
		t.Fatal(err)
	}
	for _, template := range []string{
		`{{ range 9999999999 }}{{ end }}`,
		`{{ $n := 9999999999 }}{{ range $n }}{{ end }}`,
		`{{ range .V1alpha5.VM.Generation }}{{ end }}`,
		`{{ define "a" }}{{ template "a" }}{{ end }}{{ template "a" }}`,
		`{{ with 1 }}{{ range 9999999999 }}{{ end }}{{ end }}`,
		`{{ range .V1alpha5.Net.Devices }}{{ range .IPAddresses }}{{ range .IPAddresses }}{{ range .IPAddresses }}{{ end }}{{ end }}{{ end }}{{ end }}`,
		`{{ define "b" }}{{ range 9999999999 }}{{ end }}{{ end }}x`,
		strings.Repeat("{{", 1000),
	} {
		started := time.Now()
		if _, err := r.render("test", template); err == nil {
			t.Errorf("%s was executed", template)
		}
		if took := time.Since(started); took > time.Minute {
			t.Errorf("%s took %s", template, took)
		}
	}
}

func FuzzTemplate(f *testing.F) {
	f.Add(`{{ V1alpha2_FirstIP }}`)
	f.Add(`{{ range .V1alpha5.Net.Devices }}{{ .MacAddress }}{{ end }}`)
	f.Add(`\{\{ {{ V1alpha2_FormatIP "1.2.3.4" "/99" }}`)
	in := Input{VM: parseVM(&testing.T{}, ""), NICs: []machinev1.NIC{{Pod: true}}}
	r, err := in.newRenderer()
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(_ *testing.T, text string) {
		out, _ := r.render("fuzz", text)
		if len(out) > maxTemplateOutput+len(text) {
			panic("more output than allowed")
		}
	})
}

func FuzzUserData(f *testing.F) {
	f.Add([]byte("#cloud-config\nruncmd: [1]\n"))
	f.Add([]byte("#cloud-config\nwrite_files: [{path: 1}]\n"))
	f.Add([]byte("<unattend/>"))
	f.Fuzz(func(_ *testing.T, data []byte) {
		_ = checkUserData(data)
		_ = checkUnattend(data)
		_, _ = decode("field", data)
	})
}

func TestCheckUserData(t *testing.T) {
	for data, says := range map[string]string{
		"#cloud-config\nusers: [default, {name: a}]\nruncmd:\n- ls\n- [ls, -l]\npackage_update: true\n": "",
		"#!/bin/sh\ntrue\n":                                 "",
		"Content-Type: multipart/mixed; boundary=x\n\n":     "",
		"## template: jinja\n#cloud-config\n{{ anything }}": "",
		"#cloud-config\n":                                   "",
		"":                                                  "empty",
		"cloud-config\n":                                    "begin with",
		"#cloud-config\nruncmd: ls\n":                       "runcmd is not a list",
		"#cloud-config\nruncmd:\n- {a: b}\n":                "entry 0",
		"#cloud-config\nwrite_files:\n- content: x\n":       "without a path",
		"#cloud-config\nwrite_files:\n- {path: /a, permissions: 0644}\n": "permissions",
		"#cloud-config\n- a\n- b\n":                                      "not a mapping",
		"#cloud-config\na: [\n":                                          "not valid YAML",
		"#cloud-config\nssh_authorized_keys: ssh-rsa AAA\n":              "ssh_authorized_keys is not a list",
	} {
		err := checkUserData([]byte(data))
		switch {
		case says == "" && err != nil:
			t.Errorf("%q: %v", data, err)
		case says != "" && (err == nil || !strings.Contains(err.Error(), says)):
			t.Errorf("%q: got %v, want something about %q", data, err, says)
		}
	}
}
