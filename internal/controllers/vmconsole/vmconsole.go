// Package vmconsole answers VirtualMachineWebConsoleRequests: with the address of a virtual machine's screen, which
// holds a ticket that is good once and for two minutes, encrypted with the public key of who asked.
//
// The address is a websocket of the API server (internal/kube/subresources), wss://HOST/vm/web-console/stream?ticket=T;
// a browser opens https://HOST/vm/web-console/proxy?ticket=T. The ticket itself is kept nowhere, only its SHA-256 in
// an annotation. A request is deleted when it has expired, or some time later if it could not be answered.
//
// The kind has no conditions. What is wrong with a request is told by a warning event. The controllers' manager in
// the server calls Setup.
package vmconsole

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"net/url"
	"time"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/events"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"

	subresources "atoll.dev/atoll/api/subresources/v1alpha1"
)

const (
	// validFor is how long a ticket is good, as VM Operator's is.
	validFor = 120 * time.Second
	// keptFor is how long a request that cannot be answered stays, for people to see why.
	keptFor = 10 * time.Minute
	// lookEvery is how often it is tried again while the machine is not running.
	lookEvery = 2 * time.Second
	// minimumBits of a public key; less is no protection.
	minimumBits = 2048
	// maxKey is the longest PEM text that is read.
	maxKey = 16 << 10
	// labelLength is how much of the hash is in the label.
	labelLength = 40
	eventReason = "NoConsole"
)

// Reconciler answers requests.
type Reconciler struct {
	client.Client
	Events events.EventRecorder
	// Address is host and port at which people reach the API server.
	Address string
	// Now is the clock.
	Now func() time.Time
}

// Setup returns a function that adds the controller to a manager. The address is host and port at which people reach
// the API server.
func Setup(address string) func(ctrl.Manager) error {
	return func(mgr ctrl.Manager) error {
		r := &Reconciler{Client: mgr.GetClient(), Events: mgr.GetEventRecorder("virtualmachinewebconsolerequest"), Address: address, Now: time.Now}
		if err := ctrl.NewControllerManagedBy(mgr).Named("virtualmachinewebconsolerequest").For(&vmopv1.VirtualMachineWebConsoleRequest{}).Complete(r); err != nil {
			return fmt.Errorf("setting up the controller of VirtualMachineWebConsoleRequests: %w", err)
		}
		return nil
	}
}

// Reconcile answers a request once, and deletes it when its time is over.
func (r *Reconciler) Reconcile(ctx context.Context, req ctrl.Request) (ctrl.Result, error) {
	request := &vmopv1.VirtualMachineWebConsoleRequest{}
	if err := r.Get(ctx, req.NamespacedName, request); err != nil {
		return ctrl.Result{}, client.IgnoreNotFound(err)
	}
	if !request.DeletionTimestamp.IsZero() {
		return ctrl.Result{}, nil
	}
	end := request.CreationTimestamp.Add(keptFor)
	if !request.Status.ExpiryTime.IsZero() {
		end = request.Status.ExpiryTime.Time
	}
	if left := end.Sub(r.Now()); request.Status.Response != "" || left <= 0 {
		if left > 0 {
			return ctrl.Result{RequeueAfter: left}, nil
		}
		return ctrl.Result{}, client.IgnoreNotFound(r.Delete(ctx, request, client.Preconditions{UID: &request.UID}))
	}
	vm := &vmopv1.VirtualMachine{}
	err := r.Get(ctx, client.ObjectKey{Namespace: request.Namespace, Name: request.Spec.Name}, vm)
	switch {
	case apierrors.IsNotFound(err):
		r.complain(request, "there is no virtual machine %q in this namespace; correct spec.name in a new request", request.Spec.Name)
		return ctrl.Result{RequeueAfter: lookEvery}, nil
	case err != nil:
		return ctrl.Result{}, err
	case vm.Status.PowerState != vmopv1.VirtualMachinePowerStateOn:
		r.complain(request, "virtual machine %s is not powered on", vm.Name)
		return ctrl.Result{RequeueAfter: lookEvery}, nil
	}
	key, err := publicKey(request.Spec.PublicKey)
	if err != nil {
		r.complain(request, "spec.publicKey: %v", err)
		return ctrl.Result{RequeueAfter: end.Sub(r.Now())}, nil
	}
	return r.respond(ctx, request, vm, key)
}

