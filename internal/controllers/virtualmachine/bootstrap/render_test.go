package bootstrap

import (
	"bytes"
	"compress/gzip"
	"encoding/base64"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	"sigs.k8s.io/yaml"

	machinev1 "atoll.dev/atoll/api/machine/v1"
)

var update = flag.Bool("update", false, "write the golden files again")

// parseVM reads a VirtualMachine of which only the bootstrap is of interest.
func parseVM(t *testing.T, bootstrap string) *vmopv1.VirtualMachine {
	t.Helper()
	vm := &vmopv1.VirtualMachine{}
	vm.Name, vm.Namespace, vm.UID = "db", "demo", "0f4b7d4e-0d54-4f5c-9d0f-9c1f3a3a0001"
	vm.Spec.BiosUUID = "6a746f6c-6c00-4000-8000-0000000000aa"
	if bootstrap != "" {
		vm.Spec.Bootstrap = &vmopv1.VirtualMachineBootstrapSpec{}
		if err := yaml.UnmarshalStrict([]byte(bootstrap), vm.Spec.Bootstrap); err != nil {
			t.Fatal(err)
		}
	}
	return vm
}

func input(t *testing.T, bootstrap string) Input {
	return Input{
		VM: parseVM(t, bootstrap), Hostname: "db", Domain: "example.org",
		NICs: []machinev1.NIC{
			{Name: "eth0", Model: "virtio-net-pci", MAC: "02:00:00:00:00:01", Pod: true},
			{Name: "eth1", Model: "virtio-net-pci", MAC: "02:00:00:00:00:02", Bridge: "br0", Addresses: []string{"192.0.2.7/24"}, Gateway4: "192.0.2.1"},
		},
		Data: map[string]map[string][]byte{
			"secret": {
				"user-data": []byte("#cloud-config\nruncmd:\n- touch /there\n"), "password": []byte("s3cret & <x>\n"),
				"hash": []byte("$6$abc"), "file": []byte("from a secret\n"), "script": []byte("echo $1\n"),
				"product_id": []byte("AAAAA-BBBBB"), "domain_admin_password": []byte("join"),
			},
			"capi":  {"value": []byte("## template: jinja\n#cloud-config\nhostname: '{{ ds.meta_data.hostname }}'\n")},
			"empty": {},
		},
	}
}

func TestGolden(t *testing.T) {
	cases := map[string]string{
		"none": "",
		"cloudinit-raw": `
cloudInit:
  instanceID: iid-1
  sshAuthorizedKeys: [ssh-ed25519 AAAA one, ssh-ed25519 BBBB two]
  rawCloudConfig: {name: secret, key: user-data}
  waitOnNetwork4: true
`,
		"cloudinit-value": `{cloudInit: {rawCloudConfig: {name: capi, key: user-data}}}`,
		"cloudinit-inline": `
cloudInit:
  cloudConfig:
    timezone: Europe/Sofia
    defaultUserEnabled: true
    ssh_pwauth: false
    users:
    - name: alice
      groups: [sudo, users]
      passwd: {name: secret, key: password}
      inactive: 5
      sudo: ALL=(ALL) NOPASSWD:ALL
      ssh_authorized_keys: [ssh-ed25519 AAAA]
    - name: bob
      hashed_passwd: {name: secret, key: hash}
      lock_passwd: false
      uid: 1500
    runcmd:
    - echo "{{ ds.meta_data.hostname }}"
    - [ls, -l, /]
    write_files:
    - path: /etc/plain
      content: |
        Hello
      permissions: "0640"
    - path: /etc/secret
      content: {name: secret, key: file}
      owner: root:root
      defer: true
`,
		"linuxprep": `
linuxPrep:
  timeZone: Europe/Sofia
  hardwareClockIsUTC: true
  password: {name: secret}
  expirePasswordAfterNextLogin: true
  scriptText: {from: {name: secret, key: script}}
`,
		"linuxprep-vapp": `
linuxPrep: {}
vAppConfig:
  properties:
  - {key: ip, value: {value: "{{ V1alpha2_FormatIP V1alpha2_FirstIP \"\" }}"}}
`,
		"vapp": `
vAppConfig:
  properties:
  - {key: nameservers, value: {value: "{{ (index .V1alpha2.Net.Nameservers 0) }}"}}
  - {key: management_ip, value: {value: "{{ (index (index .V1alpha2.Net.Devices 0).IPAddresses 0) }}"}}
  - {key: hostname, value: {value: "{{ .V1alpha2.VM.Name }} in {{ .V1alpha5.VM.Namespace }}"}}
  - {key: gateway, value: {value: "{{ (index .V1alpha2.Net.Devices 0).Gateway4 }}"}}
  - {key: mask, value: {value: "{{ V1alpha5_SubnetMask V1alpha5_FirstIP }} {{ V1alpha1_SubnetMask (V1alpha3_FirstIPFromNIC 1) }}"}}
  - {key: all, value: {value: "{{ range .V1alpha4.Net.Devices }}{{ .MacAddress }}{{ range .IPAddresses }} {{ . }}{{ end }};{{ end }}"}}
  - {key: outside, value: {value: "{{ V1alpha2_FirstIPFromNIC 9 }}"}}
  - {key: braces, value: {value: '\{\{ kept \}\}'}}
  - {key: secret, value: {from: {name: secret, key: password}}}
`,
		"vapp-raw": `{vAppConfig: {rawProperties: capi}}`,
		"sysprep": `
sysprep:
  sysprep:
    guiRunOnce: {commands: ["cmd /c echo hello > c:\\hello.txt"]}
    guiUnattended:
      autoLogon: true
      autoLogonCount: 2
      timeZone: 110
      password: {name: secret, key: password}
    identification: {domainAdmin: admin, domainAdminPassword: {name: secret, key: domain_admin_password}, domainOU: "OU=x"}
    userData: {fullName: A & B, orgName: Org, productID: {name: secret, key: product_id}}
    expirePasswordAfterNextLogin: true
    scriptText: {value: "echo %1"}
`,
	}
	for name, bootstrap := range cases {
		t.Run(name, func(t *testing.T) {
			in := input(t, bootstrap)
			if name == "vapp" {
				def := "declared"
				in.Properties = []vmopv1.OVFProperty{{Key: "unset", Type: "string", Default: &def}, {Key: "hostname", Type: "string"}}
			}
			seed, err := Render(in)
			if err != nil {
				t.Fatal(err)
			}
			var out strings.Builder
			fmt.Fprintf(&out, "label: %s\ninstance: %s\n", seed.Label, seed.InstanceID)
			for _, note := range seed.Notes {
				fmt.Fprintf(&out, "note: %s\n", note)
			}
			for _, file := range slices.Sorted(maps.Keys(seed.Files)) {
				fmt.Fprintf(&out, "--- %s\n%s", file, seed.Files[file])
			}
			golden(t, name, out.String())
		})
	}
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", name+".golden")
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s differs (go test -update writes it again); got:\n%s", file, got)
	}
}

