package image

import (
	"slices"
	"strings"
	"testing"
)

func TestParseURIs(t *testing.T) {
	sum := strings.Repeat("ab", 32)
	good := "'http://deb.debian.org/a_1%3a2_amd64.deb' a_1%3a2_amd64.deb 1234 SHA256:" + sum + "\n"
	debs, err := parseURIs([]byte("Reading package lists...\n" + good))
	if err != nil || !slices.Equal(debs, []deb{{file: "a_1%3a2_amd64.deb", sha256: sum}}) {
		t.Errorf("got %v, %v", debs, err)
	}
	for name, line := range map[string]string{
		"fields":    "'http://x/a.deb' a.deb 12\n",
		"weak hash": "'http://x/a.deb' a.deb 12 MD5Sum:" + sum[:32] + "\n",
		"path":      "'http://x/a.deb' ../a.deb 12 SHA256:" + sum + "\n",
		"not a deb": "'http://x/a.deb' lock 12 SHA256:" + sum + "\n",
		"short sum": "'http://x/a.deb' a.deb 12 SHA256:ab\n",
	} {
		if _, err := parseURIs([]byte(line)); err == nil {
			t.Errorf("%s: the line was accepted", name)
		}
	}
}

func TestAccountsOfDebianAndRecipe(t *testing.T) {
	tr := emptyTree(t)
	if err := tr.putBytes("usr/share/base-passwd/passwd.master", []byte("root:*:0:0:root:/root:/bin/bash\nwww-data:*:33:33:www-data:/var/www:/usr/sbin/nologin\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	users := []User{{Name: "www-data", UID: 34, GID: 34, Home: "/srv", Shell: "/bin/false"}, {Name: "me", UID: 1, GID: 2}}
	if err := tr.writeAccounts(users, []Group{{Name: "g", GID: 9, Members: []string{"me", "root"}}}); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"etc/passwd": "root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n" +
			"www-data:x:34:34::/srv:/bin/false\nme:x:1:2::/:/bin/sh\n",
		"etc/group": "root:x:0:\nnogroup:x:65534:\ng:x:9:me,root\n",
	} {
		if got, err := tr.readFile(name); err != nil || string(got) != want {
			t.Errorf("%s is %q, %v; want %q", name, got, err, want)
		}
	}
}

func TestPruneKeepsLicences(t *testing.T) {
	fill := func() *tree {
		tr := emptyTree(t)
		mustPut(t, tr, "/usr/share/doc/a/copyright", "/usr/share/doc/a/changelog.gz", "/usr/share/doc/b/README",
			"/usr/share/man/man1/a.1.gz", "/usr/share/locale/de/a.mo", "/usr/share/ca-certificates/z.crt", "/usr/share/ca-certificates/a.crt")
		return tr
	}
	for name, test := range map[string]struct {
		keep []string
		gone []string
		left []string
	}{
		"default": {nil, []string{"usr/share/doc/a/changelog.gz", "usr/share/doc/b", "usr/share/man", "usr/share/locale/de"}, []string{"usr/share/doc/a/copyright"}},
		"all":     {[]string{"docs", "locales"}, nil, []string{"usr/share/doc/b/README", "usr/share/man/man1/a.1.gz", "usr/share/locale/de/a.mo"}},
	} {
		tr := fill()
		tr.prune(test.keep)
		for _, path := range test.gone {
			if _, ok := tr.nodes[path]; ok {
				t.Errorf("%s: %s was kept", name, path)
			}
		}
		for _, path := range test.left {
			if _, ok := tr.nodes[path]; !ok {
				t.Errorf("%s: %s was removed", name, path)
			}
		}
	}
	tr := fill()
	if err := tr.finishDebian(); err != nil {
		t.Fatal(err)
	}
	bundle, err := tr.readFile("etc/ssl/certs/ca-certificates.crt")
	if err != nil || string(bundle) != "content of /usr/share/ca-certificates/a.crt\ncontent of /usr/share/ca-certificates/z.crt\n" {
		t.Errorf("bundle is %q, %v", bundle, err)
	}
}
