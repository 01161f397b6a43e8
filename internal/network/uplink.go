package network

import (
	"errors"
	"fmt"
	"os"

	"github.com/vishvananda/netlink"

	"atoll.dev/atoll/internal/linux/rtnl"
	"atoll.dev/atoll/internal/linux/tap"
)

// defaultVLAN is what a bridge puts a new port into.
const defaultVLAN = 1

// NewBridgeTap makes a tap called name (at most 15 bytes) on a bridge of this process's network namespace, untagged
// in a VLAN of the bridge, or with 0 in none. It has the MTU of the bridge, and goes away with the last copy of its
// file.
func NewBridgeTap(name, bridge string, vlan int) (_ *os.File, err error) {
	doing := fmt.Sprintf("joining bridge %s", bridge)
	s, err := rtnl.Open()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", doing, err)
	}
	defer s.Close()
	link, err := s.LinkByName(bridge)
	if err != nil {
		return nil, fmt.Errorf("%s: %w; make it on this host, or choose another in the Network", doing, err)
	}
	br, ok := link.(*netlink.Bridge)
	switch {
	case !ok:
		return nil, fmt.Errorf("%s: an interface of type %s has this name, it is no bridge", doing, link.Type())
	case vlan != 0 && (br.VlanFiltering == nil || !*br.VlanFiltering):
		return nil, fmt.Errorf("%s: VLAN %d is asked for and the bridge knows none; have an administrator run: ip link set %s type bridge vlan_filtering 1", doing, vlan, bridge)
	}
	f, err := tap.Open(name)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", doing, err)
	}
	if err := plug(s, name, br, vlan); err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", doing, err), f.Close())
	}
	return f, nil
}

// plug makes an interface a port of a bridge.
func plug(s *rtnl.Socket, name string, br *netlink.Bridge, vlan int) error {
	port, err := s.LinkByName(name)
	if err != nil {
		return err
	}
	if err := s.LinkSetMTU(port, br.Attrs().MTU); err != nil {
		return fmt.Errorf("setting MTU: %w", err)
	}
	if err := s.LinkSetMasterByIndex(port, br.Attrs().Index); err != nil {
		return fmt.Errorf("adding port: %w", err)
	}
	if vlan != 0 {
		if vlan != defaultVLAN {
			if err := s.BridgeVlanDel(port, defaultVLAN, true, true, false, true); err != nil {
				return fmt.Errorf("leaving VLAN %d: %w", defaultVLAN, err)
			}
		}
		if err := s.BridgeVlanAdd(port, uint16(vlan), true, true, false, true); err != nil {
			return fmt.Errorf("joining VLAN %d: %w", vlan, err)
		}
	}
	return s.LinkUp(port.Attrs().Index)
}
