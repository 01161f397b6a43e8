package vmconsole

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"net/url"
	"strings"
	"testing"
	"time"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/tools/events"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"

	subresources "atoll.dev/atoll/api/subresources/v1alpha1"
)

type world struct {
	*testing.T
	*Reconciler
	now    time.Time
	events *events.FakeRecorder
}

func pemOf(t *testing.T, key any) string {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))
}

func rsaKey(t *testing.T, bits int) *rsa.PrivateKey {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, bits)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func newWorld(t *testing.T, key, vm string, power vmopv1.VirtualMachinePowerState) *world {
	t.Helper()
	scheme := runtime.NewScheme()
	if err := vmopv1.AddToScheme(scheme); err != nil {
		t.Fatal(err)
	}
	now := time.Now().Truncate(time.Second)
	c := fake.NewClientBuilder().WithScheme(scheme).WithStatusSubresource(&vmopv1.VirtualMachineWebConsoleRequest{}).WithObjects(
		&vmopv1.VirtualMachine{ObjectMeta: metav1.ObjectMeta{Namespace: "team", Name: vm, UID: "vm-uid"}, Status: vmopv1.VirtualMachineStatus{PowerState: power}},
		&vmopv1.VirtualMachineWebConsoleRequest{
			ObjectMeta: metav1.ObjectMeta{Namespace: "team", Name: "look", UID: "request-uid", CreationTimestamp: metav1.NewTime(now)},
			Spec:       vmopv1.VirtualMachineWebConsoleRequestSpec{Name: "box", PublicKey: key},
		}).Build()
	w := &world{T: t, now: now, events: events.NewFakeRecorder(10)}
	w.Reconciler = &Reconciler{Client: c, Events: w.events, Address: "192.0.2.1:6443", Now: func() time.Time { return w.now }}
	return w
}

func (w *world) run() (*vmopv1.VirtualMachineWebConsoleRequest, ctrl.Result) {
	w.Helper()
	key := client.ObjectKey{Namespace: "team", Name: "look"}
	result, err := w.Reconcile(w.Context(), ctrl.Request{NamespacedName: key})
	if err != nil {
		w.Fatal(err)
	}
	request := &vmopv1.VirtualMachineWebConsoleRequest{}
	if err := w.Get(w.Context(), key, request); apierrors.IsNotFound(err) {
		return nil, result
	} else if err != nil {
		w.Fatal(err)
	}
	return request, result
}

func TestTicket(t *testing.T) {
	key := rsaKey(t, 2048)
	w := newWorld(t, pemOf(t, key.Public()), "box", vmopv1.VirtualMachinePowerStateOn)
	request, result := w.run()
	if request == nil || request.Status.ProxyAddr != "192.0.2.1:6443" || !request.Status.ExpiryTime.Time.Equal(w.now.Add(2*time.Minute)) || result.RequeueAfter != validFor {
		t.Fatalf("%+v, %+v", request, result)
	}
	secret, err := base64.StdEncoding.DecodeString(request.Status.Response)
	if err != nil {
		t.Fatal(err)
	}
	text, err := rsa.DecryptOAEP(sha512.New(), nil, key, secret, nil)
	if err != nil {
		t.Fatal(err)
	}
	target, err := url.Parse(string(text))
	if err != nil || target.Scheme != "wss" || target.Host != "192.0.2.1:6443" || target.Path != subresources.WebConsoleStream {
		t.Fatalf("%s, %v", text, err)
	}
	ticket := target.Query().Get(subresources.TicketParameter)
	sum := sha256.Sum256([]byte(ticket))
	if hash := hex.EncodeToString(sum[:]); request.Annotations[subresources.TicketAnnotation] != hash || !strings.HasPrefix(hash, request.Labels[subresources.TicketLabel]) || len(ticket) < 32 {
		t.Errorf("ticket %q, %v, %v", ticket, request.Annotations, request.Labels)
	}
	if len(request.OwnerReferences) != 1 || request.OwnerReferences[0].UID != "vm-uid" {
		t.Errorf("owners %+v", request.OwnerReferences)
	}
	// It is answered once only, and goes when it has expired.
	again, _ := w.run()
	if again.Status.Response != request.Status.Response {
		t.Error("answered twice")
	}
	w.now = w.now.Add(validFor)
	if left, _ := w.run(); left != nil {
		t.Errorf("not deleted: %+v", left)
	}
}

func TestNotAnswered(t *testing.T) {
	good := pemOf(t, rsaKey(t, 2048).Public())
	curve, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tests := map[string]struct {
		key, vm, say string
		power        vmopv1.VirtualMachinePowerState
	}{
		"no machine": {good, "other", `no virtual machine "box"`, vmopv1.VirtualMachinePowerStateOn},
		"off":        {good, "box", "not powered on", vmopv1.VirtualMachinePowerStateOff},
		"no pem":     {"xyz", "box", "not in PEM form", vmopv1.VirtualMachinePowerStateOn},
		"short":      {pemOf(t, rsaKey(t, 1024).Public()), "box", "1024 bits", vmopv1.VirtualMachinePowerStateOn},
		"curve":      {pemOf(t, curve.Public()), "box", "RSA key is needed", vmopv1.VirtualMachinePowerStateOn},
		"garbage":    {"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "box", "no RSA public key", vmopv1.VirtualMachinePowerStateOn},
		"huge":       {strings.Repeat("x", 1<<20), "box", "too long", vmopv1.VirtualMachinePowerStateOn},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, tt.key, tt.vm, tt.power)
			request, result := w.run()
			if request == nil || request.Status.Response != "" || result.RequeueAfter == 0 {
				t.Fatalf("%+v, %+v", request, result)
			}
			if said := <-w.events.Events; !strings.Contains(said, tt.say) {
				t.Errorf("said %q", said)
			}
			w.now = w.now.Add(keptFor)
			if left, _ := w.run(); left != nil {
				t.Error("not deleted")
			}
		})
	}
}
