// Command testclock waits for the clock of its machine to be set, for the integration tests of
// package guest: what the shim does on the host, in a machine whose clock a test may set.
package main

import (
	"fmt"
	"os"
	"time"

	"atoll.dev/atoll/internal/linux/wallclock"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// run says what it does and what it sees, until it is killed.
func run() error {
	timer, err := wallclock.New()
	if err != nil {
		return err
	}
	if err := timer.Arm(time.Hour); err != nil {
		return err
	}
	fmt.Println("armed")
	for {
		stepped, err := timer.Wait()
		if err != nil {
			return err
		}
		if err := timer.Arm(time.Hour); err != nil {
			return err
		}
		fmt.Println("stepped", stepped, time.Now().UTC().Year())
	}
}
