// Package registry is the OCI registry of the cluster: distribution as a library behind the portal, with a project per
// namespace.
//
// The first element of a repository's name is its project, which is the namespace of that name; library is the project
// that every identity may pull from. A namespace without a SupervisorNamespace is a project, too, with no quota: rights
// decide, not the object. Nothing is served to anonymous clients.
//
// Clients log in as Docker's token specification says: the token service takes Basic credentials (a person's password or
// session token, a robot account, a service account token for the audience registry.atoll.local), asks the API server
// what the identity may do with each repository it names, and returns a token of a minute. The token alone opens nothing:
// at each request the rights are asked for again (answers are kept for some seconds), and robot accounts are looked up as
// well as users, their sessions and groups, so that what is taken away ends at once.
//
// It is not a proxy of other registries: mirrors are configured on the hosts (internal/registry/hosts). The server role
// makes it and gives its Handler to the portal. Paths it answers are /v2/... and /registry/...
//
// What can go wrong: the API server does not answer (503, and the client tries again), the disk is full (507 with a
// message), a quota is reached (403 DENIED with a message), too much comes at the same time (429).
package registry
