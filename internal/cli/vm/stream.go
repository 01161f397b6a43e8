package vm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/transport/spdy"
	"k8s.io/client-go/transport/websocket"
	streamhttp "k8s.io/streaming/pkg/httpstream"

	subresources "atoll.dev/atoll/api/subresources/v1alpha1"
	"atoll.dev/atoll/internal/kube/subresources/socket"
)

// running reads a virtual machine that must be powered on.
func (s *session) running(ctx context.Context, name string) (*vmopv1.VirtualMachine, error) {
	vm, err := s.machine(ctx, name)
	if err != nil {
		return nil, err
	}
	if vm.Status.PowerState != vmopv1.VirtualMachinePowerStateOn {
		return nil, fmt.Errorf("virtual machine %s is %s; `atoll vm start %s` starts it", name, state(vm), name)
	}
	return vm, nil
}

// stream opens a console of a virtual machine.
func (s *session) stream(ctx context.Context, name, kind string) (io.ReadWriteCloser, error) {
	base, _, err := rest.DefaultServerUrlFor(s.config)
	if err != nil {
		return nil, err
	}
	base.Path = strings.TrimSuffix(base.Path, "/") + subresources.Path(s.namespace, name, kind)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, base.String(), nil)
	if err != nil {
		return nil, err
	}
	rt, holder, err := websocket.RoundTripperFor(s.config)
	if err != nil {
		return nil, err
	}
	conn, err := websocket.Negotiate(rt, holder, req, subresources.Protocol)
	if err != nil {
		if upgrade, ok := errors.AsType[*streamhttp.UpgradeFailureError](err); ok {
			err = upgrade.Cause
		}
		if apierrors.IsForbidden(err) {
			return nil, fmt.Errorf("you may not open it: %w", err)
		}
		return nil, fmt.Errorf("opening the %s of %s: %w", kind, name, err)
	}
	return console{socket.New(conn, 0)}, nil
}

// console is a stream whose last words are fit for a terminal.
type console struct{ *socket.Stream }

// Read implements io.Reader.
func (c console) Read(p []byte) (int, error) {
	n, err := c.Stream.Read(p)
	if errors.Is(err, socket.ErrEnded) {
		err = errors.New(strings.TrimSpace(clean(err.Error())))
	}
	return n, err
}

// forward makes a port of a virtual machine a port of this host, until ctx ends. It returns the port.
func (s *session) forward(ctx context.Context, name string, port int, errOut io.Writer) (int, error) {
	base, _, err := rest.DefaultServerUrlFor(s.config)
	if err != nil {
		return 0, err
	}
	base.Path = strings.TrimSuffix(base.Path, "/") + "/api/v1/namespaces/" + url.PathEscape(s.namespace) + "/pods/" + url.PathEscape(name) + "/portforward"
	transport, upgrader, err := spdy.RoundTripperFor(s.config)
	if err != nil {
		return 0, err
	}
	old := spdy.NewDialerForStreaming(upgrader, &http.Client{Transport: transport}, http.MethodPost, base)
	tunnel, err := portforward.NewSPDYOverWebsocketDialerForStreaming(base, s.config)
	if err != nil {
		return 0, err
	}
	var refused error // before anything is sent to failed
	dialer := portforward.NewFallbackDialerForStreaming(tunnel, old, func(err error) bool {
		if refused = s.refusal(err); refused != nil {
			return false
		}
		return streamhttp.IsUpgradeFailure(err) || streamhttp.IsHTTPSProxyError(err)
	})
	ready := make(chan struct{})
	fw, err := portforward.NewOnAddressesForStreaming(dialer, []string{"127.0.0.1"}, []string{fmt.Sprintf("0:%d", port)}, ctx.Done(), ready, io.Discard, errOut)
	if err != nil {
		return 0, err
	}
	failed := make(chan error, 1)
	go func() { failed <- fw.ForwardPorts() }()
	select {
	case <-ready:
	case err := <-failed:
		if refused != nil {
			err = refused
		}
		return 0, fmt.Errorf("forwarding port %d of %s: %w", port, name, err)
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	ports, err := fw.GetPorts()
	if err != nil {
		return 0, fmt.Errorf("forwarding port %d of %s: %w", port, name, err)
	}
	return int(ports[0].Local), nil
}

// refusedError is an answer of the API server that stays the same when it is asked again.
type refusedError struct{ error }

func (e refusedError) Unwrap() error { return e.error }

// refusal is what the API server has against a forwarded port, nil if err is anything else.
func (s *session) refusal(err error) error {
	if upgrade, ok := errors.AsType[*streamhttp.UpgradeFailureError](err); ok {
		err = upgrade.Cause
	}
	status, ok := errors.AsType[*apierrors.StatusError](err)
	switch {
	case !ok || status.ErrStatus.Code < 400 || status.ErrStatus.Code > 499 || apierrors.IsTooManyRequests(err):
		return nil
	case apierrors.IsForbidden(err):
		err = fmt.Errorf("you may not: it takes the right to use pods/portforward in namespace %s, which the roles Edit and Owner have; an administrator gives them, in spec.accessList of the SupervisorNamespace: %w", s.namespace, err)
	}
	return refusedError{err}
}
