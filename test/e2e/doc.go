// Package e2e uses a real supervisor the way a person does: through kubectl.
//
// The tests need root, QEMU and the built binary (build tag e2e); `make test`
// runs them. Without ATOLL_E2E_DATA_DIR they start a supervisor of their own in
// a fresh data directory and check at the end that `atoll down --purge` leaves
// nothing; with it they use the one that is running there.
package e2e
