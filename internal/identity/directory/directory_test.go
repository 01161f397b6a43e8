package directory

import (
	"slices"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	api "atoll.dev/atoll/api/atoll/v1alpha1"
)

func group(name string, members, groups []string) api.Group {
	return api.Group{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: api.GroupSpec{Members: members, Groups: groups}}
}

func TestGroupsOf(t *testing.T) {
	groups := []api.Group{
		group("dev", []string{"anna"}, []string{"interns"}),
		group("interns", []string{"ben"}, nil),
		group("staff", nil, []string{"dev", "all"}),
		group("all", []string{"carl"}, []string{"staff"}), // a circle
		group("empty", nil, nil),
	}
	for user, want := range map[string][]string{
		"anna": {"all", "dev", "staff"},
		"ben":  {"all", "dev", "interns", "staff"},
		"carl": {"all", "staff"},
		"dora": nil,
	} {
		if got := GroupsOf(groups, user); !slices.Equal(got, want) {
			t.Errorf("%s is in %v, want %v", user, got, want)
		}
	}
	if !Reaches(groups, "staff", "interns") || !Reaches(groups, "all", "staff") || Reaches(groups, "interns", "dev") {
		t.Error("circles")
	}
}

func TestLocalName(t *testing.T) {
	for in, want := range map[string]string{
		"anna": "anna", "Administrator@ATOLL.local": "administrator", "sso:anna@atoll.local": "anna", "a.b-c_d": "a.b-c_d",
		"": "", "anna@vsphere.local": "", "system:admin": "", "a/b": "", "../a": "", "a b": "", "-a": "", "a:": "",
		"anna\x00": "", "anna\n": "", "änna": "", "sso:sso:anna": "", strings.Repeat("a", 64): "", strings.Repeat("a", 1<<20): "",
		"anna@atoll.local@atoll.local": "",
	} {
		name, ok := LocalName(in)
		if ok != (want != "") || ok && name != want {
			t.Errorf("%.40q: %q, %v", in, name, ok)
		}
	}
}

func FuzzLocalName(f *testing.F) {
	f.Add("anna@atoll.local")
	f.Fuzz(func(t *testing.T, typed string) {
		if name, ok := LocalName(typed); ok && strings.ContainsAny(name, "@:/ \n\x00") {
			t.Errorf("%q became %q", typed, name)
		}
	})
}
