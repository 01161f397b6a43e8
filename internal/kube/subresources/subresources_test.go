package subresources

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	gwebsocket "github.com/gorilla/websocket"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/sets"
	apirequest "k8s.io/apiserver/pkg/endpoints/request"
	genericapiserver "k8s.io/apiserver/pkg/server"
	dynamicfake "k8s.io/client-go/dynamic/fake"
	"k8s.io/client-go/kubernetes/fake"
	"k8s.io/client-go/rest"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	subresources "atoll.dev/atoll/api/subresources/v1alpha1"
)

// server is the API server as far as the streams see it.
type server struct {
	*testing.T
	*streams
	*httptest.Server
}

func newServer(t *testing.T, objects ...runtime.Object) *server {
	t.Helper()
	s, err := newStreams(Config{Loopback: &rest.Config{}, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	var pods, others []runtime.Object
	for _, o := range objects {
		if _, ok := o.(*corev1.Pod); ok {
			pods = append(pods, o)
		} else {
			others = append(others, o)
		}
	}
	s.client = fake.NewClientset(pods...)
	s.objects = dynamicfake.NewSimpleDynamicClientWithCustomListKinds(runtime.NewScheme(), map[schema.GroupVersionResource]string{webConsoleRequests(): "VirtualMachineWebConsoleRequestList"}, others...)
	s.exec = func(_ context.Context, _, pod string, kind machinev1.StreamKind, conn io.ReadWriter) error {
		if _, err := io.WriteString(conn, string(kind)+" of "+pod+"\n"); err != nil {
			return err
		}
		buf := make([]byte, 100)
		n, err := conn.Read(buf)
		if err != nil {
			return nil
		}
		if string(buf[:n]) == "fail" {
			return errors.New("the guest is gone")
		}
		_, err = conn.Write([]byte(strings.ToUpper(string(buf[:n]))))
		return err
	}
	infos := &apirequest.RequestInfoFactory{APIPrefixes: sets.NewString("api", "apis"), GrouplessAPIPrefixes: sets.NewString("api")}
	mux := http.NewServeMux()
	mux.HandleFunc("/apis/"+subresources.Group+"/"+subresources.Version+"/", s.stream)
	mux.HandleFunc("/apis/"+subresources.Group+"/"+subresources.Version, s.resources)
	mux.HandleFunc("/apis/"+subresources.Group, s.group)
	mux.HandleFunc(subresources.WebConsolePage, s.page)
	mux.HandleFunc(subresources.WebConsoleStream, s.ticket)
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		info, err := infos.NewRequestInfo(r)
		if err != nil {
			t.Error(err)
		}
		mux.ServeHTTP(w, r.WithContext(apirequest.WithRequestInfo(r.Context(), info)))
	}))
	t.Cleanup(web.Close)
	return &server{t, s, web}
}

// machine is the pod of a virtual machine called box.
func machine(change ...func(*corev1.Pod)) *corev1.Pod {
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: "team", Name: "box", Labels: map[string]string{machinev1.UIDLabel: "vm-uid"},
			OwnerReferences: []metav1.OwnerReference{{Kind: "VirtualMachine", Name: "box", UID: "vm-uid", Controller: new(true)}},
		},
		Spec:   corev1.PodSpec{RuntimeClassName: new(machinev1.RuntimeClass)},
		Status: corev1.PodStatus{Phase: corev1.PodRunning},
	}
	for _, c := range change {
		c(p)
	}
	return p
}

// dial opens a websocket; an answer that is none is returned as text.
func (s *server) dial(path string) (*gwebsocket.Conn, string) {
	s.Helper()
	d := gwebsocket.Dialer{Subprotocols: []string{subresources.ProtocolBinary}}
	conn, resp, err := d.DialContext(s.Context(), "ws"+strings.TrimPrefix(s.URL, "http")+path, nil)
	if err == nil {
		s.Cleanup(func() { _ = conn.Close() })
		return conn, ""
	}
	if resp == nil {
		s.Fatal(err)
	}
	body, _ := io.ReadAll(resp.Body)
	return nil, resp.Status + ": " + string(body)
}

func (s *server) talk(conn *gwebsocket.Conn, say string) (first, second string, err error) {
	s.Helper()
	_, a, err := conn.ReadMessage()
	if err != nil {
		s.Fatal(err)
	}
	if err := conn.WriteMessage(gwebsocket.BinaryMessage, []byte(say)); err != nil {
		s.Fatal(err)
	}
	_, b, err := conn.ReadMessage()
	if err == nil {
		_, _, err = conn.ReadMessage()
	}
	return string(a), string(b), err
}

