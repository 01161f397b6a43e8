package hardware

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
)

// DefaultFirmwareDir is where Debian's package ovmf puts EFI.
const DefaultFirmwareDir = "/usr/share/OVMF"

// maxNVRAM bounds a template of EFI's variables. That of OVMF's 4 MiB build has 528 KiB.
const maxNVRAM = 4 << 20

// Firmware is EFI for a virtual machine.
type Firmware struct {
	Code string // path of the program
	Vars string // path of the variables that a new machine begins with
}

// FindFirmware finds EFI in a directory, with or without Secure Boot. The variables for Secure Boot have the
// keys of Microsoft, by which the loaders of Windows and the distributions are signed. The error wraps
// ErrFirmware.
func FindFirmware(dir string, secureBoot bool) (Firmware, error) {
	fw := Firmware{Code: filepath.Join(dir, "OVMF_CODE_4M.fd"), Vars: filepath.Join(dir, "OVMF_VARS_4M.fd")}
	if secureBoot {
		fw = Firmware{Code: filepath.Join(dir, "OVMF_CODE_4M.secboot.fd"), Vars: filepath.Join(dir, "OVMF_VARS_4M.ms.fd")}
	}
	for _, name := range []string{fw.Code, fw.Vars} {
		if _, err := os.Stat(name); err != nil {
			return Firmware{}, fmt.Errorf("%w: install the package ovmf: %w", ErrFirmware, err)
		}
	}
	return fw, nil
}

// CreateNVRAM fills an empty file with the variables that a new machine begins with, and flushes it.
func CreateNVRAM(f *os.File, fw Firmware) error {
	const doing = "making the variables of the firmware"
	src, err := os.Open(fw.Vars)
	if err != nil {
		return fmt.Errorf("%s: %w: %w", doing, ErrFirmware, err)
	}
	defer src.Close()
	n, err := io.Copy(f, io.LimitReader(src, maxNVRAM))
	if err == nil && n == 0 {
		err = fmt.Errorf("%w: %s is empty", ErrFirmware, fw.Vars)
	}
	if err == nil {
		err = f.Sync()
	}
	if err != nil {
		return fmt.Errorf("%s: %w", doing, err)
	}
	return nil
}
