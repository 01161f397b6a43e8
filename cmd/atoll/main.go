// Command atoll is the shipped binary: the supervisor of a host, the roles it
// runs, and the command line to all of it. What it does is in internal/cli.
package main

import (
	"os"

	"atoll.dev/atoll/internal/cli"
)

// version is set by the linker from git.
var version = "unknown"

func main() {
	os.Exit(cli.Main(version, os.Args[1:]))
}
