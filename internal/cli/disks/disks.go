// Package disks is the commands about what volumes are kept on: atoll datastore, volume, storage and encryption.
//
// They ask the API server through internal/cli/storage and internal/cli/encryption, with the kubeconfig of the
// environment or the administrator's of the data directory; what is about images reads the datastores of this host
// itself, as root. What can go wrong: the cluster does not answer (then only this host is looked at, and that is said),
// and whatever the images have.
package disks

import (
	"github.com/spf13/cobra"

	"atoll.dev/atoll/internal/cli/command"
)

// app is what the commands share.
type app struct{ command.App }

// Commands are all of them.
func Commands(shared command.App) []*cobra.Command {
	a := &app{App: shared}
	return []*cobra.Command{a.datastoreCommand(), a.volumeCommand(), a.storageCommand(), a.encryptionCommand()}
}
