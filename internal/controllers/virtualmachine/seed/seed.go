// Package seed gives the controller of VirtualMachines the files of seed disks: it
// reads the Secrets and ConfigMaps that a VirtualMachine refers to, and has package
// bootstrap render them.
//
// The server wires it into the controller. It keeps nothing. What is wrong with a
// specification is an error that says so to the user; an error of the API server
// is passed on as it is.
package seed

import (
	"context"
	"errors"
	"fmt"
	"maps"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime/schema"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"atoll.dev/atoll/internal/controllers/virtualmachine"
	"atoll.dev/atoll/internal/controllers/virtualmachine/bootstrap"
)

// Setup is virtualmachine.Setup with a Renderer.
func Setup(hooks virtualmachine.Hooks) func(ctrl.Manager) error {
	return func(mgr ctrl.Manager) error {
		hooks.Bootstrap = Renderer{Reader: mgr.GetAPIReader()}
		return virtualmachine.Setup(hooks)(mgr)
	}
}

// Renderer makes seeds. It implements virtualmachine.Bootstrap.
type Renderer struct {
	// Reader reads past any cache: Secrets of all namespaces are not to be kept.
	Reader client.Reader
}

// Render returns the files. An object that is missing is a NotFound error.
func (r Renderer) Render(ctx context.Context, in virtualmachine.BootstrapInput) (*virtualmachine.Seed, error) {
	data := map[string]map[string][]byte{}
	for _, reference := range bootstrap.References(in.VM) {
		content, err := r.read(ctx, in.VM.Namespace, reference.Name)
		if err != nil {
			return nil, err
		}
		if content != nil {
			data[reference.Name] = content
		}
	}
	input := bootstrap.Input{VM: in.VM, Data: data, Hostname: in.Hostname, Domain: in.Domain, NICs: in.NICs, LastInstanceID: in.LastInstanceID}
	if in.Image != nil {
		input.Properties = in.Image.OVFProperties
	}
	out, err := bootstrap.Render(input)
	if wrong := (*bootstrap.Error)(nil); errors.As(err, &wrong) && wrong.Reason == bootstrap.ReasonNotFound {
		notFound := apierrors.NewNotFound(schema.GroupResource{Resource: "secrets"}, "")
		notFound.ErrStatus.Message = wrong.Error()
		return nil, notFound
	}
	if err != nil {
		return nil, err
	}
	return &virtualmachine.Seed{Label: out.Label, Files: out.Files, InstanceID: out.InstanceID, Notes: out.Notes}, nil
}

// read returns the data of a Secret, else of a ConfigMap, nil if there is neither.
func (r Renderer) read(ctx context.Context, namespace, name string) (map[string][]byte, error) {
	key := client.ObjectKey{Namespace: namespace, Name: name}
	var secret corev1.Secret
	err := r.Reader.Get(ctx, key, &secret)
	if err == nil {
		return secret.Data, nil
	}
	if !apierrors.IsNotFound(err) {
		return nil, fmt.Errorf("reading Secret %s: %w", name, err)
	}
	var config corev1.ConfigMap
	err = r.Reader.Get(ctx, key, &config)
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading ConfigMap %s: %w", name, err)
	}
	out := make(map[string][]byte, len(config.Data)+len(config.BinaryData))
	for key, text := range config.Data {
		out[key] = []byte(text)
	}
	maps.Copy(out, config.BinaryData)
	return out, nil
}
