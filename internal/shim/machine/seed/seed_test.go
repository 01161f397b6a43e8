package seed

import (
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	machinev1 "atoll.dev/atoll/api/machine/v1"
)

func pod() Network {
	return Network{
		MAC: "0A:00:00:00:00:07", MTU: 1450, Addresses: []netip.Prefix{netip.MustParsePrefix("10.244.0.7/32")},
		Gateway4: netip.MustParseAddr("10.244.0.1"), Nameservers: []string{"10.96.0.10"}, Search: []string{"ns.svc.cluster.local", "cluster.local"},
	}
}

func machines() map[string]*machinev1.Machine {
	return map[string]*machinev1.Machine{
		"pod":  {NICs: []machinev1.NIC{{Name: "eth0", Pod: true}}},
		"none": {},
		"dhcp": {NICs: []machinev1.NIC{{Name: "eth0", Pod: true, DHCP4: true, MAC: "52:54:00:00:00:01", GuestDevice: "lan0"}}},
		"several": {NICs: []machinev1.NIC{
			{Name: "eth0", Pod: true, MAC: "52:54:00:00:00:01", MTU: 1400, Nameservers: []string{"192.0.2.53"}},
			{
				Name: "eth1", MAC: "52:54:00:00:00:02", Addresses: []string{"192.0.2.4/24", "2001:db8::4/64"}, Gateway4: "192.0.2.1", Gateway6: "fe80::1",
				Routes: []machinev1.Route{{To: "198.51.100.0/24", Via: "192.0.2.9", Metric: 5}, {To: "default", Via: "2001:db8::9"}},
			},
			{Name: "eth2", MAC: "52:54:00:00:00:03", DHCP4: true, DHCP6: true},
		}},
	}
}

func TestNetplan(t *testing.T) {
	for name, m := range machines() {
		got, err := Netplan(m, pod())
		if err != nil {
			t.Fatal(err)
		}
		golden(t, name+".netplan.json", append(got, '\n'))
	}
}

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	file := filepath.Join("testdata", name)
	if os.Getenv("UPDATE_GOLDEN") != "" {
		if err := os.WriteFile(file, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != string(want) {
		t.Errorf("%s:\n%s\nwant\n%s", name, got, want)
	}
}

func TestFill(t *testing.T) {
	files := map[string][]byte{
		"meta-data": []byte("local-ipv4: @@ATOLL_IP4@@ @@ATOLL_CIDR4@@ @@ATOLL_NETMASK4@@ @@ATOLL_GATEWAY4@@ @@ATOLL_MAC@@\n"),
		"a/dns":     []byte("@@ATOLL_DNS@@; @@ATOLL_SEARCH@@; @@ATOLL_IP4@@"),
		"netplan":   []byte("network: @@ATOLL_NETPLAN@@\n"),
		"plain":     {0, 1, 2, 255},
	}
	out, err := Fill(machines()["pod"], files, pod())
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"meta-data": "local-ipv4: 10.244.0.7 10.244.0.7/32 255.255.255.255 10.244.0.1 0A:00:00:00:00:07\n",
		"a/dns":     "10.96.0.10; ns.svc.cluster.local, cluster.local; 10.244.0.7",
		"plain":     "\x00\x01\x02\xff",
	} {
		if string(out[name]) != want {
			t.Errorf("%s: %q, want %q", name, out[name], want)
		}
	}
	if !strings.HasPrefix(string(out["netplan"]), `network: {"version":2,`) {
		t.Errorf("netplan: %s", out["netplan"])
	}
	if out, err := Fill(machines()["none"], files, pod()); err != nil || string(out["a/dns"]) != "; ; " {
		t.Errorf("without interfaces: %q, %v", out["a/dns"], err)
	}
}

// TestRead reads what the kubelet leaves for a Secret.
func TestRead(t *testing.T) {
	dir := t.TempDir()
	data := filepath.Join(dir, "..2026")
	if err := os.Mkdir(data, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"user-data": "#cloud-config\n", "openstack__latest__user_data": "x"} {
		if err := os.WriteFile(filepath.Join(data, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(filepath.Join("..data", name), filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("..2026", filepath.Join(dir, "..data")); err != nil {
		t.Fatal(err)
	}
	files, err := Read(dir)
	if err != nil || len(files) != 2 || string(files["openstack/latest/user_data"]) != "x" || string(files["user-data"]) != "#cloud-config\n" {
		t.Errorf("%q, %v", files, err)
	}
	m := machines()["pod"]
	m.Seed = &machinev1.Seed{Label: "cidata"}
	f, err := Image(m, files, pod())
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if image, err := io.ReadAll(f); err != nil || len(image)%2048 != 0 || !strings.Contains(string(image), "#cloud-config") {
		t.Errorf("image of %d bytes, %v", len(image), err)
	}
	if _, err := f.WriteAt([]byte("x"), 0); err == nil {
		t.Error("the image can be written to")
	}
	if _, err := Image(m, nil, pod()); err == nil {
		t.Error("a seed of nothing was made")
	}
}
