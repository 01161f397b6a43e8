// Package supervisornamespace is the controller of SupervisorNamespaces: it makes a Namespace of each and what bounds it,
// keeps that as it is to be, and says what is used.
//
// What there is to be is in package expand, once package resolve has taken the template into account; the effective spec
// is written into the status before anything else is done, since admission and the registry go by it. Objects are applied
// server-side as field manager "atoll-supervisor-namespace". All of them have a label, by which they are watched, so that
// drift is put right at once, and by which those are found that are not wanted any more. Nothing is ever evicted: what is
// above a lowered limit is named in the condition WithinLimits.
//
// The controller has an identity and a cache of its own (system:atoll:namespace-controller): it may write roles and
// namespaces, which the controllers of virtual machines have no use for. Of pods it keeps only what they ask for.
//
// A SupervisorNamespace whose Namespace exists already takes it over only with atoll.AdoptAnnotation. A Namespace with
// atoll.TemplateAnnotation, which the webhook of package selfservice sets when an owner has made one with kubectl, gets a
// SupervisorNamespace. A plain Namespace is left alone.
//
// Deletion waits until nothing is in the Namespace, or does not if atoll.DeleteContentsAnnotation says so, and says in
// the condition Deleting what it waits for; see package deletion.
//
// The server role runs it, in the manager of package manager. What can go wrong: the API server refuses an object; the
// condition Ready says which and why, and it is tried again.
package supervisornamespace