func TestStreams(t *testing.T) {
	s := newServer(t, machine())
	for stream, kind := range map[string]string{subresources.VNC: "vnc", subresources.Console: "serial"} {
		conn, answer := s.dial(subresources.Path("team", "box", stream))
		if conn == nil {
			t.Fatal(answer)
		}
		first, second, err := s.talk(conn, "hello")
		if first != kind+" of box\n" || second != "HELLO" || !gwebsocket.IsCloseError(err, gwebsocket.CloseNormalClosure) || conn.Subprotocol() != subresources.ProtocolBinary {
			t.Errorf("%s: %q, %q, %v, %q", stream, first, second, err, conn.Subprotocol())
		}
	}
	conn, _ := s.dial(subresources.Path("team", "box", subresources.VNC))
	if _, _, err := s.talk(conn, "fail"); !gwebsocket.IsCloseError(err, gwebsocket.CloseInternalServerErr) || !strings.Contains(err.Error(), "the guest is gone") {
		t.Errorf("a stream that fails: %v", err)
	}
}

// TestOnlyMachines: a pod that only has the name is none.
func TestOnlyMachines(t *testing.T) {
	for name, change := range map[string]func(*corev1.Pod){
		"another runtime": func(p *corev1.Pod) { p.Spec.RuntimeClassName = new("atoll") },
		"no runtime":      func(p *corev1.Pod) { p.Spec.RuntimeClassName = nil },
		"no label":        func(p *corev1.Pod) { p.Labels = nil },
		"no owner":        func(p *corev1.Pod) { p.OwnerReferences = nil },
		"another owner":   func(p *corev1.Pod) { p.OwnerReferences[0].UID = "x" },
		"pending":         func(p *corev1.Pod) { p.Status.Phase = corev1.PodPending },
	} {
		s := newServer(t, machine(change))
		if _, answer := s.dial(subresources.Path("team", "box", subresources.VNC)); !strings.HasPrefix(answer, "409") {
			t.Errorf("%s: %q", name, answer)
		}
	}
}

func TestPaths(t *testing.T) {
	s := newServer(t, machine())
	base := "/apis/" + subresources.Group + "/" + subresources.Version
	for path, want := range map[string]string{
		base + "/namespaces/team/virtualmachines/box/reboot": "404", base + "/namespaces/team/virtualmachines/box": "404",
		base + "/namespaces/team/virtualmachines": "404", base + "/namespaces/team/pods/box/vnc": "404", base + "/namespaces/team/virtualmachines/none/vnc": "409",
		base + "/namespaces/team/virtualmachines/box/vnc/more": "404", base + "/virtualmachines/box/vnc": "404",
	} {
		if _, answer := s.dial(path); !strings.HasPrefix(answer, want) || !strings.Contains(answer, `"kind":"Status"`) {
			t.Errorf("%s: %q", path, answer)
		}
	}
	for path, want := range map[string]string{base: `"resources":[]`, "/apis/" + subresources.Group: `"preferredVersion"`} {
		resp, err := http.Get(s.URL + path)
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if resp.StatusCode != http.StatusOK || !strings.Contains(string(body), want) {
			t.Errorf("%s: %s, %s", path, resp.Status, body)
		}
	}
}

func TestLongRunning(t *testing.T) {
	cfg := &genericapiserver.Config{LongRunningFunc: func(r *http.Request, _ *apirequest.RequestInfo) bool { return r.URL.Path == "/watch" }}
	LongRunning(cfg)
	stream := &apirequest.RequestInfo{IsResourceRequest: true, APIGroup: subresources.Group, Subresource: subresources.VNC}
	for path, want := range map[string]bool{"/watch": true, "/other": false, subresources.WebConsoleStream: true, subresources.WebConsolePage: false} {
		if got := cfg.LongRunningFunc(httptest.NewRequest(http.MethodGet, path, nil), &apirequest.RequestInfo{}); got != want {
			t.Errorf("%s: %v", path, got)
		}
	}
	if !cfg.LongRunningFunc(httptest.NewRequest(http.MethodGet, "/other", nil), stream) {
		t.Error("a stream is cut off")
	}
}

const goodTicket = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"