func (r *Reconciler) complain(request *vmopv1.VirtualMachineWebConsoleRequest, format string, args ...any) {
	r.Events.Eventf(request, nil, corev1.EventTypeWarning, eventReason, "Answer", format, args...)
}

// publicKey reads an RSA key in PEM, as PKIX or PKCS 1.
func publicKey(text string) (*rsa.PublicKey, error) {
	if len(text) > maxKey {
		return nil, errors.New("it is too long for a key")
	}
	block, _ := pem.Decode([]byte(text))
	if block == nil {
		return nil, errors.New("it is not in PEM form (-----BEGIN PUBLIC KEY-----)")
	}
	var key *rsa.PublicKey
	if parsed, err := x509.ParsePKIXPublicKey(block.Bytes); err == nil {
		rsaKey, ok := parsed.(*rsa.PublicKey)
		if !ok {
			return nil, fmt.Errorf("it is a key of type %T, an RSA key is needed", parsed)
		}
		key = rsaKey
	} else if key, err = x509.ParsePKCS1PublicKey(block.Bytes); err != nil {
		return nil, errors.New("it holds no RSA public key")
	}
	if key.N.BitLen() < minimumBits {
		return nil, fmt.Errorf("it has %d bits, at least %d are needed", key.N.BitLen(), minimumBits)
	}
	return key, nil
}

// respond writes a ticket's hash first, and then the answer, so that no ticket is out that is not known.
func (r *Reconciler) respond(ctx context.Context, request *vmopv1.VirtualMachineWebConsoleRequest, vm *vmopv1.VirtualMachine, key *rsa.PublicKey) (ctrl.Result, error) {
	random := make([]byte, 24)
	if _, err := rand.Read(random); err != nil {
		return ctrl.Result{}, fmt.Errorf("making a ticket: %w", err)
	}
	ticket := base64.RawURLEncoding.EncodeToString(random)
	target := url.URL{Scheme: "wss", Host: r.Address, Path: subresources.WebConsoleStream, RawQuery: url.Values{subresources.TicketParameter: {ticket}}.Encode()}
	secret, err := rsa.EncryptOAEP(sha512.New(), rand.Reader, key, []byte(target.String()), nil)
	if err != nil {
		r.complain(request, "encrypting the answer, an address of %d characters: %v; use a longer key", len(target.String()), err)
		return ctrl.Result{RequeueAfter: keptFor}, nil
	}
	sum := sha256.Sum256([]byte(ticket))
	hash := hex.EncodeToString(sum[:])
	base := request.DeepCopy()
	metav1.SetMetaDataAnnotation(&request.ObjectMeta, subresources.TicketAnnotation, hash)
	metav1.SetMetaDataLabel(&request.ObjectMeta, subresources.TicketLabel, hash[:labelLength])
	if err := controllerutil.SetOwnerReference(vm, request, r.Scheme()); err != nil {
		return ctrl.Result{}, fmt.Errorf("owning the request: %w", err)
	}
	if err := r.Patch(ctx, request, client.MergeFromWithOptions(base, client.MergeFromWithOptimisticLock{})); err != nil {
		return ctrl.Result{}, client.IgnoreNotFound(err)
	}
	base = request.DeepCopy()
	request.Status = vmopv1.VirtualMachineWebConsoleRequestStatus{
		Response: base64.StdEncoding.EncodeToString(secret), ExpiryTime: metav1.NewTime(r.Now().Add(validFor)), ProxyAddr: r.Address,
	}
	if err := r.Status().Patch(ctx, request, client.MergeFrom(base)); err != nil {
		return ctrl.Result{}, client.IgnoreNotFound(err)
	}
	return ctrl.Result{RequeueAfter: validFor}, nil
}
