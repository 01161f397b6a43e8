package denied

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// ErrUnsupported says that the kernel has no nfnetlink_log.
var ErrUnsupported = errors.New("the kernel has no nfnetlink_log")

// Numbers of linux/netfilter/nfnetlink_log.h.
const (
	subsystem     = 4 << 8
	messagePacket = subsystem
	messageConfig = subsystem | 1

	configCommand = 1
	configMode    = 2
	configTimeout = 4
	commandBind   = 1
	copyPacket    = 2

	attributePayload = 9
	attributePrefix  = 10

	// headerLength is that of struct nfgenmsg: family, version, resource id.
	headerLength = 4
	copyBytes    = 128
	readBuffer   = 1 << 20
)

// receive hands over what is sent to a group, and calls tick now and then, from one goroutine, until ctx ends.
func receive(ctx context.Context, group uint16, every time.Duration, packet func(prefix string, payload []byte), tick func()) error {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return fmt.Errorf("opening netlink: %w", err)
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	// Losing some is better than an error for each that is lost.
	_ = conn.SetOption(netlink.NoENOBUFS, true)
	_ = conn.SetReadBuffer(readBuffer)
	mode := append(binary.BigEndian.AppendUint32(nil, copyBytes), copyPacket, 0)
	// One message: packets would come between the answers to several.
	err = configure(conn, group, []netlink.Attribute{
		{Type: configCommand, Data: []byte{commandBind}},
		{Type: configMode, Data: mode},
		{Type: configTimeout, Data: binary.BigEndian.AppendUint32(nil, 10)}, // hundredths of a second
	})
	if err != nil {
		return err
	}
	next := time.Now().Add(every)
	for ctx.Err() == nil {
		if err := conn.SetReadDeadline(next); err != nil {
			return fmt.Errorf("waiting for packets: %w", err)
		}
		if ctx.Err() != nil {
			return nil // the deadline of the end may just have been overwritten
		}
		messages, err := conn.Receive()
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			return fmt.Errorf("reading packets: %w", err)
		}
		for _, m := range messages {
			if prefix, payload, ok := parseMessage(m); ok {
				packet(prefix, payload)
			}
		}
		if !time.Now().Before(next) {
			tick()
			next = time.Now().Add(every)
		}
	}
	return nil
}

func configure(conn *netlink.Conn, group uint16, list []netlink.Attribute) error {
	attributes, err := netlink.MarshalAttributes(list)
	if err != nil {
		return fmt.Errorf("configuring: %w", err)
	}
	header := binary.BigEndian.AppendUint16([]byte{unix.AF_UNSPEC, 0}, group)
	_, err = conn.Execute(netlink.Message{
		Header: netlink.Header{Type: messageConfig, Flags: netlink.Request | netlink.Acknowledge},
		Data:   append(header, attributes...),
	})
	switch {
	case errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOENT):
		return fmt.Errorf("%w: %w", ErrUnsupported, err)
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("joining group %d: another process reads it: %w", group, err)
	case err != nil:
		return fmt.Errorf("configuring: %w", err)
	}
	return nil
}

// parseMessage finds prefix and payload in a message of the kernel.
func parseMessage(m netlink.Message) (prefix string, payload []byte, ok bool) {
	if m.Header.Type != messagePacket || len(m.Data) < headerLength {
		return "", nil, false
	}
	attributes, err := netlink.UnmarshalAttributes(m.Data[headerLength:])
	if err != nil {
		return "", nil, false
	}
	for _, a := range attributes {
		switch a.Type &^ (netlink.Nested | netlink.NetByteOrder) {
		case attributePayload:
			payload = a.Data
		case attributePrefix:
			prefix = string(a.Data)
			for i := range a.Data {
				if a.Data[i] == 0 {
					prefix = string(a.Data[:i])
					break
				}
			}
		}
	}
	return prefix, payload, prefix != "" && payload != nil
}
