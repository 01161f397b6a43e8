package namespaces

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os/exec"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"atoll.dev/atoll/bench/rig"
)

// benchUser is the local user that logs in.
const benchUser = "bench-ns-user"

// person is a user with a password.
type person struct{ name, password string }

// newPerson makes the user with `atoll user`, which anybody would use. The password goes through a pipe.
func newPerson(ctx context.Context, h *rig.Host) (person, error) {
	p := person{name: benchUser, password: rand.Text()}
	_ = removePerson(ctx, h) // of a bench that was killed
	cmd := exec.CommandContext(ctx, h.Options.Atoll, "user", "create", p.name, "--password-stdin", "--must-change=false", "--data-dir", h.Options.DataDir)
	cmd.Stdin = strings.NewReader(p.password)
	if out, err := cmd.CombinedOutput(); err != nil {
		return p, fmt.Errorf("making user %s: %w: %s", p.name, err, bytes.TrimSpace(out))
	}
	return p, nil
}

func removePerson(ctx context.Context, h *rig.Host) error {
	out, err := exec.CommandContext(ctx, h.Options.Atoll, "user", "delete", benchUser, "--data-dir", h.Options.DataDir).CombinedOutput()
	if err != nil {
		return fmt.Errorf("deleting user %s: %w: %s", benchUser, err, bytes.TrimSpace(out))
	}
	return nil
}

// portal is HOST:PORT where people log in and images are pushed to, and a transport that trusts it.
func portal(ctx context.Context, h *rig.Host) (string, *http.Transport, error) {
	nodes, err := h.Kube.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return "", nil, err
	}
	address := ""
	for _, n := range nodes.Items {
		for _, a := range n.Status.Addresses {
			if a.Type == corev1.NodeInternalIP && address == "" {
				address = a.Address
			}
		}
	}
	config := rest.CopyConfig(h.REST)
	if err := rest.LoadTLSFiles(config); err != nil {
		return "", nil, err
	}
	pool := x509.NewCertPool()
	if address == "" || !pool.AppendCertsFromPEM(config.CAData) {
		return "", nil, errors.New("no node has an address, or the kubeconfig no authority")
	}
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}}
	return net.JoinHostPort(address, strconv.Itoa(h.Options.PortalPort)), transport, nil
}

// LoginTime logs in as kubectl's plug-in for vSphere does, with a new connection each time.
func LoginTime(ctx context.Context, h *rig.Host) (rows []rig.Row, err error) {
	p, err := newPerson(ctx, h)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, removePerson(context.WithoutCancel(ctx), h)) }()
	address, transport, err := portal(ctx, h)
	if err != nil {
		return nil, err
	}
	var took []float64
	for i := range h.Options.N + 1 {
		begin := time.Now()
		if err := login(ctx, address, transport, p); err != nil {
			return nil, err
		}
		if i > 0 {
			took = append(took, rig.Milliseconds(time.Since(begin)))
		}
		transport.CloseIdleConnections()
	}
	row := rig.Compare("login with a password", "ms", took, nil)
	row.Note = "the bar is 1000"
	return []rig.Row{row}, nil
}

func login(ctx context.Context, address string, transport http.RoundTripper, p person) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://"+address+"/wcp/login", strings.NewReader("{}"))
	if err != nil {
		return err
	}
	req.SetBasicAuth(p.name, p.password)
	resp, err := (&http.Client{Transport: transport}).Do(req)
	if err != nil {
		return fmt.Errorf("logging in: %w", err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		return fmt.Errorf("logging in: %s: %s (%w)", resp.Status, bytes.TrimSpace(body), err)
	}
	return nil
}
