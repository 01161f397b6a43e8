package disk

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"
)

// Places in GRUB's images, of grub-core/boot/i386/pc/boot.S and diskboot.S.
const (
	bootSectorField = 0x5c  // LBA of the core image
	bootDriveCheck  = 0x66  // a jump that trusts the BIOS's drive number
	coreStartField  = 0x1f4 // LBA of the core image's second sector
)

// grubImages makes the two parts of GRUB for a BIOS, for a core image at
// coreSector.
func (b *builder) grubImages(ctx context.Context, work string) (boot, core []byte, err error) {
	modules := filepath.Join(work, "i386-pc")
	if err := os.Mkdir(modules, 0o755); err != nil {
		return nil, nil, err
	}
	err = b.packages[grubBIOS].Walk(ctx, func(name string, r io.Reader) error {
		if path.Dir(name) != "usr/lib/grub/i386-pc" {
			return nil
		}
		data, err := io.ReadAll(r)
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(modules, path.Base(name)), data, 0o644)
	})
	if err != nil {
		return nil, nil, err
	}
	tool := filepath.Join(work, "grub-mkimage")
	program, err := b.one(ctx, grubTools, "usr/bin/grub-mkimage")
	if err != nil {
		return nil, nil, err
	}
	if err := os.WriteFile(tool, program, 0o755); err != nil {
		return nil, nil, err
	}
	script := filepath.Join(work, "grub.cfg")
	lines := fmt.Sprintf("linux ($root)/VMLINUZ %s\ninitrd ($root)/INITRD.IMG\nboot\n", b.recipe.Cmdline)
	if err := os.WriteFile(script, []byte(lines), 0o644); err != nil {
		return nil, nil, err
	}
	image := filepath.Join(work, "core.img")
	if err := run(ctx, nil, tool, "-d", modules, "-O", "i386-pc", "-p", "(,gpt2)/", "-c", script, "-o", image,
		"biosdisk", "part_gpt", "fat", "linux"); err != nil {
		return nil, nil, err
	}
	if core, err = os.ReadFile(image); err != nil {
		return nil, nil, err
	}
	if boot, err = os.ReadFile(filepath.Join(modules, "boot.img")); err != nil {
		return nil, nil, err
	}
	return boot, core, patchGRUB(boot, core)
}

// patchGRUB writes into the images where they are, as grub-bios-setup does.
func patchGRUB(boot, core []byte) error {
	if len(boot) != sectorSize || len(core) < 2*sectorSize {
		return errors.New("GRUB's images are not of the expected size")
	}
	if len(core) > (espSector-coreSector)*sectorSize {
		return fmt.Errorf("GRUB's core image of %d bytes is larger than its partition", len(core))
	}
	binary.LittleEndian.PutUint64(boot[bootSectorField:], coreSector)
	copy(boot[bootDriveCheck:], []byte{0x90, 0x90})
	binary.LittleEndian.PutUint64(core[coreStartField:], coreSector+1)
	return nil
}

// partitionName is a name in UTF-16, as GPT wants it.
func partitionName(name string) [72]byte {
	var out [72]byte
	for i, c := range strings.ToValidUTF8(name, "") {
		if 2*i+1 < len(out) {
			binary.LittleEndian.PutUint16(out[2*i:], uint16(c))
		}
	}
	return out
}
