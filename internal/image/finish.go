package image

import (
	"archive/tar"
	"bytes"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// mergeUsr lays the links of Debian's merged /usr before packages are unpacked.
func (t *tree) mergeUsr() error {
	for _, name := range []string{"bin", "lib", "lib64", "sbin"} {
		if err := t.put("usr/"+name, &node{kind: tar.TypeDir, mode: 0o755, modTime: fixedTime}); err != nil {
			return err
		}
		link := node{kind: tar.TypeSymlink, mode: 0o777, target: "usr/" + name, modTime: fixedTime}
		if err := t.put(name, &link); err != nil {
			return err
		}
	}
	return nil
}

// finishDebian creates what maintainer scripts would create from static data.
func (t *tree) finishDebian() error {
	for _, dir := range []struct {
		name string
		mode int64
	}{
		{"dev", 0o755},
		{"etc", 0o755},
		{"home", 0o755},
		{"proc", 0o555},
		{"root", 0o700},
		{"run", 0o755},
		{"sys", 0o555},
		{"tmp", 0o1777},
		{"var/tmp", 0o1777},
	} {
		if _, err := t.lookup(dir.name); err == nil {
			continue
		}
		if err := t.put(dir.name, &node{kind: tar.TypeDir, mode: dir.mode, modTime: fixedTime}); err != nil {
			return err
		}
	}
	for _, link := range [][2]string{{"var/run", "/run"}, {"var/lock", "/run/lock"}} {
		if _, err := t.lookup(link[0]); err == nil {
			continue
		}
		n := node{kind: tar.TypeSymlink, mode: 0o777, target: link[1], modTime: fixedTime}
		if err := t.put(link[0], &n); err != nil {
			return err
		}
	}
	if _, err := t.lookup("etc/nsswitch.conf"); err != nil {
		content := []byte("passwd: files\ngroup: files\nhosts: files dns\n")
		if err := t.putBytes("etc/nsswitch.conf", content, 0o644); err != nil {
			return err
		}
	}
	return t.bundleCertificates()
}

// bundleCertificates joins the certificates of the package ca-certificates.
func (t *tree) bundleCertificates() error {
	var names []string
	for key := range t.nodes {
		if strings.HasPrefix(key, "usr/share/ca-certificates/") && strings.HasSuffix(key, ".crt") {
			names = append(names, key)
		}
	}
	if len(names) == 0 {
		return nil
	}
	slices.Sort(names)
	var bundle bytes.Buffer
	for _, name := range names {
		content, err := t.readFile(name)
		if err != nil {
			return err
		}
		bundle.Write(bytes.TrimRight(content, "\n"))
		bundle.WriteByte('\n')
	}
	return t.putBytes("etc/ssl/certs/ca-certificates.crt", bundle.Bytes(), 0o644)
}

// prune removes documentation and translations, but keeps licences.
func (t *tree) prune(keep []string) {
	if !slices.Contains(keep, "docs") {
		for _, dir := range []string{"man", "info", "lintian", "bug", "doc-base", "bash-completion", "gtk-doc", "linda"} {
			t.remove("usr/share/" + dir)
		}
		for key, n := range t.nodes {
			if strings.HasPrefix(key, "usr/share/doc/") && n.kind != tar.TypeDir && !strings.HasSuffix(key, "/copyright") {
				delete(t.nodes, key)
			}
		}
		t.dropEmptyDirs("usr/share/doc")
	}
	if !slices.Contains(keep, "locales") {
		t.remove("usr/share/locale/*")
		t.remove("usr/share/i18n/*")
	}
}

// dropEmptyDirs removes directories below root that hold nothing.
func (t *tree) dropEmptyDirs(root string) {
	used := map[string]bool{}
	for key, n := range t.nodes {
		if n.kind == tar.TypeDir {
			continue
		}
		for i := range len(key) {
			if key[i] == '/' {
				used[key[:i]] = true
			}
		}
	}
	for key, n := range t.nodes {
		if strings.HasPrefix(key, root+"/") && n.kind == tar.TypeDir && !used[key] {
			delete(t.nodes, key)
		}
	}
}

// writeAccounts writes /etc/passwd and /etc/group: root and nobody, the static
// accounts of Debian where base-passwd is in the image, and the recipe's own. A
// later line replaces an earlier one of the same name.
func (t *tree) writeAccounts(users []User, groups []Group) error {
	passwd := []string{
		"root:x:0:0:root:/root:/bin/sh",
		"nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin",
	}
	group := []string{"root:x:0:", "nogroup:x:65534:"}
	if master, err := t.readFile("usr/share/base-passwd/passwd.master"); err == nil {
		passwd = append(passwd, accountLines(master)...)
	}
	if master, err := t.readFile("usr/share/base-passwd/group.master"); err == nil {
		group = append(group, accountLines(master)...)
	}
	for _, user := range users {
		home, shell := user.Home, user.Shell
		if home == "" {
			home = "/"
		}
		if shell == "" {
			shell = "/bin/sh"
		}
		passwd = append(passwd, fmt.Sprintf("%s:x:%d:%d::%s:%s", user.Name, user.UID, user.GID, home, shell))
	}
	for _, g := range groups {
		group = append(group, g.Name+":x:"+strconv.Itoa(g.GID)+":"+strings.Join(g.Members, ","))
	}
	if err := t.putBytes("etc/passwd", joinAccounts(passwd), 0o644); err != nil {
		return err
	}
	return t.putBytes("etc/group", joinAccounts(group), 0o644)
}

// accountLines splits a master file of base-passwd; "*" passwords become "x".
func accountLines(master []byte) []string {
	var lines []string
	for line := range strings.Lines(string(master)) {
		line = strings.TrimSpace(line)
		if line != "" {
			lines = append(lines, strings.Replace(line, ":*:", ":x:", 1))
		}
	}
	return lines
}

func joinAccounts(lines []string) []byte {
	place := map[string]int{}
	var kept []string
	for _, line := range lines {
		name, _, _ := strings.Cut(line, ":")
		if i, ok := place[name]; ok {
			kept[i] = line
			continue
		}
		place[name] = len(kept)
		kept = append(kept, line)
	}
	return []byte(strings.Join(kept, "\n") + "\n")
}
