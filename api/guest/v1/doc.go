// Package guestv1 is the protocol between the shim on the host and the init of a micro-VM: ttrpc
// messages and service stubs generated from guest.proto, whose head comment describes the
// transport. It holds no logic. The shim is the client, internal/guest the server; the framing
// around it is in internal/guest/channel.
//
// What a guest answers is written by the user's code as far as the host is concerned: check it.
package guestv1

//go:generate ./generate.sh
