package admission

import (
	"context"

	admissionv1 "k8s.io/api/admission/v1"
	"k8s.io/apimachinery/pkg/runtime"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/webhook/admission"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
)

// mutatePath is where the API server asks for defaults of SupervisorNamespaces.
const mutatePath = "/mutate-atoll-dev-v1alpha1-supervisornamespace"

// defaults serves the defaults of SupervisorNamespaces.
func (w *Webhook) defaults(mgr ctrl.Manager) {
	mgr.GetWebhookServer().Register(mutatePath, &admission.Webhook{Handler: readable{
		next: admission.WithDefaulter(mgr.GetScheme(), w).Handler, decoder: admission.NewDecoder(mgr.GetScheme()),
	}})
}

// readable leaves what cannot be read, such as memoryLimit: lots, to the schema, which the API server looks at next and
// which names the field. What the schema takes and nobody can read all the same, the validation refuses.
type readable struct {
	next    admission.Handler
	decoder admission.Decoder
}

// Handle implements admission.Handler.
func (h readable) Handle(ctx context.Context, req admission.Request) admission.Response {
	if req.Operation != admissionv1.Delete {
		if err := h.decoder.DecodeRaw(runtime.RawExtension{Raw: req.Object.Raw}, &atoll.SupervisorNamespace{}); err != nil {
			return admission.Allowed("")
		}
	}
	return h.next.Handle(ctx, req)
}
