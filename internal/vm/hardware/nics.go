package hardware

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/vm/block"
	"atoll.dev/atoll/internal/vm/qmp"
)

// ErrNoNIC is wrapped when a machine has no such network interface.
var ErrNoNIC = errors.New("no such network interface")

// AddNIC adds a network interface. ErrHotPlug for models that are not PCI Express. The tap may be closed once it has
// returned.
func (m *Machine) AddNIC(ctx context.Context, n machinev1.NIC, tap *os.File) error {
	m.devices.Lock()
	defer m.devices.Unlock()
	if err := m.addNIC(ctx, n, tap); err != nil {
		return fmt.Errorf("adding network interface %q: %w", n.Name, err)
	}
	return nil
}

func (m *Machine) addNIC(ctx context.Context, n machinev1.NIC, tap *os.File) error {
	if !nameForm.MatchString(n.Name) {
		return bad("nics", "the name %q is no DNS label", n.Name)
	}
	if err := checkNIC(n, tap); err != nil {
		return err
	}
	if !express(n.Model) {
		return fmt.Errorf("%w: a network interface of model %s; use virtio-net-pci, e1000e or vmxnet3", ErrHotPlug, n.Model)
	}
	for _, other := range m.machine.NICs {
		if other.Name == n.Name || other.MAC == n.MAC {
			return fmt.Errorf("there is one with this name or MAC address already: %q", other.Name)
		}
	}
	if len(m.machine.NICs) >= maxNICs {
		return bad("nics", "a machine has at most %d", maxNICs)
	}
	ctx, cancel := m.graph.WithPatience(ctx)
	defer cancel()
	port, err := m.shape.takePort(nicID(n.Name))
	if err != nil {
		return err
	}
	// One of an attempt that went wrong half way may be there.
	if err := m.dropNetdev(ctx, n.Name); err != nil {
		return err
	}
	err = m.do(
		ctx, "plugging",
		qmp.Command{Name: "getfd", Args: map[string]any{"fdname": "tap"}, File: tap},
		qmp.Command{Name: "netdev_add", Args: map[string]any{"type": "tap", "id": netID(n.Name), "fd": "tap"}},
		qmp.Command{Name: "device_add", Args: nicDevice(n, 0, false).behind(port)},
	)
	if err != nil {
		delete(m.shape.Ports, nicID(n.Name))
		return errors.Join(err, m.dropNetdev(ctx, n.Name))
	}
	m.machine.NICs = append(m.machine.NICs, n)
	return nil
}

// RemoveNIC takes a network interface away, if the guest lets go of it: ErrUnplug as with RemoveDisk. ErrNoNIC if
// there is no such interface.
func (m *Machine) RemoveNIC(ctx context.Context, name string) error {
	m.devices.Lock()
	defer m.devices.Unlock()
	if err := m.removeNIC(ctx, name); err != nil {
		return fmt.Errorf("removing network interface %q: %w", name, err)
	}
	return nil
}

func (m *Machine) removeNIC(ctx context.Context, name string) error {
	i := slices.IndexFunc(m.machine.NICs, func(n machinev1.NIC) bool { return n.Name == name })
	if i < 0 {
		return ErrNoNIC
	}
	if model := m.machine.NICs[i].Model; !express(model) {
		return fmt.Errorf("%w: a network interface of model %s; power the machine off", ErrHotPlug, model)
	}
	if err := m.unplug(ctx, nicID(name)); err != nil {
		return err
	}
	ctx, cancel := m.graph.WithPatience(ctx)
	defer cancel()
	if err := m.dropNetdev(ctx, name); err != nil {
		return err
	}
	delete(m.shape.Ports, nicID(name))
	m.machine.NICs = slices.Delete(m.machine.NICs, i, i+1)
	return nil
}

// dropNetdev closes the tap of a network interface. One that is not there is fine.
func (m *Machine) dropNetdev(ctx context.Context, name string) error {
	err := m.do(ctx, "closing the tap", qmp.Command{Name: "netdev_del", Args: map[string]any{"id": netID(name)}})
	if block.Missing(err) {
		return nil
	}
	return err
}
