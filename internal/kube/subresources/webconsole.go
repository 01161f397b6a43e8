package subresources

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	_ "embed"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"net/http"
	"regexp"
	"strings"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	subresources "atoll.dev/atoll/api/subresources/v1alpha1"
)

// pageHTML is the web console's only page. NONCE stands for a number that is new each time.
//
//go:embed page.html
var pageHTML string

// clientScript is noVNC, see novnc/README.md.
//
//go:embed novnc/novnc.js
var clientScript string

// labelLength is how much of the hash is in a label, which has room for 63 characters.
const labelLength = 40

func webConsoleRequests() schema.GroupVersionResource {
	return schema.GroupVersionResource{Group: "vmoperator.vmware.com", Version: "v1alpha5", Resource: "virtualmachinewebconsolerequests"}
}

// page serves the page. It holds nothing secret: the ticket is in its address and goes on with the websocket.
func (s *streams) page(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		w.Header().Set("Allow", "GET, HEAD")
		http.Error(w, "only GET is possible", http.StatusMethodNotAllowed)
		return
	}
	nonce := base64.RawStdEncoding.EncodeToString([]byte(rand.Text()))
	h := w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Content-Security-Policy", "default-src 'none'; script-src 'nonce-"+nonce+"'; style-src 'unsafe-inline'; img-src data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Referrer-Policy", "no-referrer")
	h.Set("Cache-Control", "no-store")
	if r.Method == http.MethodHead {
		return
	}
	_, _ = w.Write([]byte(strings.NewReplacer("NONCE", nonce, "/*CLIENT*/", clientScript).Replace(pageHTML)))
}

// ticket opens the screen that a ticket is for.
func (s *streams) ticket(w http.ResponseWriter, r *http.Request) {
	select {
	case s.looking <- struct{}{}:
	default:
		w.Header().Set("Retry-After", "1")
		http.Error(w, "too many requests", http.StatusTooManyRequests)
		return
	}
	request, err := s.redeem(r.Context(), r.URL.Query().Get(subresources.TicketParameter))
	<-s.looking
	if err != nil {
		if !errors.Is(err, errTicket) {
			s.log.Warn("a ticket of a web console cannot be looked up", "error", err)
		}
		http.Error(w, errTicket.Error(), http.StatusForbidden)
		return
	}
	name, _, _ := unstructured.NestedString(request.Object, "spec", "name")
	pod, err := s.pod(r.Context(), request.GetNamespace(), name)
	if err != nil {
		http.Error(w, err.Error(), http.StatusConflict)
		return
	}
	s.log.Info("web console opened", "namespace", pod.Namespace, "virtualMachine", pod.Name, "request", request.GetName(), "from", r.RemoteAddr)
	s.serve(w, r, pod, machinev1.StreamVNC)
}

// errTicket tells nothing about why.
var errTicket = errors.New("the ticket is unknown, has expired or was used already; make a new VirtualMachineWebConsoleRequest")

// redeem finds the request that a ticket is of and marks it as used.
func (s *streams) redeem(ctx context.Context, ticket string) (*unstructured.Unstructured, error) {
	if !regexp.MustCompile(`^[A-Za-z0-9_-]{20,64}$`).MatchString(ticket) {
		return nil, errTicket
	}
	sum := sha256.Sum256([]byte(ticket))
	hash := hex.EncodeToString(sum[:])
	list, err := s.objects.Resource(webConsoleRequests()).List(ctx, metav1.ListOptions{LabelSelector: subresources.TicketLabel + "=" + hash[:labelLength]})
	if err != nil {
		return nil, err
	}
	for i := range list.Items {
		o := &list.Items[i]
		have := o.GetAnnotations()[subresources.TicketAnnotation]
		if subtle.ConstantTimeCompare([]byte(have), []byte(hash)) != 1 || o.GetAnnotations()[subresources.TicketUsedAnnotation] != "" || o.GetDeletionTimestamp() != nil {
			continue
		}
		text, _, _ := unstructured.NestedString(o.Object, "status", "expiryTime")
		if until, err := time.Parse(time.RFC3339, text); err != nil || !time.Now().Before(until) {
			continue
		}
		annotations := o.GetAnnotations()
		annotations[subresources.TicketUsedAnnotation] = time.Now().UTC().Format(time.RFC3339)
		o.SetAnnotations(annotations)
		// The version that was read goes along: of two who come at once one is refused.
		used, err := s.objects.Resource(webConsoleRequests()).Namespace(o.GetNamespace()).Update(ctx, o, metav1.UpdateOptions{})
		if apierrors.IsConflict(err) || apierrors.IsNotFound(err) {
			continue
		}
		return used, err
	}
	return nil, errTicket
}
