// Package server is the server role: etcd, kube-apiserver (with the
// AtollPodRuntime admission plugin and the resource metrics API),
// kube-controller-manager and kube-scheduler in one process, and the bootstrap
// objects of the cluster.
//
// It is not the node: kubelet, proxy and DNS are internal/agent. It is called
// by the command line (`atoll server`) with a Config; Run holds until its
// context ends or a component fails, and a failed component ends the process so
// that the supervisor restarts all of them together. Upstream Kubernetes keeps
// process-wide state (feature gates, metrics registries), so one process runs
// at most one server, once.
//
// What can go wrong: a busy port, a full disk, damaged etcd data. All end Run
// with an error that names the thing; damaged data is never replaced.
package server
