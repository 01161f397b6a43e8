// Package cluster is how commands reach an API server with a person's own kubeconfig: which file that is, the client, and
// names for the completion of words.
//
// It keeps no connection and has no rights of its own. The packages of commands below internal/cli use it. What can go
// wrong: there is no kubeconfig, or it is not one; the errors say what to do about it.
package cluster

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/cli-runtime/pkg/genericclioptions"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// errNone is wrapped when there is nothing to talk to.
var errNone = errors.New("no cluster is known; is it up (`atoll status`), or does --kubeconfig name another one?")

// Flags are those of kubectl that say which cluster a command is for, and as whom.
type Flags struct {
	*genericclioptions.ConfigFlags
	// Getenv reads the environment.
	Getenv func(string) string
	// Kubeconfig is the file to use when neither flag nor environment names one; "" is kubectl's own default.
	Kubeconfig func() string
}

// AddFlags adds the flags to a command and those below it; namespaced is with the one for the namespace.
func (f *Flags) AddFlags(cmd *cobra.Command, namespaced bool) {
	all := genericclioptions.NewConfigFlags(true)
	f.ConfigFlags = &genericclioptions.ConfigFlags{
		Context: all.Context, KubeConfig: all.KubeConfig, Impersonate: all.Impersonate, ImpersonateGroup: all.ImpersonateGroup,
	}
	if namespaced {
		f.Namespace = all.Namespace
	}
	f.ConfigFlags.AddFlags(cmd.PersistentFlags())
}

// Config is what the flags and the environment say.
func (f *Flags) Config() (*rest.Config, error) {
	if *f.KubeConfig == "" && f.Getenv("KUBECONFIG") == "" {
		if file := f.Kubeconfig(); file != "" {
			f.KubeConfig = &file
		}
	}
	config, err := f.ToRESTConfig()
	if err != nil {
		return nil, fmt.Errorf("%w (%w)", errNone, err)
	}
	config.QPS = -1
	return config, nil
}

// ConfigOf reads a kubeconfig.
func ConfigOf(kubeconfig string) (*rest.Config, error) {
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return nil, fmt.Errorf("reading the kubeconfig: %w; is the cluster up (`atoll status`)?", err)
	}
	return config, nil
}

// Scheme has Kubernetes' own kinds and those that are added.
func Scheme(kinds ...func(*runtime.Scheme) error) (*runtime.Scheme, error) {
	scheme := runtime.NewScheme()
	for _, add := range append(kinds, clientgoscheme.AddToScheme) {
		if err := add(scheme); err != nil {
			return nil, err
		}
	}
	return scheme, nil
}

// Connect makes a client that knows the kinds of Scheme.
func Connect(config *rest.Config, kinds ...func(*runtime.Scheme) error) (client.WithWatch, error) {
	scheme, err := Scheme(kinds...)
	if err != nil {
		return nil, err
	}
	cl, err := client.NewWithWatch(config, client.Options{Scheme: scheme})
	if err != nil {
		return nil, fmt.Errorf("reaching the API server: %w", err)
	}
	return cl, nil
}

// Names are those of the objects that a list finds. A list that fails has none: there is nothing to propose then.
func Names(ctx context.Context, cl client.Reader, list client.ObjectList, options ...client.ListOption) []string {
	if cl.List(ctx, list, options...) != nil {
		return nil
	}
	var out []string
	_ = meta.EachListItem(list, func(o runtime.Object) error {
		if object, ok := o.(client.Object); ok {
			out = append(out, object.GetName())
		}
		return nil
	})
	return out
}

// Temporary tells whether the API server may answer soon.
func Temporary(err error) bool {
	return apierrors.IsTimeout(err) || apierrors.IsServerTimeout(err) || apierrors.IsTooManyRequests(err) || apierrors.IsServiceUnavailable(err) ||
		apierrors.IsInternalError(err)
}
