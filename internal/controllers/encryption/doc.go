// Package encryption is the controller of EncryptionClass objects: each host's agent sees to it that the
// keys of the volumes on its datastores are wrapped with the key that their class names, and writes into the
// class's status whether that key can be used and how far the volumes are.
//
// It also follows claims: a claim that names another class by its annotation has its volume's key wrapped with
// that one's key. It touches neither volumes nor keys itself; that is the Host's, which the agent implements
// over internal/storage. It is called by the agent with the identity of its storage part.
//
// What can go wrong: a provider or a key is missing or is another one. Then the conditions are False and say
// which, and it is tried again for as long as the object exists. Classes that are no objects (Secrets that a
// StorageClass names) are kept up to date as well, and have nowhere to say so but the log.
package encryption
