// Package subresourcesv1alpha1 names the streams of virtual machines that the API server serves beside their objects.
//
// They are GET requests that become websockets, at
//
//	/apis/subresources.atoll.dev/v1alpha1/namespaces/NAMESPACE/virtualmachines/NAME/console
//	/apis/subresources.atoll.dev/v1alpha1/namespaces/NAMESPACE/virtualmachines/NAME/vnc
//
// Each binary message is a piece of the stream: what the serial port says, and the RFB protocol. Who may do it is
// said by RBAC: the verb get on virtualmachines/console and virtualmachines/vnc of the group. The package holds
// names only.
package subresourcesv1alpha1

import "path"

// The group and its version.
const (
	Group   = "subresources.atoll.dev"
	Version = "v1alpha1"
)

// The resource and its streams.
const (
	Resource = "virtualmachines"
	Console  = "console"
	VNC      = "vnc"
)

// Protocols of the websockets. ProtocolBinary is what browsers ask for.
const (
	Protocol       = "stream.atoll.dev"
	ProtocolBinary = "binary"
)

// Paths of the web console, which are open to everybody with a ticket of a VirtualMachineWebConsoleRequest.
const (
	WebConsolePage   = "/vm/web-console/proxy"
	WebConsoleStream = "/vm/web-console/stream"
	// TicketParameter carries the ticket.
	TicketParameter = "ticket"
	// TicketLabel of a VirtualMachineWebConsoleRequest is the start of its ticket's SHA-256 in hex, TicketAnnotation
	// the whole. TicketUsedAnnotation says when the ticket was used; a second time it does not work.
	TicketLabel          = "atoll.dev/ticket"
	TicketAnnotation     = "atoll.dev/ticket-sha256"
	TicketUsedAnnotation = "atoll.dev/ticket-used"
)

// Path of a stream.
func Path(namespace, name, stream string) string {
	return path.Join("/apis", Group, Version, "namespaces", namespace, Resource, name, stream)
}
