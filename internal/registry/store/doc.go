// Package store is the disk of the registry: the filesystem driver of distribution, with what that lacks.
//
// What it adds: the bytes of each project are counted and bounded while they come in; a disk that fills refuses uploads
// before the rest of the host suffers; renames are synced, so that a link on disk has its blob; and what nobody uses is
// collected while the registry serves. It knows nothing of HTTP or of rights. internal/registry gives it a quota per
// project, and reads from the Request of a context why something was refused.
//
// Collection is safe beside pushes without a time in which nothing may be written: whoever looks at a blob or a link
// makes it young (its modification time), and only what was older than a grace period when the collection began is
// removed, under the lock of its digest and after another look at its age. The push of a manifest that is under way
// counts as the beginning. So a client that was told that a layer is there has the grace period to push the manifest
// that refers to it, and one that comes later is told that the layer is missing.
//
// What can go wrong: the disk fails or is full. What cannot be read ends a collection before it removes anything that
// might need it. A kill leaves uploads, temporary files and blobs without a link, which the next collection removes, and
// never a link whose blob was not there.
package store
