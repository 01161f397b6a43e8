//go:build integration

package server

import (
	"context"
	"crypto/tls"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/wait"
)

// checkCertificates renews every certificate of a running server, as happens long before they expire: each
// port must present its new one, and the components must go on with theirs.
func checkCertificates(t *testing.T, cfg Config) {
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	client, err := tls.LoadX509KeyPair(s.files.Cert("apiserver-etcd-client"), s.files.Key("apiserver-etcd-client"))
	if err != nil {
		t.Fatal(err)
	}
	ports := map[string]int{
		"API server": cfg.Ports.API, "scheduler": cfg.Ports.Scheduler,
		"controller manager": cfg.Ports.ControllerManager, "etcd": cfg.Ports.EtcdClient,
		"portal": cfg.Ports.Portal,
	}
	before := map[string]string{}
	for name, port := range ports {
		before[name] = presented(t, port, client)
	}

	certs, err := filepath.Glob(filepath.Join(cfg.PKIDir, "*.crt"))
	if err != nil {
		t.Fatal(err)
	}
	removed := 0
	for _, file := range certs {
		if strings.HasSuffix(file, "-ca.crt") {
			continue
		}
		if err := os.Remove(file); err != nil {
			t.Fatal(err)
		}
		removed++
	}
	made, err := s.pki.Ensure()
	if err != nil || len(made) != removed {
		t.Fatalf("%d certificates removed, made %q: %v", removed, made, err)
	}

	for _, name := range slices.Sorted(maps.Keys(ports)) {
		err := wait.PollUntilContextTimeout(t.Context(), 200*time.Millisecond, 3*patience, true, func(context.Context) (bool, error) {
			return presented(t, ports[name], client) != before[name], nil
		})
		if err != nil {
			t.Errorf("the %s still presents the old certificate: %v", name, err)
		}
	}
	// Through the API server, etcd, the scheduler and the controller manager.
	ctx, kube := t.Context(), adminClient(t, cfg)
	namespace := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "renewed"}}
	if _, err := kube.CoreV1().Namespaces().Create(ctx, namespace, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	err = wait.PollUntilContextTimeout(ctx, 200*time.Millisecond, patience, true, func(ctx context.Context) (bool, error) {
		_, err := kube.CoreV1().ServiceAccounts("renewed").Get(ctx, "default", metav1.GetOptions{})
		return err == nil, nil
	})
	if err != nil {
		t.Errorf("the controller manager does not work on: %v", err)
	}
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "p"}, Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "c", Image: "i"}}}}
	if _, err := kube.CoreV1().Pods("renewed").Create(ctx, pod, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	err = wait.PollUntilContextTimeout(ctx, 200*time.Millisecond, patience, true, func(ctx context.Context) (bool, error) {
		got, err := kube.CoreV1().Pods("renewed").Get(ctx, "p", metav1.GetOptions{})
		return err == nil && len(got.Status.Conditions) > 0 && got.Status.Conditions[0].Reason == corev1.PodReasonUnschedulable, nil
	})
	if err != nil {
		t.Errorf("the scheduler does not work on: %v", err)
	}
}

// presented is the serial number of the certificate that a port shows.
func presented(t *testing.T, port int, client tls.Certificate) string {
	t.Helper()
	conn, err := tls.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port), &tls.Config{
		InsecureSkipVerify: true, // only looked at
		Certificates:       []tls.Certificate{client},
	})
	if err != nil {
		t.Fatalf("port %d: %v", port, err)
	}
	defer conn.Close()
	return conn.ConnectionState().PeerCertificates[0].SerialNumber.String()
}
