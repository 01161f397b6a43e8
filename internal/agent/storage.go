package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/client-go/tools/clientcmd"

	controller "atoll.dev/atoll/internal/controllers/datastore"
	encryptioncontroller "atoll.dev/atoll/internal/controllers/encryption"
	"atoll.dev/atoll/internal/datadir/pki"
	sidecars "atoll.dev/atoll/internal/kube/csi"
	kubekeys "atoll.dev/atoll/internal/kube/keys"
	"atoll.dev/atoll/internal/kube/machines"
	"atoll.dev/atoll/internal/kube/podruntimes"
	"atoll.dev/atoll/internal/storage/csi"
	"atoll.dev/atoll/internal/storage/csi/export"
	"atoll.dev/atoll/internal/storage/csi/node"
	"atoll.dev/atoll/internal/storage/datastore/keys"
	"atoll.dev/atoll/internal/storage/stores"
)

func quantity(n int64) resource.Quantity { return *resource.NewQuantity(n, resource.BinarySI) }

// runStorage runs the CSI driver of this host, the controller that opens its datastores, and the sidecars.
// It has an identity of its own, which may do more with volumes and less with everything else than the
// node's.
func (a *Agent) runStorage(ctx context.Context) error {
	kubeconfig := a.files.Kubeconfig(pki.Storage)
	client, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return fmt.Errorf("configuring storage: %w", err)
	}
	client.QPS, client.Burst, client.UserAgent = 50, 100, "atoll-datastores"
	secrets, err := kubekeys.New(client)
	if err != nil {
		return fmt.Errorf("configuring storage: %w", err)
	}
	set, wrapper := &stores.Set{}, keys.Wrapper{Source: secrets}
	objects, err := controller.New(controller.Config{
		Client: client, Node: a.cfg.NodeName, Logger: a.cfg.Logger,
		Host: &datastores{set: set, keys: wrapper},
	})
	if err != nil {
		return fmt.Errorf("configuring storage: %w", err)
	}
	classes, err := encryptioncontroller.New(encryptioncontroller.Config{
		Client: client, Node: a.cfg.NodeName, Logger: a.cfg.Logger, Host: &encryption{set: set, keys: wrapper},
	})
	if err != nil {
		return fmt.Errorf("configuring storage: %w", err)
	}
	dir := filepath.Join(a.cfg.KubeletDir, "plugins", csi.Name)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("configuring storage: %w", err)
	}
	socket := filepath.Join(dir, "csi.sock")
	runtimes, err := podruntimes.New(client)
	if err != nil {
		return fmt.Errorf("configuring storage: %w", err)
	}
	vms, err := machines.New(client, a.cfg.NodeName)
	if err != nil {
		return fmt.Errorf("configuring storage: %w", err)
	}
	pictures, err := a.images(client, set)
	if err != nil {
		return fmt.Errorf("configuring storage: %w", err)
	}
	local, err := node.New(node.Config{
		Node: a.cfg.NodeName, Stores: set, Kubelet: a.cfg.KubeletDir, RunDir: a.cfg.RunDir, MicroVM: runtimes.MicroVM, MayUse: vms.MayUse,
		Export: export.New(export.Config{Dir: filepath.Join(a.cfg.RunDir, "exports")}), Logger: a.cfg.Logger,
	})
	if err != nil {
		return fmt.Errorf("configuring storage: %w", err)
	}
	driver, err := csi.New(csi.Config{
		Version: a.cfg.Version, Node: a.cfg.NodeName, Stores: set, Open: local, NodeService: local, Socket: socket, Logger: a.cfg.Logger,
		Encryption: secrets.Claim, Images: pictures.store,
		OnChange: func() {
			objects.Touch()
			classes.Touch()
		},
	})
	if err != nil {
		return fmt.Errorf("configuring storage: %w", err)
	}
	return together(ctx,
		objects.Run,
		classes.Run,
		local.Run,
		driver.Run,
		pictures.items.Run,
		pictures.rollbacks.Run,
		func(ctx context.Context) error {
			return sidecars.Run(ctx, sidecars.Config{
				Kubeconfig: kubeconfig, Driver: csi.Name, Socket: socket, Node: a.cfg.NodeName, TopologyKey: csi.TopologyKey,
				RegistryDir: filepath.Join(a.cfg.KubeletDir, "plugins_registry"), Logger: a.cfg.Logger,
			})
		},
	)
}

// together runs all until ctx ends or one fails, which ends the others.
func together(ctx context.Context, run ...func(context.Context) error) error {
	running, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	var wg sync.WaitGroup
	for _, r := range run {
		wg.Go(func() {
			if err := r(running); err != nil {
				fail(err)
			}
		})
	}
	wg.Wait()
	if ctx.Err() != nil {
		return nil
	}
	if err := context.Cause(running); err != nil {
		return err
	}
	return errors.New("storage ended by itself")
}
