package command

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

// tree is `atoll`, with `atoll image ls <name>...` and the like below it.
func tree(args cobra.PositionalArgs) *cobra.Command {
	leaf := func(name string, aliases ...string) *cobra.Command {
		var output string
		cmd := &cobra.Command{Use: name, Aliases: aliases, Args: args, RunE: func(*cobra.Command, []string) error { return nil }}
		OutputFlag(cmd, &output, "table", "json")
		return cmd
	}
	hidden := leaf("secret")
	hidden.Hidden = true
	root := Group("atoll", "", "", Group("image", "", "", leaf("load"), leaf("ls", "list"), leaf("rm"), leaf("pull"), leaf("push"), hidden))
	root.SilenceErrors, root.SilenceUsage = true, true
	root.CompletionOptions.DisableDefaultCmd = true
	return root
}

func TestWrongUsage(t *testing.T) {
	t.Parallel()
	const commands = "\ncommands of \"atoll image\": load ls pull push rm"
	for _, c := range []struct {
		args  cobra.PositionalArgs
		typed string
		want  string // "" is no error
	}{
		{NoArgs, "image", ""},
		{NoArgs, "image lod", `unknown command "lod" (did you mean load?)` + commands},
		{NoArgs, "image pulsh", `unknown command "pulsh" (did you mean push?)` + commands},
		{NoArgs, "image pusl", `unknown command "pusl" (did you mean pull or push?)` + commands},
		{NoArgs, "image pul", `unknown command "pul" (did you mean pull?)` + commands},
		{NoArgs, "image rn", `unknown command "rn" (did you mean rm?)` + commands},
		{NoArgs, "image x", `unknown command "x"` + commands},
		{NoArgs, "image secre", `unknown command "secre"` + commands},
		{NoArgs, "imag", `unknown command "imag" (did you mean image?)`},

		{NoArgs, "image ls", ""},
		{NoArgs, "image list", ""},
		{NoArgs, "image ls -o json", ""},
		{NoArgs, "image ls -o xml", `--output "xml": use table, json`},
		{NoArgs, "image ls a", `"atoll image ls" takes no arguments, got "a"; see "atoll image ls --help"`},

		{ExactArgs("vm", "snapshot"), "image ls a b", ""},
		{ExactArgs("vm", "snapshot"), "image ls a", `"atoll image ls" wants <vm> <snapshot>, got 1 arguments; see "atoll image ls --help"`},
		{ExactArgs("vm", "snapshot"), "image ls a b c", `wants <vm> <snapshot>, got 3 arguments`},

		{MoreArgs("group", "user"), "image ls a b", ""},
		{MoreArgs("group", "user"), "image ls a b c", ""},
		{MoreArgs("group", "user"), "image ls a", `wants <group> <user...>, got 1 arguments`},
		{OptionalArg("vm"), "image ls", ""},
		{OptionalArg("vm"), "image ls a", ""},
		{OptionalArg("vm"), "image ls a b", `wants <vm>, got 2 arguments`},
	} {
		root := tree(c.args)
		root.SetOut(&bytes.Buffer{})
		root.SetArgs(strings.Fields(c.typed))
		err := root.Execute()
		if c.want == "" {
			if err != nil {
				t.Errorf("atoll %s: %v", c.typed, err)
			}
			continue
		}
		if _, usage := errors.AsType[UsageError](err); !usage || !strings.Contains(err.Error(), c.want) {
			t.Errorf("atoll %s: %v is not the usage error %q", c.typed, err, c.want)
		}
	}
}
