// Package datastore is the controller of Datastore objects: each host's agent opens those that are for its
// host, and writes into their status how much room there is, how they are and which volumes they hold.
//
// It never touches a disk: that is the Host's, which the agent implements over internal/storage. It is called
// by the agent with the identity of its storage part. A Datastore that is being deleted is held by a
// finalizer until it has no volumes and snapshots; its directory stays.
//
// What can go wrong: a directory is not there, is another one, or does not answer. Then the condition Ready
// is False and says so, and it is tried again for as long as the object exists.
package datastore
