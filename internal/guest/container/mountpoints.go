package container

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// credentialsDir is where the credentials of a pod's service account are mounted.
const credentialsDir = "/var/run/secrets/kubernetes.io/serviceaccount"

// MountPoints is a directory with what nearly every container mounts something on. It lies below the image
// in the overlay: where an image lacks a mount point it would have to be made in the writable layer, with a
// copy of the directories above, on a disk, while the container starts.
type MountPoints string

// Make makes the directories.
func (m MountPoints) Make() error {
	dirs := []string{m.usual("proc"), m.usual("sys"), m.usual("dev"), m.usual("etc"), m.credentials(credentialsDir)}
	for _, dir := range dirs {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return fmt.Errorf("making mount points: %w", err)
		}
	}
	for _, name := range []string{"hosts", "hostname", "resolv.conf"} {
		if err := os.WriteFile(m.usual("etc/"+name), nil, 0o644); err != nil {
			return fmt.Errorf("making mount points: %w", err)
		}
	}
	return nil
}

func (m MountPoints) usual(name string) string { return filepath.Join(string(m), "usual", name) }

func (m MountPoints) credentials(name string) string {
	return filepath.Join(string(m), "credentials", name)
}

// below are the directories to put below the image of a container with these mounts.
func (m MountPoints) below(mounts []specs.Mount) []string {
	dirs := []string{m.usual("")}
	for _, mount := range mounts {
		if strings.HasPrefix(mount.Destination, credentialsDir) {
			return append(dirs, m.credentials(""))
		}
	}
	return dirs
}
