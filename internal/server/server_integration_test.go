//go:build integration

package server

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
)

// childEnv makes the test binary run a server with the configuration in it: one
// process can run one server only, and tests must be able to kill it.
const childEnv = "ATOLL_TEST_SERVER"

// patience is what anything may take that happens by itself, on a host that is busy with other things.
const patience = 5 * time.Minute

func TestMain(m *testing.M) {
	if text := os.Getenv(childEnv); text != "" {
		if err := child(text); err != nil {
			fmt.Fprintln(os.Stderr, "error:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func child(text string) error {
	var cfg Config
	if err := json.Unmarshal([]byte(text), &cfg); err != nil {
		return err
	}
	cfg.Logger = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	cfg.OnReady = func() { fmt.Println("ready") }
	s, err := New(cfg)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	return s.Run(ctx)
}

// testConfig is a server below dir on free ports.
func testConfig(t *testing.T, dir string) Config {
	t.Helper()
	addrs, err := hostAddrs()
	if err != nil {
		t.Fatal(err)
	}
	var ip netip.Addr
	for _, a := range addrs {
		if a.Is4() {
			ip = a
			break
		}
	}
	if !ip.IsValid() {
		t.Fatal("this test needs an IPv4 address other than loopback")
	}
	ports := freePorts(t, 8)
	return Config{
		PKIDir: filepath.Join(dir, "pki"), KubeconfigDir: filepath.Join(dir, "kubeconfig"), EtcdDir: filepath.Join(dir, "etcd"),
		StateDir: filepath.Join(dir, "server"), AuditLog: filepath.Join(dir, "audit", "audit.log"), AdminKubeconfig: filepath.Join(dir, "admin.kubeconfig"),
		DatastorePath: filepath.Join(dir, "datastores", "default"),
		ContentDir:    filepath.Join(dir, "content"),
		RegistryDir:   filepath.Join(dir, "registry"),
		NodeName:      "n1", NodeIP: ip, Version: "test",
		Ports: Ports{API: ports[0], EtcdClient: ports[1], EtcdPeer: ports[2], Scheduler: ports[3], ControllerManager: ports[4], Webhook: ports[5], Portal: ports[6], Identity: ports[7]},
	}
}

// freePorts are below those that the kernel gives to others while nobody listens there.
func freePorts(t *testing.T, n int) []int {
	t.Helper()
	var out []int
	for range 1000 {
		if len(out) == n {
			return out
		}
		port := 20000 + rand.IntN(12000)
		l, err := net.Listen("tcp", fmt.Sprintf(":%d", port))
		if err != nil {
			continue // in use
		}
		_ = l.Close()
		if !slices.Contains(out, port) {
			out = append(out, port)
		}
	}
	t.Fatal("no free ports")
	return nil
}

// process is a running server.
type process struct {
	cmd    *exec.Cmd
	output *bytes.Buffer
	ended  chan struct{}
}

// start runs a server and waits until it is ready or has ended.
func start(t *testing.T, cfg Config) (p *process, ready bool) {
	t.Helper()
	text, err := json.Marshal(cfg)
	if err != nil {
		t.Fatal(err)
	}
	p = &process{cmd: exec.Command(os.Args[0]), output: new(bytes.Buffer), ended: make(chan struct{})}
	p.cmd.Env = append(os.Environ(), childEnv+"="+string(text))
	p.cmd.Stderr = p.output
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	isReady := make(chan struct{})
	go func() {
		buf := make([]byte, 16)
		if n, _ := out.Read(buf); strings.HasPrefix(string(buf[:n]), "ready") {
			close(isReady)
		}
		_ = p.cmd.Wait()
		close(p.ended)
	}()
	t.Cleanup(func() { p.stop(syscall.SIGKILL) })
	select {
	case <-isReady:
		return p, true
	case <-p.ended:
		return p, false
	case <-time.After(2 * patience):
		p.stop(syscall.SIGKILL)
		t.Fatalf("the server is not ready:\n%s", p.output)
	}
	return nil, false
}

// stop sends a signal and waits for the end.
func (p *process) stop(signal os.Signal) {
	_ = p.cmd.Process.Signal(signal)
	<-p.ended
}

func mustStart(t *testing.T, cfg Config) *process {
	t.Helper()
	p, ready := start(t, cfg)
	if !ready {
		t.Fatalf("the server ended:\n%s", p.output)
	}
	return p
}

func adminClient(t *testing.T, cfg Config) *kubernetes.Clientset {
	t.Helper()
	rest, err := clientcmd.BuildConfigFromFlags("", cfg.AdminKubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	client, err := kubernetes.NewForConfig(rest)
	if err != nil {
		t.Fatal(err)
	}
	return client
}

// TestServer goes through the life of a server: start, use, kill, start again,
// stop, damage. It is one test because each start costs seconds.
func TestServer(t *testing.T) {
	outer := t
	dir := t.TempDir()
	cfg := testConfig(t, dir)
	p := mustStart(t, cfg)
	client := adminClient(t, cfg)

	t.Run("BootstrapObjects", func(t *testing.T) { checkBootstrap(t, client) })
	t.Run("Storage", func(t *testing.T) { checkStorage(t, client) })
	t.Run("Admission", func(t *testing.T) { checkAdmission(t, client) })
	t.Run("Access", func(t *testing.T) { checkAccess(t, cfg) })
	t.Run("SecretsAreEncrypted", func(t *testing.T) { checkSecret(t, cfg, client) })
	t.Run("Audit", func(t *testing.T) { checkAudit(t, cfg) })
	t.Run("Controllers", func(t *testing.T) { checkControllers(t, client) })
	t.Run("RenewedCertificates", func(t *testing.T) { checkCertificates(t, cfg) })

	t.Run("DataSurvivesAKill", func(t *testing.T) {
		p.stop(syscall.SIGKILL)
		p = mustStart(outer, cfg)
		got, err := adminClient(t, cfg).CoreV1().Secrets("default").Get(t.Context(), "s", metav1.GetOptions{})
		if err != nil || string(got.Data["word"]) != secretWord {
			t.Fatalf("%v, %v", got, err)
		}
	})
	t.Run("StopsInOrder", func(t *testing.T) {
		p.stop(syscall.SIGTERM)
		if code := p.cmd.ProcessState.ExitCode(); code != 0 {
			t.Errorf("exit code %d:\n%s", code, p.output)
		}
	})
	t.Run("BusyPort", func(t *testing.T) {
		l, err := net.Listen("tcp", fmt.Sprintf(":%d", cfg.Ports.API))
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		refused(t, cfg, fmt.Sprintf(":%d: bind: address already in use", cfg.Ports.API))
	})
	t.Run("EncryptionKeyGone", func(t *testing.T) {
		key := filepath.Join(cfg.StateDir, "encryption.yaml")
		saved := key + ".saved"
		if err := os.Rename(key, saved); err != nil {
			t.Fatal(err)
		}
		refused(t, cfg, "encryption key of stored secrets is missing")
		if err := os.Rename(saved, key); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("TruncatedData", func(t *testing.T) {
		database := filepath.Join(cfg.EtcdDir, "member", "snap", "db")
		// The file has room to grow at its end; cut into what is used.
		const left = 128 << 10
		if err := os.Truncate(database, left); err != nil {
			t.Fatal(err)
		}
		refused(t, cfg, "etcd data is damaged and was left untouched")
		if after, err := os.Stat(database); err != nil || after.Size() != left {
			t.Errorf("the data was touched: %v, %v", after, err)
		}
	})
}

// refused starts a server that must end with an error.
func refused(t *testing.T, cfg Config, want string) {
	t.Helper()
	p, ready := start(t, cfg)
	if ready || p.cmd.ProcessState.ExitCode() == 0 {
		t.Fatal("the server started")
	}
	if !strings.Contains(p.output.String(), want) {
		t.Fatalf("output does not say %q:\n%s", want, p.output)
	}
}

func checkBootstrap(t *testing.T, client *kubernetes.Clientset) {
	for _, name := range []string{"atoll", "runc"} {
		if _, err := client.NodeV1().RuntimeClasses().Get(t.Context(), name, metav1.GetOptions{}); err != nil {
			t.Error(err)
		}
	}
	svc, err := client.CoreV1().Services("kube-system").Get(t.Context(), "kube-dns", metav1.GetOptions{})
	if err != nil || svc.Spec.ClusterIP != "10.96.0.10" {
		t.Errorf("%v, %v", svc.Spec.ClusterIP, err)
	}
	version, err := client.CoreV1().ConfigMaps("kube-public").Get(t.Context(), "atoll", metav1.GetOptions{})
	if err != nil || version.Data["version"] != "test" {
		t.Errorf("%v, %v", version.Data, err)
	}
	resources, err := client.Discovery().ServerResourcesForGroupVersion("metrics.k8s.io/v1beta1")
	if err != nil || len(resources.APIResources) != 2 {
		t.Errorf("%v, %v", resources, err)
	}
}

// checkStorage looks for what storage needs, and that its identities may do that and no more.
func checkStorage(t *testing.T, client *kubernetes.Clientset) {
	class, err := client.StorageV1().StorageClasses().Get(t.Context(), "atoll", metav1.GetOptions{})
	if err != nil || class.Annotations["storageclass.kubernetes.io/is-default-class"] != "true" {
		t.Errorf("%v, %v", class.Annotations, err)
	}
	driver, err := client.StorageV1().CSIDrivers().Get(t.Context(), class.Provisioner, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if driver.Spec.AttachRequired == nil || *driver.Spec.AttachRequired {
		t.Error("the kubelet would wait for up to ten seconds before it attaches a volume")
	}
	for _, path := range []string{
		"/apis/atoll.dev/v1alpha1/datastores/default", "/apis/snapshot.storage.k8s.io/v1/volumesnapshotclasses/atoll",
		"/apis/snapshot.storage.k8s.io/v1/namespaces/default/volumesnapshots",
		"/apis/encryption.vmware.com/v1alpha1/namespaces/default/encryptionclasses",
	} {
		if err := client.RESTClient().Get().AbsPath(path).Do(t.Context()).Error(); err != nil {
			t.Errorf("%s: %v", path, err)
		}
	}
	agent, snapshots := []string{"atoll:storage-agents"}, "atoll:snapshot-controller"
	for _, c := range []struct {
		user, verb, group, resource, namespace string
		groups                                 []string
		want                                   bool
	}{
		{"a", "create", "", "persistentvolumes", "", agent, true},
		{"a", "patch", "atoll.dev", "datastores/status", "", agent, true},
		{"a", "update", "encryption.vmware.com", "encryptionclasses/status", "default", agent, true},
		{"a", "update", "encryption.vmware.com", "encryptionclasses", "default", agent, false},
		{"a", "list", "", "nodes", "", agent, true},
		{"a", "get", "", "secrets", "atoll-keys", agent, true},
		{"a", "list", "", "secrets", "atoll-keys", agent, false},
		{"a", "get", "", "secrets", "default", agent, false},
		{"a", "create", "", "pods", "default", agent, false},
		{snapshots, "create", "snapshot.storage.k8s.io", "volumesnapshotcontents", "", nil, true},
		{snapshots, "get", "", "secrets", "default", nil, false},
	} {
		name, sub, _ := strings.Cut(c.resource, "/")
		review := &authorizationv1.SubjectAccessReview{Spec: authorizationv1.SubjectAccessReviewSpec{
			User: c.user, Groups: c.groups,
			ResourceAttributes: &authorizationv1.ResourceAttributes{Verb: c.verb, Group: c.group, Resource: name, Subresource: sub, Namespace: c.namespace},
		}}
		got, err := client.AuthorizationV1().SubjectAccessReviews().Create(t.Context(), review, metav1.CreateOptions{})
		if err != nil || got.Status.Allowed != c.want {
			t.Errorf("%+v: %v, %v", c, got.Status.Allowed, err)
		}
	}
}

func checkAdmission(t *testing.T, client *kubernetes.Clientset) {
	ctx := t.Context()
	// The default service accounts are made by a controller.
	for _, namespace := range []string{"default", "kube-system"} {
		err := wait.PollUntilContextTimeout(ctx, 100*time.Millisecond, patience, true, func(ctx context.Context) (bool, error) {
			_, err := client.CoreV1().ServiceAccounts(namespace).Get(ctx, "default", metav1.GetOptions{})
			return err == nil, nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	pod := func(name string, hostNetwork bool) *corev1.Pod {
		return &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Name: name},
			Spec:       corev1.PodSpec{HostNetwork: hostNetwork, Containers: []corev1.Container{{Name: "c", Image: "i"}}},
		}
	}
	plain, err := client.CoreV1().Pods("default").Create(ctx, pod("plain", false), metav1.CreateOptions{})
	if err != nil || *plain.Spec.RuntimeClassName != "atoll" || plain.Spec.Overhead.Memory().IsZero() {
		t.Fatalf("%+v, %v", plain.Spec, err)
	}
	if _, err := client.CoreV1().Pods("default").Create(ctx, pod("host", true), metav1.CreateOptions{}); !apierrors.IsForbidden(err) {
		t.Errorf("a host pod got %v", err)
	}
	system, err := client.CoreV1().Pods("kube-system").Create(ctx, pod("host", true), metav1.CreateOptions{})
	if err != nil || *system.Spec.RuntimeClassName != "runc" {
		t.Errorf("%+v, %v", system.Spec, err)
	}
}

func checkAccess(t *testing.T, cfg Config) {
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
	for path, want := range map[string]int{"/livez": 200, "/readyz": 200, "/version": 401, "/metrics": 401, "/api/v1/namespaces": 401, "/debug/pprof/": 401} {
		status := func() int {
			answer, err := client.Get(apiURL("127.0.0.1", cfg.Ports.API) + path)
			if err != nil {
				t.Fatal(err)
			}
			_ = answer.Body.Close()
			return answer.StatusCode
		}
		got := status()
		// They ask etcd, which may need longer for once than they wait.
		for end := time.Now().Add(patience); got == http.StatusInternalServerError && want == http.StatusOK && time.Now().Before(end); got = status() {
			time.Sleep(200 * time.Millisecond)
		}
		if got != want {
			t.Errorf("%s: %d, want %d", path, got, want)
		}
	}
	old := &tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS11, MinVersion: tls.VersionTLS10}
	for _, port := range []int{cfg.Ports.API, cfg.Ports.EtcdClient, cfg.Ports.EtcdPeer, cfg.Ports.Scheduler, cfg.Ports.ControllerManager} {
		if conn, err := tls.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port), old); err == nil {
			_ = conn.Close()
			t.Errorf("port %d speaks TLS 1.1", port)
		}
	}
	for _, port := range []int{cfg.Ports.EtcdClient, cfg.Ports.EtcdPeer, cfg.Ports.Scheduler, cfg.Ports.ControllerManager} {
		if conn, err := net.DialTimeout("tcp", net.JoinHostPort(cfg.NodeIP.String(), fmt.Sprint(port)), time.Second); err == nil {
			_ = conn.Close()
			t.Errorf("port %d answers at %s", port, cfg.NodeIP)
		}
	}
	info, err := os.Stat(cfg.AdminKubeconfig)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("admin kubeconfig: %v, %v", info.Mode(), err)
	}
}

const secretWord = "xyzzy-a-word-nobody-else-writes"

func checkSecret(t *testing.T, cfg Config, client *kubernetes.Clientset) {
	secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "s"}, StringData: map[string]string{"word": secretWord}}
	if _, err := client.CoreV1().Secrets("default").Create(t.Context(), secret, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	err := filepath.WalkDir(cfg.EtcdDir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := os.ReadFile(path)
		if bytes.Contains(data, []byte(secretWord)) {
			t.Errorf("%s holds the secret in the clear", path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

func checkAudit(t *testing.T, cfg Config) {
	data, err := os.ReadFile(cfg.AuditLog)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(data, []byte(`"/api/v1/namespaces/default/secrets"`)) {
		t.Error("the creation of a secret is not in the audit log")
	}
	if bytes.Contains(data, []byte(secretWord)) {
		t.Error("the audit log holds the content of a secret")
	}
}

// checkControllers waits for work of the controller manager and the scheduler.
func checkControllers(t *testing.T, client *kubernetes.Clientset) {
	err := wait.PollUntilContextTimeout(t.Context(), 200*time.Millisecond, patience, true, func(ctx context.Context) (bool, error) {
		pod, err := client.CoreV1().Pods("default").Get(ctx, "plain", metav1.GetOptions{})
		if err != nil {
			return false, err
		}
		for _, c := range pod.Status.Conditions {
			if c.Type == corev1.PodScheduled && c.Reason == corev1.PodReasonUnschedulable {
				return true, nil
			}
		}
		return false, nil
	})
	if err != nil {
		t.Errorf("the scheduler has not looked at the pod: %v", err)
	}
	err = wait.PollUntilContextTimeout(t.Context(), 200*time.Millisecond, patience, true, func(ctx context.Context) (bool, error) {
		_, err := client.CoreV1().ConfigMaps("default").Get(ctx, "kube-root-ca.crt", metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return false, nil
		}
		return err == nil, err
	})
	if err != nil {
		t.Errorf("the controller manager has not published the authority: %v", err)
	}
}