func request(change ...func(*unstructured.Unstructured)) *unstructured.Unstructured {
	sum := sha256.Sum256([]byte(goodTicket))
	hash := hex.EncodeToString(sum[:])
	o := &unstructured.Unstructured{Object: map[string]any{
		"spec": map[string]any{"name": "box"}, "status": map[string]any{"expiryTime": time.Now().Add(time.Minute).Format(time.RFC3339)},
	}}
	o.SetGroupVersionKind(schema.GroupVersionKind{Group: "vmoperator.vmware.com", Version: "v1alpha5", Kind: "VirtualMachineWebConsoleRequest"})
	o.SetNamespace("team")
	o.SetName("look")
	o.SetLabels(map[string]string{subresources.TicketLabel: hash[:labelLength]})
	o.SetAnnotations(map[string]string{subresources.TicketAnnotation: hash})
	for _, c := range change {
		c(o)
	}
	return o
}

func TestTicket(t *testing.T) {
	s := newServer(t, machine(), request())
	conn, answer := s.dial(subresources.WebConsoleStream + "?ticket=" + goodTicket)
	if conn == nil {
		t.Fatal(answer)
	}
	if first, _, _ := s.talk(conn, "hello"); first != "vnc of box\n" {
		t.Errorf("%q", first)
	}
	if _, answer := s.dial(subresources.WebConsoleStream + "?ticket=" + goodTicket); !strings.HasPrefix(answer, "403") {
		t.Errorf("a second time: %q", answer)
	}
}

func TestBadTickets(t *testing.T) {
	for name, change := range map[string]func(*unstructured.Unstructured){
		"expired": func(o *unstructured.Unstructured) {
			_ = unstructured.SetNestedField(o.Object, time.Now().Add(-time.Second).Format(time.RFC3339), "status", "expiryTime")
		},
		"no expiry": func(o *unstructured.Unstructured) { delete(o.Object, "status") },
		"other hash": func(o *unstructured.Unstructured) {
			o.SetAnnotations(map[string]string{subresources.TicketAnnotation: "x"})
		},
		"used": func(o *unstructured.Unstructured) {
			a := o.GetAnnotations()
			a[subresources.TicketUsedAnnotation] = "now"
			o.SetAnnotations(a)
		},
		"other ticket": func(o *unstructured.Unstructured) { o.SetLabels(nil) },
	} {
		s := newServer(t, machine(), request(change))
		if _, answer := s.dial(subresources.WebConsoleStream + "?ticket=" + goodTicket); !strings.HasPrefix(answer, "403") {
			t.Errorf("%s: %q", name, answer)
		}
	}
	s := newServer(t, request())
	for _, ticket := range []string{"", "short", strings.Repeat("A", 1000), "AAAAAAAAAAAAAAAAAAAAAAAAA%2C%21%3D"} {
		if _, answer := s.dial(subresources.WebConsoleStream + "?ticket=" + ticket); !strings.HasPrefix(answer, "403") {
			t.Errorf("%q: %q", ticket, answer)
		}
	}
	if _, answer := s.dial(subresources.WebConsoleStream + "?ticket=" + goodTicket); !strings.HasPrefix(answer, "409") {
		t.Errorf("of a machine that is off: %q", answer)
	}
}

func TestPage(t *testing.T) {
	s := newServer(t)
	resp, err := http.Get(s.URL + subresources.WebConsolePage + "?ticket=x")
	if err != nil {
		t.Fatal(err)
	}
	body, _ := io.ReadAll(resp.Body)
	_ = resp.Body.Close()
	policy := resp.Header.Get("Content-Security-Policy")
	_, nonce, _ := strings.Cut(policy, "'nonce-")
	nonce, _, _ = strings.Cut(nonce, "'")
	if len(nonce) < 20 || strings.Count(string(body), nonce) != 1 || strings.Contains(string(body), "/*CLIENT*/") || !strings.Contains(string(body), "sendCtrlAltDel") ||
		strings.Contains(string(body), "https://") && strings.Contains(string(body), "src=\"http") {
		t.Errorf("policy %q, page of %d bytes", policy, len(body))
	}
	if resp, err = http.Post(s.URL+subresources.WebConsolePage, "text/plain", nil); err != nil || resp.StatusCode != http.StatusMethodNotAllowed {
		t.Errorf("%v, %v", resp, err)
	}
	_ = resp.Body.Close()
}
