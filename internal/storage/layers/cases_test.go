package layers

import (
	"archive/tar"
	"fmt"
	"strings"
	"time"
)

const capNetRaw = "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"

func repeat(n int) string {
	var b strings.Builder
	for i := 0; b.Len() < n; i++ {
		fmt.Fprintf(&b, "%d,", i)
	}
	return b.String()[:n]
}

func manyFiles(n int) []entry {
	out := []entry{{name: "many/"}}
	for i := range n {
		out = append(out, entry{name: fmt.Sprintf("many/file-%05d", i), content: repeat(i % 50)})
	}
	return out
}

// cases are images, layers lowest first. Every one is unpacked by this package
// and by containerd's overlayfs route, and the results compared.
var cases = map[string][][]entry{
	"one layer": {{
		{name: "etc/"},
		{name: "etc/passwd", content: "root:x:0:0:root:/root:/bin/sh\n"},
		{name: "bin/", mode: 0o711, mtime: time.Unix(5, 0)},
		{name: "bin/sh", content: repeat(10000), mode: 0o4755, uid: 1},
		{name: "a", content: ""},
		{name: "b", content: repeat(4095)},
		{name: "c", content: repeat(4096)},
		{name: "d", content: repeat(4097)},
		{name: "e", content: repeat(2048)},
		{name: "f", content: repeat(2049)},
		{name: "g", content: repeat(300000)},
		{name: "tmp/", mode: 0o1777},
	}},
	"types": {{
		{name: "dev/"},
		{name: "dev/null", typ: tar.TypeChar, major: 1, minor: 3, mode: 0o666},
		{name: "dev/big", typ: tar.TypeChar, major: 300, minor: 70000, mode: 0o600},
		{name: "dev/loop", typ: tar.TypeBlock, major: 7, minor: 300},
		{name: "dev/fifo", typ: tar.TypeFifo},
		{name: "short", typ: tar.TypeSymlink, link: "x"},
		{name: "long", typ: tar.TypeSymlink, link: "/" + strings.Repeat("l/", 400)},
		{name: "longest", typ: tar.TypeSymlink, link: strings.Repeat("x", 4095)},
		{name: "uid", uid: 1000000},
		{name: "suid", mode: 0o6755},
		{name: "none", mode: 0o1000},
		{name: "old", mtime: time.Unix(-1000, 0)},
		{name: "epoch", mtime: time.Unix(0, 1)},
		{name: "future", mtime: time.Unix(1<<34, 999999999)},
	}},
	"names": {{
		{name: "+x", content: "plus"},
		{name: "!", content: "bang"},
		{name: "#hash/"},
		{name: "#hash/-y", content: "y"},
		{name: strings.Repeat("n", 255), content: "n"},
		{name: "ünïcode-" + strings.Repeat("☃", 50)},
		{name: "space name"},
		{name: "latin1-\xe9\xff", content: "not utf-8"},
		{name: "dir-\xff/"},
		{name: "dir-\xff/x", content: "x"},
		{name: "back\\slash"},
		{name: "new\nline"},
		{name: "...", content: "dots"},
		{name: "..a/"},
		{name: "..a/b"},
		{name: "./rel/"},
		{name: "./rel/x", content: "1"},
		{name: "/abs", content: "2"},
		{name: "../../up", content: "3"},
	}, {
		{name: ".wh.+x"}, {name: "#hash/.wh..wh..opq"}, {name: "#hash/+new", content: "kept"}, {name: "#hash/-z", content: "kept"},
	}},
	"xattrs": {{
		{name: "cap", content: "x", xattrs: map[string]string{"security.capability": capNetRaw}},
		{name: "user", content: repeat(5000), xattrs: map[string]string{"user.a": "1", "user.big": repeat(3000), "user.empty": ""}},
		{name: "dir/", xattrs: map[string]string{"user.d": "dir", "trusted.t": "t"}},
		{name: "both", xattrs: map[string]string{"security.capability": capNetRaw, "user.b": "b"}},
	}, {
		{name: "dir/", mode: 0o700, xattrs: map[string]string{"user.new": "n"}},
		{name: "cap", content: "replaced"},
	}},
	"whiteouts": {{
		{name: "dir/"},
		{name: "dir/a", content: "a"},
		{name: "dir/b", content: "b"},
		{name: "dir/sub/"},
		{name: "dir/sub/c", content: "c"},
		{name: "gone"},
		{name: "gonedir/"},
		{name: "gonedir/x"},
		{name: "again", content: "old"},
	}, {
		{name: "dir/.wh.a"}, {name: ".wh.gone"}, {name: ".wh.gonedir"}, {name: ".wh.again"}, {name: ".wh.never"},
	}, {
		{name: "again", content: "new"}, {name: "gonedir/"}, {name: "gonedir/y", content: "fresh"},
	}},
	"opaque": {{
		{name: "dir/"}, {name: "dir/a"}, {name: "dir/sub/"}, {name: "dir/sub/c"}, {name: "two/"}, {name: "two/x"},
	}, {
		{name: "dir/"},
		{name: "dir/new", content: "1"},
		{name: "dir/.wh..wh..opq"},
		{name: "dir/zz", content: "2"},
		{name: "two/.wh..wh..opq"},
	}, {
		{name: "dir/top", content: "3"},
	}},
	"replacements": {{
		{name: "f2d", content: "file"},
		{name: "d2f/"},
		{name: "d2f/x"},
		{name: "d2l/"},
		{name: "d2l/x"},
		{name: "l2d", typ: tar.TypeSymlink, link: "d2f"},
		{name: "lib", typ: tar.TypeSymlink, link: "usr/lib"},
		{name: "usr/"},
		{name: "usr/lib/"},
		{name: "usr/lib/x", content: "x"},
		{name: "meta/", mode: 0o755},
		{name: "meta/x"},
	}, {
		{name: "f2d/"},
		{name: "f2d/x", content: "1"},
		{name: "d2f", content: "2"},
		{name: "d2l", typ: tar.TypeSymlink, link: "f2d"},
		{name: "l2d/"},
		{name: "l2d/y", content: "3"},
		{name: "lib/"},
		{name: "lib/new", content: "4"},
		{name: "meta/", mode: 0o2750, uid: 7, mtime: time.Unix(77, 0)},
	}},
	"missing parents": {{
		{name: "a/", mode: 0o700, uid: 5, mtime: time.Unix(10, 0), xattrs: map[string]string{"user.k": "v"}},
		{name: "a/b/", mode: 0o750, uid: 6, mtime: time.Unix(11, 0)},
		{name: "a/b/x"},
	}, {
		{name: "a/b/c", content: "new"}, {name: "a/b/.wh.x"},
	}},
	"symlinks in paths": {{
		{name: "usr/"},
		{name: "usr/lib/"},
		{name: "lib", typ: tar.TypeSymlink, link: "usr/lib"},
		{name: "lib/libc.so", content: "libc"},
		{name: "abs", typ: tar.TypeSymlink, link: "/usr"},
		{name: "abs/bin/"},
		{name: "abs/bin/x"},
		{name: "esc", typ: tar.TypeSymlink, link: "../../../.."},
		{name: "esc/inside", content: "in"},
	}},
	"hard links": {{
		{name: "bin/"},
		{name: "bin/perl", content: repeat(9000), mode: 0o755},
		{name: "bin/perl5", typ: tar.TypeLink, link: "bin/perl", mode: 0o755},
		{name: "l", typ: tar.TypeSymlink, link: "nowhere"},
		{name: "l2", typ: tar.TypeLink, link: "l"},
		{name: "one", content: "1"},
		{name: "two", typ: tar.TypeLink, link: "/one", mode: 0o600, uid: 9},
		{name: "three", typ: tar.TypeLink, link: "./two"},
		{name: "fifo", typ: tar.TypeFifo},
		{name: "fifo2", typ: tar.TypeLink, link: "fifo"},
		{name: "big", content: repeat(200000)},
		{name: "bigger", typ: tar.TypeLink, link: "big"},
	}, {
		{name: ".wh.one"}, {name: "bin/perl", content: "newer", mode: 0o755}, {name: "x/"}, {name: "x/a", content: "a"}, {name: "x/b", typ: tar.TypeLink, link: "x/a"},
	}},
	"sparse": {{
		{name: "zeros", content: strings.Repeat("\x00", 1<<20)},
		{name: "middle", content: repeat(1<<17) + strings.Repeat("\x00", 1<<18) + repeat(70000)},
		{name: "end", content: repeat(1000) + strings.Repeat("\x00", 1<<18)},
		{name: "start", content: strings.Repeat("\x00", 1<<16) + "x"},
	}, {{name: "other"}}},
	"big directory": {manyFiles(3000), {{name: "many/.wh.file-00007"}, {name: "many/zz", content: "z"}}},
	"deep": {{
		{name: strings.Repeat("d/", 500) + "file", content: "deep"},
	}},
	"duplicates": {{
		{name: "x", content: "first"},
		{name: "x", content: "second"},
		{name: "y/"},
		{name: "y/in"},
		{name: "y", content: "now a file"},
		{name: "z", content: "file"},
		{name: "z/"},
		{name: "z/in", content: "2"},
		{name: "w/", mode: 0o700},
		{name: "w/in"},
		{name: "w/", mode: 0o711},
	}},
	"no change": {{{name: "a", content: "a"}}, {}, {{name: "b/"}}},
}
