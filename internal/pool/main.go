package pool

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"

	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/pool/config"
)

// Main is the pool as a process: "atoll-pod pool --config <file>".
func Main(args []string) int {
	f := flag.NewFlagSet("pool", flag.ContinueOnError)
	name := f.String("config", "", "configuration file, JSON")
	if err := f.Parse(args); err != nil {
		return 2
	}
	slog.SetDefault(slog.New(slog.NewTextHandler(os.Stderr, nil)))
	ctx, cancel := signal.NotifyContext(context.Background(), unix.SIGTERM, unix.SIGINT)
	defer cancel()
	if err := run(ctx, *name); err != nil && !errors.Is(err, context.Canceled) {
		fmt.Fprintf(os.Stderr, "pool: %v\n", err)
		return 1
	}
	return 0
}

func run(ctx context.Context, name string) error {
	cfg, err := config.Load(name)
	if err != nil {
		return err
	}
	p, err := New(cfg, nil)
	if err != nil {
		return err
	}
	return p.Run(ctx)
}
