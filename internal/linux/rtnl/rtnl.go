// Package rtnl adds to github.com/vishvananda/netlink the few requests it has
// no call for: several changes of an interface in one message, and interfaces
// that stay silent on IPv6.
//
// It is no netlink library of its own. Callers are internal/network and its
// packages.
//
// A Socket talks to the network namespace it was opened in, from any thread.
package rtnl

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	vnetns "github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/linux/netns"
)

// From linux/if_link.h.
const (
	iflaInet6AddrGenMode = 8
	addrGenModeNone      = 1
)

// Socket is a route netlink socket.
type Socket struct {
	*netlink.Handle
	raw map[int]*nl.SocketHandle
}

// Open returns a socket in the network namespace of the calling thread.
func Open() (*Socket, error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("opening netlink socket: %w", err)
	}
	s, err := nl.GetNetlinkSocketAt(vnetns.None(), vnetns.None(), unix.NETLINK_ROUTE)
	if err != nil {
		h.Close()
		return nil, fmt.Errorf("opening netlink socket: %w", err)
	}
	return &Socket{Handle: h, raw: map[int]*nl.SocketHandle{unix.NETLINK_ROUTE: {Socket: s}}}, nil
}

// OpenAt returns a socket in ns.
func OpenAt(ns *netns.NS) (*Socket, error) {
	var s *Socket
	err := ns.Do(func() (err error) {
		s, err = Open()
		return err
	})
	return s, err
}

// Close closes the socket.
func (s *Socket) Close() {
	s.Handle.Close()
	for _, r := range s.raw {
		r.Close()
	}
}

// Send sends a request of the given RTM type, made of parts, and waits for the
// kernel's acknowledgement.
func (s *Socket) Send(rtm, flags int, parts ...nl.NetlinkRequestData) error {
	req := nl.NewNetlinkRequest(rtm, unix.NLM_F_ACK|flags)
	req.Sockets = s.raw
	for _, p := range parts {
		req.AddData(p)
	}
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	return err
}

// LinkUp brings an interface up that makes no IPv6 address of its own: no
// duplicate address detection, router solicitation or multicast report leaves
// it.
func (s *Socket) LinkUp(index int) error {
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index = int32(index)
	spec := nl.NewRtAttr(unix.IFLA_AF_SPEC|unix.NLA_F_NESTED, nil)
	spec.AddRtAttr(unix.AF_INET6|unix.NLA_F_NESTED, nil).AddRtAttr(iflaInet6AddrGenMode, nl.Uint8Attr(addrGenModeNone))
	// Without IPv6 in the kernel there is nothing to silence.
	_ = s.Send(unix.RTM_SETLINK, 0, msg, spec)
	up := nl.NewIfInfomsg(unix.AF_UNSPEC)
	up.Index = int32(index)
	up.Flags, up.Change = unix.IFF_UP, unix.IFF_UP
	return s.Send(unix.RTM_SETLINK, 0, up)
}

// doomed is the link group DeleteLinks uses: nobody else's.
const doomed = 0x61746c6c

// DeleteLinks deletes interfaces all at once, which takes the kernel hardly
// longer than one. Those that are gone already are no error.
func (s *Socket) DeleteLinks(indices []int) error {
	group := func() *nl.RtAttr { return nl.NewRtAttr(unix.IFLA_GROUP, nl.Uint32Attr(doomed)) }
	marked := 0
	for _, i := range indices {
		msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
		msg.Index = int32(i)
		err := s.Send(unix.RTM_SETLINK, 0, msg, group())
		if errors.Is(err, unix.ENODEV) {
			continue
		}
		if err != nil {
			return fmt.Errorf("grouping interfaces: %w", err)
		}
		marked++
	}
	if marked == 0 {
		return nil
	}
	if err := s.Send(unix.RTM_DELLINK, 0, nl.NewIfInfomsg(unix.AF_UNSPEC), group()); err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("deleting interfaces: %w", err)
	}
	return nil
}

// Index returns the index of an interface of the calling thread's namespace,
// without the dump of all interfaces that package net makes. The error is
// unix.ENODEV when there is none.
func Index(name string) (int, error) {
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return 0, fmt.Errorf("finding interface %q: %w", name, err)
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("finding interface %q: %w", name, err)
	}
	defer unix.Close(fd)
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFINDEX, ifr); err != nil {
		return 0, fmt.Errorf("finding interface %q: %w", name, err)
	}
	return int(ifr.Uint32()), nil
}
