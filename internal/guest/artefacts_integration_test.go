//go:build integration

package guest_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
)

// artefacts are built once for all tests.
type artefacts struct{ dir, kernel, init, helper, initrd, image, warm string }

var built = sync.OnceValues(build)

// build makes initramfs and image. It needs go, cc, mkfs.erofs and a static busybox.
func build() (a artefacts, err error) {
	if a.dir, err = os.MkdirTemp("", "atoll-guest-test"); err != nil {
		return a, err
	}
	a.kernel = os.Getenv("ATOLL_TEST_KERNEL")
	if a.kernel == "" {
		a.kernel = "../../build/vmlinux"
	}
	if _, err = os.Stat(a.kernel); err != nil {
		return a, fmt.Errorf("no pod kernel (set ATOLL_TEST_KERNEL): %w", err)
	}
	a.init = filepath.Join(a.dir, "init")
	cmd := exec.Command("go", "build", "-ldflags=-s -w", "-o", a.init, "./testinit")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return a, fmt.Errorf("building init: %w: %s", err, out)
	}
	a.helper = filepath.Join(a.dir, "exec")
	if out, err := exec.Command("../../guestos/exec/build.sh", a.helper).CombinedOutput(); err != nil {
		return a, fmt.Errorf("building exec helper: %w: %s", err, out)
	}
	a.initrd = filepath.Join(a.dir, "initrd")
	if err = writeInitrd(a.initrd, map[string]string{"init": a.init, "exec": a.helper}); err != nil {
		return a, err
	}
	a.warm = filepath.Join(a.dir, "warm.erofs")
	if err := warmImage(filepath.Join(a.dir, "warm"), a.helper, a.warm); err != nil {
		return a, err
	}
	a.image = filepath.Join(a.dir, "busybox.erofs")
	return a, buildImage(filepath.Join(a.dir, "root"), a.image)
}

// warmImage makes what the pool warms its members up with.
func warmImage(root, helper, image string) error {
	data, err := os.ReadFile(helper)
	if err != nil {
		return err
	}
	err = errors.Join(
		os.MkdirAll(filepath.Join(root, "bin"), 0o755), os.Mkdir(filepath.Join(root, "etc"), 0o755),
		os.WriteFile(filepath.Join(root, "etc/passwd"), []byte("root:x:0:0:root:/root:/bin/sh\n"), 0o644),
		os.WriteFile(filepath.Join(root, "bin/exec"), data, 0o755), os.Symlink("exec", filepath.Join(root, "bin/sh")))
	if err != nil {
		return err
	}
	if out, err := exec.Command("mkfs.erofs", "--all-root", image, root).CombinedOutput(); err != nil {
		return fmt.Errorf("mkfs.erofs: %w: %s", err, out)
	}
	return nil
}

// buildImage makes an image with busybox, a few users, and a script without interpreter.
func buildImage(root, image string) error {
	list, err := exec.Command("busybox", "--list").Output()
	if err != nil {
		return fmt.Errorf("listing applets: %w", err)
	}
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		return err
	}
	data, err := os.ReadFile(busybox)
	if err != nil {
		return err
	}
	for _, d := range []string{"bin", "etc", "data/sub", "home/user", "tmp", "proc", "sys", "dev"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			return err
		}
	}
	files := map[string]string{
		"bin/busybox": string(data), "bin/noexec": "data", "bin/noformat": "what?", "bin/nointerp": "#!/no/such\n",
		"etc/passwd": "root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n",
		"etc/group":  "root:x:0:\nuser:x:1000:\n", "data/file": "from the image", "data/sub/deep": "deeper",
	}
	for name, content := range files {
		mode := os.FileMode(0o755)
		if name == "bin/noexec" || !strings.HasPrefix(name, "bin/") {
			mode = 0o644
		}
		if err := os.WriteFile(filepath.Join(root, name), []byte(content), mode); err != nil {
			return err
		}
	}
	for applet := range strings.FieldsSeq(string(list)) {
		if err := os.Symlink("busybox", filepath.Join(root, "bin", applet)); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	if out, err := exec.Command("mkfs.erofs", "--all-root", image, root).CombinedOutput(); err != nil {
		return fmt.Errorf("mkfs.erofs: %w: %s", err, out)
	}
	return nil
}

// writeInitrd writes a cpio archive (newc) of executable files.
func writeInitrd(name string, files map[string]string) error {
	var b bytes.Buffer
	ino := 1
	entry := func(name string, mode, nlink, rmaj, rmin int, data []byte) {
		fmt.Fprintf(&b, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%s\x00",
			ino, mode, 0, 0, nlink, 0, len(data), 0, 0, rmaj, rmin, len(name)+1, 0, name)
		ino++
		for b.Len()%4 != 0 {
			b.WriteByte(0)
		}
		b.Write(data)
		for b.Len()%4 != 0 {
			b.WriteByte(0)
		}
	}
	entry("dev", 0o40755, 2, 0, 0, nil)
	entry("dev/console", 0o20600, 1, 5, 1, nil)
	for _, n := range []string{"init", "exec"} {
		data, err := os.ReadFile(files[n])
		if err != nil {
			return err
		}
		entry(n, 0o100755, 1, 0, 0, data)
	}
	entry("TRAILER!!!", 0, 1, 0, 0, nil)
	return os.WriteFile(name, b.Bytes(), 0o600)
}
