// Command testinit is guest init alone, for the integration tests of package guest: the same code
// that atoll-pod runs as process 1, without the rest of atoll-pod.
package main

import (
	"os"

	"atoll.dev/atoll/internal/guest"
)

func main() { os.Exit(guest.Main()) }
