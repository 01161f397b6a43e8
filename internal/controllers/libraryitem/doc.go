// Package libraryitem is the controller of the content of library items: each host's agent brings in the items that
// are its own, and writes into their status how far they are and what they turned out to be.
//
// An item without a host gets the first one whose agent takes it (one that has the volume, if it is made from one);
// the name is in status.host from then on. The bytes are the Host's, which the agent implements over
// internal/storage. What is made of a finished item, an image, is internal/controllers/image's, in the server.
//
// What can go wrong: a source fails for a while, which is tried again for as long as the item exists; or it is none,
// the checksum is wrong, or the content no image, which is said in the condition Ready and not tried again.
package libraryitem
