package cpumodel

import "testing"

func TestChoose(t *testing.T) {
	all := map[string]bool{"Haswell-v4": true, "Westmere-v2": true, "Nehalem-v1": true, "EPYC-v2": true, "host": true}
	for name, c := range map[string]struct {
		vendor    string
		supported map[string]bool
		want      string
	}{
		"new Intel":              {"GenuineIntel", all, "Haswell-v4"},
		"old Intel":              {"GenuineIntel", map[string]bool{"Haswell-v4": false, "Westmere-v2": true}, "Westmere-v2"},
		"AMD with Intel's flags": {"AuthenticAMD", all, "EPYC-v2"},
		"old AMD":                {"AuthenticAMD", map[string]bool{"Westmere-v2": true}, ""},
		"nothing passed on":      {"GenuineIntel", map[string]bool{"Haswell-v4": false}, ""},
		"another maker":          {"CentaurHauls", all, ""},
		"QEMU said nothing":      {"GenuineIntel", nil, ""},
	} {
		got := Choose(c.vendor, Offer{Models: c.supported})
		if got != c.want {
			t.Errorf("%s: %q, not %q", name, got, c.want)
		}
		if got != "" && !Baseline(got) {
			t.Errorf("%s: %s is none of the baselines", name, got)
		}
	}
	for _, model := range []string{"", "host", "max", "Nehalem-v1", "Haswell-v4,foo=on", "Haswell-v4,ssbd", "Haswell-v4,ssbd=off", "Haswell-v4,", "Haswell-v4,ssbd=on,", "Haswell-v4,ssbd=on,vmx=on", "EPYC-v2,arch-capabilities=on", "host,ssbd=on"} {
		if Baseline(model) {
			t.Errorf("%q is none", model)
		}
	}
}

// TestGuards: a machine has what its host has against attacks on the processor, and nothing else of it.
func TestGuards(t *testing.T) {
	models := map[string]bool{"Haswell-v4": true, "EPYC-v2": true}
	features := map[string]bool{}
	for _, f := range []string{"avx512f", "hle", "ssbd", "amd-ssbd", "md-clear", "stibp", "amd-stibp", "arch-capabilities", "rdctl-no", "mds-no", "vmx", "svm"} {
		features[f] = true
	}
	for vendor, want := range map[string]string{
		"GenuineIntel": "Haswell-v4,ssbd=on,stibp=on,md-clear=on,arch-capabilities=on,rdctl-no=on,mds-no=on",
		"AuthenticAMD": "EPYC-v2,amd-stibp=on,amd-ssbd=on",
	} {
		got := Choose(vendor, Offer{Models: models, Features: features})
		if got != want {
			t.Errorf("%s: %s, not %s", vendor, got, want)
		}
		if !Baseline(got) {
			t.Errorf("%s is none of the baselines when it is read again", got)
		}
	}
}

func TestVendor(t *testing.T) {
	if got := Vendor([]byte("processor\t: 0\nvendor_id\t: AuthenticAMD\nvendor_id\t: x\n")); got != "AuthenticAMD" {
		t.Errorf("%q", got)
	}
	if got := Vendor(nil); got != "" {
		t.Errorf("%q", got)
	}
}
