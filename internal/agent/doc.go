// Package agent is the agent role: kubelet, kube-proxy (nftables) and CoreDNS
// in one process.
//
// It is not the container runtime (that is a process of its own, so that pods
// and their shims survive an agent restart) and not the control plane. It is
// called by the command line (`atoll agent`) with a Config; Run holds until its
// context ends or a component fails. The agent keeps retrying while the API
// server or the runtime is away. Upstream code keeps process-wide state, so one
// process runs at most one agent, once.
package agent