func TestErrors(t *testing.T) {
	for name, c := range map[string]struct{ bootstrap, field, reason, says string }{
		"no secret":     {`{cloudInit: {rawCloudConfig: {name: absent, key: user-data}}}`, "spec.bootstrap.cloudInit.rawCloudConfig.name", ReasonNotFound, `no Secret and no ConfigMap "absent"`},
		"no key":        {`{cloudInit: {rawCloudConfig: {name: empty, key: mine}}}`, "spec.bootstrap.cloudInit.rawCloudConfig.key", ReasonKeyNotFound, `no key "mine"`},
		"not user data": {`{cloudInit: {rawCloudConfig: {name: secret, key: password}}}`, "spec.bootstrap.cloudInit.rawCloudConfig", ReasonInvalid, "cloud-init wants #cloud-config"},
		"two":           {`{cloudInit: {}, linuxPrep: {}}`, "spec.bootstrap.cloudInit", ReasonInvalid, "keep one"},
		"number":        {`{cloudInit: {cloudConfig: {runcmd: [[sleep, 5]]}}}`, "spec.bootstrap.cloudInit.cloudConfig.runcmd[0]", ReasonInvalid, "quotes"},
		"no user name":  {`{cloudInit: {cloudConfig: {users: [{name: ""}]}}}`, "spec.bootstrap.cloudInit.cloudConfig.users[0].name", ReasonInvalid, "needs a name"},
		"time zone":     {`{linuxPrep: {timeZone: "../etc"}}`, "spec.bootstrap.linuxPrep.timeZone", ReasonInvalid, "time zone"},
		"windows zone":  {`{sysprep: {sysprep: {userData: {fullName: a, orgName: b}, guiUnattended: {timeZone: 7}}}}`, "spec.bootstrap.sysprep.sysprep.guiUnattended.timeZone", ReasonInvalid, "index"},
		"auto logon":    {`{sysprep: {sysprep: {userData: {fullName: a, orgName: b}, guiUnattended: {autoLogon: true}}}}`, "spec.bootstrap.sysprep.sysprep.guiUnattended.autoLogon", ReasonInvalid, "password"},
		"workgroup":     {`{sysprep: {sysprep: {userData: {fullName: a, orgName: b}, identification: {joinWorkgroup: w}}}}`, "spec.bootstrap.sysprep.sysprep.identification.joinWorkgroup", ReasonInvalid, "domain"},
		"not an answer": {`{sysprep: {rawSysprep: {name: secret, key: password}}}`, "spec.bootstrap.sysprep.rawSysprep", ReasonInvalid, "XML"},
		"raw vapp":      {`{vAppConfig: {rawProperties: absent}}`, "spec.bootstrap.vAppConfig.rawProperties.name", ReasonNotFound, "absent"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Render(input(t, c.bootstrap))
			var e *Error
			if !errors.As(err, &e) {
				t.Fatalf("got %v, want an *Error", err)
			}
			if e.Field != c.field || e.Reason != c.reason || !strings.Contains(e.Message, c.says) {
				t.Errorf("got field %s, reason %s, message %q", e.Field, e.Reason, e.Message)
			}
		})
	}
}

