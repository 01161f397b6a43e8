package subresources

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	gwebsocket "github.com/gorilla/websocket"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apiserver/pkg/endpoints/handlers/negotiation"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/remotecommand"
	streamhttp "k8s.io/streaming/pkg/httpstream"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	subresources "atoll.dev/atoll/api/subresources/v1alpha1"
	"atoll.dev/atoll/internal/kube/subresources/socket"
)

const (
	// maxPiece is the longest message that is taken of a client.
	maxPiece = 1 << 20
	// pingEvery is how often a client is asked whether it is still there, and silentFor how long it may take.
	pingEvery = 20 * time.Second
	silentFor = 3 * pingEvery
	// writeWithin is how long a client may take to read a message.
	writeWithin = 30 * time.Second
	// maxReason is what a closing message has room for.
	maxReason = 120
)

func negotiated() negotiation.EndpointRestrictions { return negotiation.DefaultEndpointRestrictions }

// serve makes a websocket of the request and connects it with a stream of a pod.
func (s *streams) serve(w http.ResponseWriter, r *http.Request, pod *corev1.Pod, kind machinev1.StreamKind) {
	upgrader := gwebsocket.Upgrader{
		Subprotocols:    []string{subresources.Protocol, subresources.ProtocolBinary},
		ReadBufferSize:  32 << 10,
		WriteBufferSize: 32 << 10,
	}
	ws, err := upgrader.Upgrade(w, r, nil)
	if err != nil {
		return // the client has been told
	}
	defer ws.Close() //nolint:errcheck // the closing message is written
	ws.SetReadLimit(maxPiece)
	alive := func(string) error { return ws.SetReadDeadline(time.Now().Add(silentFor)) }
	ws.SetPongHandler(alive)
	_ = alive("")
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	go ping(ctx, ws)
	err = s.exec(ctx, pod.Namespace, pod.Name, kind, socket.New(ws, writeWithin))
	code, reason := gwebsocket.CloseNormalClosure, ""
	if err != nil {
		code, reason = gwebsocket.CloseInternalServerErr, err.Error()
		s.log.Warn("a console ended with an error", "namespace", pod.Namespace, "virtualMachine", pod.Name, "kind", kind, "error", err)
	}
	message := gwebsocket.FormatCloseMessage(code, strings.ToValidUTF8(reason[:min(len(reason), maxReason)], ""))
	_ = ws.WriteControl(gwebsocket.CloseMessage, message, time.Now().Add(time.Second))
}

// ping asks a client whether it is still there.
func ping(ctx context.Context, ws *gwebsocket.Conn) {
	tick := time.NewTicker(pingEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			if ws.WriteControl(gwebsocket.PingMessage, nil, time.Now().Add(pingEvery)) != nil {
				return
			}
		}
	}
}

// execInPod runs the stream's command in the machine's pod.
func (s *streams) execInPod(ctx context.Context, namespace, pod string, kind machinev1.StreamKind, conn io.ReadWriter) error {
	base, _, err := rest.DefaultServerUrlFor(s.config)
	if err != nil {
		return err
	}
	base.Path = strings.TrimSuffix(base.Path, "/") + "/api/v1/namespaces/" + url.PathEscape(namespace) + "/pods/" + url.PathEscape(pod) + "/exec"
	base.RawQuery = url.Values{
		"container": {machinev1.Container}, "command": {machinev1.CommandStream, string(kind)},
		"stdin": {"true"}, "stdout": {"true"}, "stderr": {"true"},
	}.Encode()
	sockets, err := remotecommand.NewWebSocketExecutor(s.config, http.MethodGet, base.String())
	if err != nil {
		return err
	}
	spdy, err := remotecommand.NewSPDYExecutor(s.config, http.MethodPost, base)
	if err != nil {
		return err
	}
	executor, err := remotecommand.NewFallbackExecutor(sockets, spdy, func(err error) bool {
		return streamhttp.IsUpgradeFailure(err) || streamhttp.IsHTTPSProxyError(err)
	})
	if err != nil {
		return err
	}
	said := &bounded{most: 4 << 10}
	input, typed := io.Pipe()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		_, err := io.Copy(typed, conn)
		_ = typed.CloseWithError(errors.Join(io.EOF, err))
		cancel() // the client is gone
	}()
	err = executor.StreamWithContext(ctx, remotecommand.StreamOptions{Stdin: input, Stdout: conn, Stderr: said})
	_ = input.Close()
	switch {
	case ctx.Err() != nil:
		return nil
	case err != nil && said.Len() > 0:
		return fmt.Errorf("%s: %w", strings.TrimSpace(said.String()), err)
	}
	return err
}

// bounded keeps the start of what is written.
type bounded struct {
	bytes.Buffer
	most int
}

// Write implements io.Writer.
func (b *bounded) Write(p []byte) (int, error) {
	_, _ = b.Buffer.Write(p[:min(len(p), max(0, b.most-b.Len()))])
	return len(p), nil
}
