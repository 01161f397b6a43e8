package main

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
)

// benchUser is the local user that logs in.
const benchUser = "bench-ns-user"

// person is a user with a password.
type person struct{ name, password string }

// newPerson makes the user with `atoll user`, which anybody would use. The password goes through a pipe.
func (h *host) newPerson(ctx context.Context) (person, error) {
	p := person{name: benchUser, password: rand.Text()}
	_ = h.removePerson(ctx) // of a bench that was killed
	cmd := exec.CommandContext(ctx, h.o.atoll, "user", "create", p.name, "--password-stdin", "--must-change=false", "--data-dir", h.o.dataDir)
	cmd.Stdin = strings.NewReader(p.password)
	if out, err := cmd.CombinedOutput(); err != nil {
		return p, fmt.Errorf("making user %s: %w: %s", p.name, err, bytes.TrimSpace(out))
	}
	return p, nil
}

func (h *host) removePerson(ctx context.Context) error {
	out, err := exec.CommandContext(ctx, h.o.atoll, "user", "delete", benchUser, "--data-dir", h.o.dataDir).CombinedOutput()
	if err != nil {
		return fmt.Errorf("deleting user %s: %w: %s", benchUser, err, bytes.TrimSpace(out))
	}
	return nil
}

// portal is HOST:PORT where people log in and images are pushed to, and a transport that trusts it.
func (h *host) portal(ctx context.Context) (string, *http.Transport, error) {
	nodes, err := h.kube.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
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
	config := rest.CopyConfig(h.rest)
	if err := rest.LoadTLSFiles(config); err != nil {
		return "", nil, err
	}
	pool := x509.NewCertPool()
	if address == "" || !pool.AppendCertsFromPEM(config.CAData) {
		return "", nil, errors.New("no node has an address, or the kubeconfig no authority")
	}
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}}
	return net.JoinHostPort(address, strconv.Itoa(h.o.portalPort)), transport, nil
}

// loginTime logs in as kubectl's plug-in for vSphere does, with a new connection each time.
func loginTime(ctx context.Context, h *host) (rows []Row, err error) {
	p, err := h.newPerson(ctx)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, h.removePerson(context.WithoutCancel(ctx))) }()
	address, transport, err := h.portal(ctx)
	if err != nil {
		return nil, err
	}
	var took []float64
	for i := range h.o.n + 1 {
		begin := time.Now()
		if err := login(ctx, address, transport, p); err != nil {
			return nil, err
		}
		if i > 0 {
			took = append(took, milliseconds(time.Since(begin)))
		}
		transport.CloseIdleConnections()
	}
	row := compare("login with a password", "ms", took, nil)
	row.Note = "the bar is 1000"
	return []Row{row}, nil
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
