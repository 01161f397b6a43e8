package image

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// compiler builds the programs of a recipe. Outputs stay in dir, so that the
// go command can skip the link when nothing changed.
type compiler struct {
	dir    string // of the outputs
	recipe string // directory of the recipe
}

// place is the output file of a program, by everything that names it.
func (c compiler) place(parts ...string) string {
	sum := sha256.Sum256([]byte(strings.Join(parts, "\x00")))
	return filepath.Join(c.dir, hex.EncodeToString(sum[:8]))
}

// buildGo links a Go program and returns the path of the binary.
func (c compiler) buildGo(ctx context.Context, program GoProgram) (string, error) {
	dir, err := filepath.Abs(filepath.Join(c.recipe, program.Module))
	if err != nil {
		return "", fmt.Errorf("locating go module: %w", err)
	}
	ldflags := strings.Join(append([]string{"-s", "-w"}, program.LDFlags...), " ")
	out := c.place("go", dir, program.Package, ldflags)
	cmd := exec.CommandContext(ctx, "go", "build", "-buildvcs=false", "-ldflags", ldflags, "-o", out, program.Package)
	cmd.Dir = dir
	// With its work directory beside the output, the go command puts the output
	// in place by a rename, which another build of the same program survives.
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64", "GOTMPDIR="+c.dir)
	if _, err := output(cmd); err != nil {
		return "", fmt.Errorf("building %s: %w", program.Package, err)
	}
	return out, nil
}

// buildC compiles a C program and returns the path of the binary.
func (c compiler) buildC(ctx context.Context, program CProgram) (string, error) {
	source, err := filepath.Abs(filepath.Join(c.recipe, program.Source))
	if err != nil {
		return "", fmt.Errorf("locating C source: %w", err)
	}
	out := c.place(append([]string{"c", source}, program.Flags...)...)
	temporary := fmt.Sprintf("%s.%d", out, os.Getpid())
	args := append([]string{"-static", "-Os", "-s", "-Wall", "-o", temporary, source}, program.Flags...)
	if _, err := output(exec.CommandContext(ctx, "gcc", args...)); err != nil {
		return "", fmt.Errorf("compiling %s: %w", program.Source, err)
	}
	if err := os.Rename(temporary, out); err != nil {
		return "", fmt.Errorf("compiling %s: %w", program.Source, err)
	}
	return out, nil
}

// moduleDir returns where the sources of a module of the recipe's go.mod are.
func (c compiler) moduleDir(ctx context.Context, module string) (string, error) {
	cmd := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}", "--", module)
	cmd.Dir = c.recipe
	dir, err := output(cmd)
	if err != nil {
		return "", fmt.Errorf("locating module %s: %w", module, err)
	}
	dir = bytes.TrimSpace(dir)
	if len(dir) == 0 {
		return "", fmt.Errorf("locating module %s: it is not in the module cache; run: go mod download %s", module, module)
	}
	return string(dir), nil
}
