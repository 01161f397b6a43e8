package cli

import (
	"errors"
	"fmt"
	"path/filepath"

	"github.com/spf13/cobra"

	"atoll.dev/atoll/internal/assets"
	"atoll.dev/atoll/internal/preflight"
	"atoll.dev/atoll/internal/vm/podkernel"
)

// kernelFlag is the flag by which a user chooses the pod kernel.
func kernelFlag(cmd *cobra.Command, kernel *string) {
	cmd.Flags().StringVar(kernel, "kernel", "",
		`kernel image that pods run on, such as Debian's cloud kernel, with its modules in ../lib/modules or /lib/modules (default "": the built-in kernel)`)
}

// chosenKernel is the absolute path of the kernel of the flag if that was given, and else the one
// remembered.
func chosenKernel(cmd *cobra.Command, remembered, flag string) (string, error) {
	switch {
	case !cmd.Flags().Changed("kernel"):
		return remembered, nil
	case flag == "":
		return "", nil
	}
	path, err := filepath.Abs(flag)
	if err != nil {
		return "", fmt.Errorf("finding the kernel %s: %w", flag, err)
	}
	return path, nil
}

// checkPodKernel looks at the kernel that pods are to run on: a file, or the built-in one for "".
func checkPodKernel(name string) preflight.Result {
	r := preflight.Result{Name: "pod kernel", Level: preflight.OK, Detail: "the built-in one"}
	if name == "" {
		set, err := assets.Embedded()
		if err != nil {
			return r // a binary without any guest files is refused by those who need them
		}
		if _, err := set.Entry(assets.Kernel); err != nil {
			r.Level, r.Detail = preflight.Fail, "this atoll was built without a pod kernel"
			r.Fix = "name one with --kernel, for example Debian's: apt-get install linux-image-cloud-amd64"
		}
		return r
	}
	k, err := podkernel.Find(name)
	if err != nil {
		r.Level, r.Detail = preflight.Fail, err.Error()
		if e, ok := errors.AsType[*podkernel.Error](err); ok {
			r.Detail, r.Fix = e.What, e.Fix
		}
		return r
	}
	r.Detail = k.Release + ", " + k.Path
	if k.Modules != "" {
		r.Detail += ", modules in " + k.Modules
	}
	if !k.Checked {
		r.Level = preflight.Info
		r.Detail += "; what it was built with is not known, since there is no config-" + k.Release + " beside it"
	}
	return r
}
