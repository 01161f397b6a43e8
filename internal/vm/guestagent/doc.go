// Package guestagent is a client of the QEMU guest agent, which a guest runs to be asked how it is, to run
// commands and to have its file systems frozen.
//
// The agent is at the other end of a virtio-serial port, of which this package has the host's end as a
// connection. It opens nothing and starts nothing, and knows no machine. The shim of virtual machines
// uses it, through package hardware.
//
// The agent is the guest's, so every answer is hostile: length, depth and time are bounded, text is cleaned
// of control characters and cut, and nothing here waits for a guest in which no agent runs longer than its
// context says. What can go wrong: ErrNoAgent when nothing answers in time, ErrAnswer when an answer makes no
// sense, Error when the agent refuses.
package guestagent
