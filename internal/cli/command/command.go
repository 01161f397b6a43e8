// Package command is what commands of atoll have in common, whatever package they are in: where they print, which data
// directory they are for, how arguments are checked, and errors that say how atoll exits.
//
// It runs nothing. What can go wrong is the user's: every error of a wrong argument is a UsageError and says what there is.
package command

import (
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"atoll.dev/atoll/internal/cli/text"
	"atoll.dev/atoll/internal/datadir"
)

// App is what commands share.
type App struct {
	In          io.Reader
	Out, ErrOut io.Writer
	// Tree is the data directory that the flags name.
	Tree func() (datadir.Tree, error)
}

// Printf prints what there is to say. There is nobody to tell when the terminal is gone.
func (a App) Printf(format string, args ...any) { _, _ = fmt.Fprintf(a.Out, format, args...) }

// Tell writes for people, beside the output.
func (a App) Tell(format string, args ...any) { _, _ = fmt.Fprintf(a.ErrOut, format, args...) }

// Table prints rows in aligned columns; the first is the heading.
func (a App) Table(rows [][]string) { text.Table(a.Out, rows) }

// Structured prints v as JSON or YAML.
func (a App) Structured(format string, v any) error { return text.Structured(a.Out, format, v) }

// Terminal is the terminal that the command was called from, nil when it is none.
func (a App) Terminal() *os.File {
	f, ok := a.In.(*os.File)
	if !ok || !text.IsTerminal(f) {
		return nil
	}
	return f
}

// UsageError marks errors of the user's own making; atoll exits with 2.
type UsageError struct{ Err error }

// Error implements error.
func (e UsageError) Error() string { return e.Err.Error() }

// Unwrap implements errors.Unwrap.
func (e UsageError) Unwrap() error { return e.Err }

// SilentError is a failure that has been explained already.
type SilentError struct{ Err error }

// Error implements error.
func (e SilentError) Error() string { return e.Err.Error() }

// Unwrap implements errors.Unwrap.
func (e SilentError) Unwrap() error { return e.Err }

// Group is a command that only has commands.
func Group(use, short, example string, commands ...*cobra.Command) *cobra.Command {
	cmd := &cobra.Command{
		Use: use, Short: short, Example: example,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return nil
			}
			return Unknown(cmd, args[0])
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(commands...)
	return cmd
}

// Unknown says which commands there are.
func Unknown(cmd *cobra.Command, got string) error {
	var names []string
	for _, sub := range cmd.Commands() {
		if sub.IsAvailableCommand() {
			names = append(names, sub.Name())
		}
	}
	hint := ""
	for cmd.SuggestionsMinimumDistance = 1; cmd.SuggestionsMinimumDistance <= min(2, len(got)/2); cmd.SuggestionsMinimumDistance++ {
		if near := cmd.SuggestionsFor(got); len(near) > 0 {
			hint = fmt.Sprintf(" (did you mean %s?)", strings.Join(near, " or "))
			break
		}
	}
	return UsageError{Err: fmt.Errorf("unknown command %q%s\ncommands of %q: %s", got, hint, cmd.CommandPath(), strings.Join(names, " "))}
}

// NoArgs refuses positional arguments.
func NoArgs(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return UsageError{Err: fmt.Errorf("%q takes no arguments, got %q; see %q", cmd.CommandPath(), args[0], cmd.CommandPath()+" --help")}
	}
	return nil
}

// ExactArgs wants the named arguments.
func ExactArgs(names ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) != len(names) {
			return wants(cmd, args, names)
		}
		return nil
	}
}

// MoreArgs wants the named arguments, and takes more of the last.
func MoreArgs(names ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) < len(names) {
			return wants(cmd, args, append(slices.Clone(names[:len(names)-1]), names[len(names)-1]+"..."))
		}
		return nil
	}
}

// OptionalArg takes the named argument or none.
func OptionalArg(name string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) > 1 {
			return wants(cmd, args, []string{name})
		}
		return nil
	}
}

func wants(cmd *cobra.Command, args, names []string) error {
	return UsageError{Err: fmt.Errorf("%q wants <%s>, got %d arguments; see %q",
		cmd.CommandPath(), strings.Join(names, "> <"), len(args), cmd.CommandPath()+" --help")}
}

// OutputFlag adds -o with the formats a command knows, the first being the default.
func OutputFlag(cmd *cobra.Command, into *string, formats ...string) {
	cmd.Flags().StringVarP(into, "output", "o", formats[0], "output format: "+strings.Join(formats, ", "))
	if err := cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions(formats, cobra.ShellCompDirectiveNoFileComp)); err != nil {
		panic(err) // the line above defines it
	}
	cmd.PreRunE = func(*cobra.Command, []string) error {
		if !slices.Contains(formats, *into) {
			return UsageError{Err: fmt.Errorf("--output %q: use %s", *into, strings.Join(formats, ", "))}
		}
		return nil
	}
}