func TestReservedWords(t *testing.T) {
	in := input(t, `{cloudInit: {rawCloudConfig: {name: secret, key: user-data}}}`)
	in.Data["secret"]["user-data"] = []byte("#cloud-config\nhostname: " + machinev1.PlaceholderIP4)
	if _, err := Render(in); err == nil || !strings.Contains(err.Error(), "reserved") {
		t.Errorf("got %v", err)
	}
}

func TestDecode(t *testing.T) {
	plain := []byte("#cloud-config\n{}\n")
	var zipped bytes.Buffer
	w := gzip.NewWriter(&zipped)
	_, _ = w.Write(plain)
	_ = w.Close()
	for name, data := range map[string][]byte{
		"plain":       plain,
		"base64":      []byte(base64.StdEncoding.EncodeToString(plain) + "\n"),
		"gzip":        zipped.Bytes(),
		"gzip+base64": []byte(base64.StdEncoding.EncodeToString(zipped.Bytes())),
	} {
		got, err := decode("field", data)
		if err != nil || !bytes.Equal(got, plain) {
			t.Errorf("%s: got %q, %v", name, got, err)
		}
	}
	if _, err := decode("field", zipped.Bytes()[:20]); err == nil {
		t.Error("cut gzip was taken")
	}
	var bomb bytes.Buffer
	w = gzip.NewWriter(&bomb)
	_, _ = w.Write(make([]byte, maxPlain+1))
	_ = w.Close()
	if _, err := decode("field", bomb.Bytes()); err == nil || !strings.Contains(err.Error(), "more than") {
		t.Errorf("a bomb was taken: %v", err)
	}
}

func TestInstanceID(t *testing.T) {
	render := func(in Input) string {
		t.Helper()
		seed, err := Render(in)
		if err != nil {
			t.Fatal(err)
		}
		return seed.InstanceID
	}
	in := input(t, `{cloudInit: {instanceID: mine}}`)
	if got := render(in); got != "mine" {
		t.Errorf("instanceID: got %s", got)
	}
	in.VM.Annotations = map[string]string{vmopv1.InstanceIDAnnotation: "annotated"}
	if got := render(in); got != "annotated" {
		t.Errorf("annotation: got %s", got)
	}
	// linuxPrep: the same specification is one instance, another is a new one.
	first := render(input(t, `{linuxPrep: {timeZone: UTC}}`))
	if again := render(input(t, `{linuxPrep: {timeZone: UTC}}`)); again != first {
		t.Errorf("the same specification gave %s and %s", first, again)
	}
	second := render(input(t, `{linuxPrep: {timeZone: Europe/Sofia}}`))
	if second == first {
		t.Error("a changed specification gave the same instance")
	}
	in = input(t, `{linuxPrep: {timeZone: Europe/Sofia, customizeAtNextPowerOn: false}}`)
	in.LastInstanceID = first
	if got := render(in); got != first {
		t.Errorf("customizeAtNextPowerOn false: got %s, want the last one, %s", got, first)
	}
	in = input(t, `{linuxPrep: {timeZone: UTC, customizeAtNextPowerOn: true}}`)
	in.LastInstanceID, in.VM.Generation = first, 7
	if got := render(in); got == first {
		t.Error("customizeAtNextPowerOn true: the instance is the last one")
	}
}

func TestReferences(t *testing.T) {
	vm := parseVM(t, `
cloudInit:
  cloudConfig:
    users:
    - {name: a, passwd: {name: one, key: k}, hashed_passwd: {name: two, key: k}}
    write_files:
    - {path: /a, content: {name: three, key: k}}
    - {path: /b, content: text}
    - {path: /c, content: {name: one, key: k}}
`)
	var names []string
	for _, r := range References(vm) {
		names = append(names, r.Name)
	}
	if want := []string{"one", "three", "two"}; !slices.Equal(names, want) {
		t.Errorf("got %v, want %v", names, want)
	}
}
