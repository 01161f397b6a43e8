package namespacebounds

import (
	"context"
	"errors"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apiserver/pkg/admission"
	"k8s.io/apiserver/pkg/admission/plugin/resourcequota"
	"k8s.io/kubernetes/plugin/pkg/admission/limitranger"
	"k8s.io/kubernetes/plugin/pkg/admission/security/podsecurity"
)

// Explain decorates upstream's plugins that enforce what a SupervisorNamespace expands into: their refusals name who can
// change the limit as well.
func Explain(source *Source) admission.Decorator {
	return admission.DecoratorFunc(func(handler admission.Interface, name string) admission.Interface {
		switch name {
		case resourcequota.PluginName, limitranger.PluginName, podsecurity.PluginName:
			return &explained{Interface: handler, source: source}
		}
		return handler
	})
}

// explained is a plugin whose refusals say more.
type explained struct {
	admission.Interface
	source *Source
}

var (
	_ admission.MutationInterface   = (*explained)(nil)
	_ admission.ValidationInterface = (*explained)(nil)
)

// Admit implements admission.MutationInterface.
func (e *explained) Admit(ctx context.Context, a admission.Attributes, o admission.ObjectInterfaces) error {
	m, ok := e.Interface.(admission.MutationInterface)
	if !ok {
		return nil
	}
	return e.explain(ctx, a, m.Admit(ctx, a, o))
}

// Validate implements admission.ValidationInterface.
func (e *explained) Validate(ctx context.Context, a admission.Attributes, o admission.ObjectInterfaces) error {
	v, ok := e.Interface.(admission.ValidationInterface)
	if !ok {
		return nil
	}
	return e.explain(ctx, a, v.Validate(ctx, a, o))
}

// explain adds to a refusal who can change what it comes of. Code, reason and text stay as they are.
func (e *explained) explain(ctx context.Context, a admission.Attributes, err error) error {
	status, ok := errors.AsType[*apierrors.StatusError](err)
	if !ok || !apierrors.IsForbidden(err) || !e.source.ready() {
		return err
	}
	b, lookup := e.source.of(ctx, a.GetNamespace())
	if lookup != nil || b == nil {
		return err
	}
	more := *status
	more.ErrStatus.Message += "; namespace \"" + b.Name + "\": " + who(b)
	return &more
}
