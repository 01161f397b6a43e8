package disk

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// System puts a disk together of an installed system's parts, in the same layout
// as Build: dir has boot.img and core.img of GRUB for a BIOS, shimx64.efi and
// grubx64.efi with its grub.cfg for UEFI, and root.ext4. The image appears at out
// when it is complete.
func System(ctx context.Context, dir, out string) error {
	if err := system(ctx, dir, out); err != nil {
		return fmt.Errorf("building disk of %s: %w", dir, err)
	}
	return nil
}

func system(ctx context.Context, dir, out string) (err error) {
	parts := map[string][]byte{}
	for _, name := range []string{"boot.img", "core.img", "shimx64.efi", "grubx64.efi", "grub.cfg"} {
		if parts[name], err = os.ReadFile(filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	if err := patchGRUB(parts["boot.img"], parts["core.img"]); err != nil {
		return err
	}
	esp, err := newFAT("EFI", map[string][]byte{
		"EFI/BOOT/BOOTX64.EFI": parts["shimx64.efi"],
		"EFI/BOOT/GRUBX64.EFI": parts["grubx64.efi"],
		"EFI/DEBIAN/GRUB.CFG":  parts["grub.cfg"],
	})
	if err != nil {
		return err
	}
	root := filepath.Join(dir, "root.ext4")
	info, err := os.Stat(root)
	if err != nil {
		return err
	}
	raw := out + ".raw"
	defer func() { err = errors.Join(err, os.Remove(raw)) }()
	if err := writeDisk(raw, parts["boot.img"], parts["core.img"], esp, root, info.Size()); err != nil {
		return err
	}
	temporary := out + ".new"
	if err := run(ctx, nil, "qemu-img", "convert", "-q", "-f", "raw", "-O", "qcow2", raw, temporary); err != nil {
		return err
	}
	return os.Rename(temporary, out)
}
