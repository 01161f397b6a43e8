// Package registry is what `atoll registry` does: it talks to the cluster's registry at the portal, and to the API server
// about robot accounts.
//
// It has a person's kubeconfig. A token in it is what the registry is asked with; who has a client certificate instead,
// which the registry does not take, makes a token of the service account atoll-registry-operator, which administrators
// may. What can go wrong: the portal does not answer, or the person may not do what they ask; both are said.
package registry

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	authnv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/internal/cli/cluster"
)

const (
	timeout = 30 * time.Second
	// passwordWithin is how long the controller may take to make a password.
	passwordWithin = 3 * time.Minute
	tokenLife      = int64(600)
	operator       = "atoll-registry-operator"
	// collectWithin is how long a collection may take before this stops to wait for it.
	collectWithin = 30 * time.Minute
)

// Client is one person at one cluster.
type Client struct {
	kube   kubernetes.Interface
	robots dynamic.NamespaceableResourceInterface
	// known sends the session of the kubeconfig, if there is one; plain sends nothing of it.
	known, plain *http.Client
	session      bool

	// Host is where images are pushed to.
	Host     string
	password string // a token that was made
}

// Usage is what a project takes.
type Usage struct {
	Project      string `json:"project"`
	Used         int64  `json:"used"`
	Quota        *int64 `json:"quota,omitempty"`
	Repositories int    `json:"repositories"`
	Tags         int    `json:"tags"`
}

// Tag is one tag.
type Tag struct {
	Name   string    `json:"name"`
	Digest string    `json:"digest"`
	Pushed time.Time `json:"pushed"`
}

// Repository is one repository.
type Repository struct {
	Name      string `json:"name"`
	Tags      []Tag  `json:"tags"`
	Manifests int    `json:"manifests"`
}

// Report is what a collection has removed.
type Report struct {
	DryRun    bool    `json:"dryRun,omitempty"`
	Manifests int     `json:"manifests"`
	Layers    int     `json:"layers"`
	Blobs     int     `json:"blobs"`
	Uploads   int     `json:"uploads"`
	Projects  int     `json:"projects"`
	Bytes     int64   `json:"bytes"`
	Seconds   float64 `json:"seconds"`
}

// New reads a kubeconfig. Host is that of the registry; when empty, it is that of the API server.
func New(kubeconfig, host string) (*Client, error) {
	config, err := cluster.ConfigOf(kubeconfig)
	if err != nil {
		return nil, err
	}
	config.Timeout = timeout
	c := &Client{Host: host}
	if c.kube, err = kubernetes.NewForConfig(config); err != nil {
		return nil, fmt.Errorf("using the kubeconfig: %w", err)
	}
	objects, err := dynamic.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("using the kubeconfig: %w", err)
	}
	c.robots = objects.Resource(atoll.RobotAccounts())
	if c.Host == "" {
		server, err := url.Parse(config.Host)
		if err != nil || server.Hostname() == "" {
			return nil, fmt.Errorf("the kubeconfig names the server %q; say with --registry where the registry is", config.Host)
		}
		c.Host = server.Hostname()
	}
	return c, c.connect(config)
}

// connect makes clients that trust the authority of the kubeconfig: one that sends the token that the kubeconfig has, or
// gets from a program, and one that sends none.
func (c *Client) connect(config *rest.Config) error {
	own := rest.CopyConfig(config)
	own.Timeout = collectWithin
	c.session = own.BearerToken != "" || own.BearerTokenFile != "" || own.ExecProvider != nil
	own.CertData, own.CertFile, own.KeyData, own.KeyFile = nil, "", nil, ""
	var err error
	if c.known, err = rest.HTTPClientFor(own); err != nil {
		return fmt.Errorf("using the kubeconfig: %w", err)
	}
	if c.plain, err = rest.HTTPClientFor(rest.AnonymousClientConfig(own)); err != nil {
		return fmt.Errorf("using the kubeconfig: %w", err)
	}
	return nil
}

// authorized sends a request as this person, for whom a token is made if the kubeconfig has none.
func (c *Client) authorized(ctx context.Context, method, path string, into any) error {
	if c.session {
		return c.call(ctx, c.known, method, path, "", into)
	}
	if c.password == "" {
		answer, err := c.kube.CoreV1().ServiceAccounts(metav1.NamespaceSystem).CreateToken(ctx, operator, &authnv1.TokenRequest{
			Spec: authnv1.TokenRequestSpec{Audiences: []string{atoll.RegistryAudience}, ExpirationSeconds: new(tokenLife)},
		}, metav1.CreateOptions{})
		if err != nil {
			return fmt.Errorf("making a token for the registry: %w; a kubeconfig of `atoll login` has one", err)
		}
		c.password = answer.Status.Token
	}
	return c.call(ctx, c.plain, method, path, c.password, into)
}

// manage calls the part of the registry that is not in the distribution specification.
func (c *Client) manage(ctx context.Context, method, path string, query url.Values, into any) error {
	return c.authorized(ctx, method, "/registry/v1/"+path+"?"+query.Encode(), into)
}

// call sends a request, with a token unless the client has one, and decodes its answer.
func (c *Client) call(ctx context.Context, client *http.Client, method, path, token string, into any) error {
	req, err := http.NewRequestWithContext(ctx, method, "https://"+c.Host+path, nil)
	if err != nil {
		return err
	}
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	answer, err := client.Do(req)
	if err != nil {
		return fmt.Errorf("asking the registry: %w", err)
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(io.LimitReader(answer.Body, 64<<20))
	if err != nil {
		return fmt.Errorf("reading the registry's answer: %w", err)
	}
	if answer.StatusCode >= http.StatusBadRequest {
		return refusal(answer.Status, body)
	}
	if into == nil {
		return nil
	}
	if err := json.Unmarshal(body, into); err != nil {
		return fmt.Errorf("reading the registry's answer: %w", err)
	}
	return nil
}

// refusal is what the registry said.
func refusal(status string, body []byte) error {
	var said struct {
		Errors []struct {
			Message string `json:"message"`
		} `json:"errors"`
	}
	if json.Unmarshal(body, &said) == nil && len(said.Errors) > 0 {
		return fmt.Errorf("the registry refuses it: %s", said.Errors[0].Message)
	}
	return fmt.Errorf("the registry answers %s", status)
}

func project(namespace string) url.Values {
	if namespace == "" {
		return url.Values{}
	}
	return url.Values{"project": {namespace}}
}

// Usage of one project, or of all that may be seen.
func (c *Client) Usage(ctx context.Context, namespace string) ([]Usage, error) {
	var out []Usage
	err := c.manage(ctx, http.MethodGet, "usage", project(namespace), &out)
	return out, err
}

// Repositories of one project, or of all that may be seen.
func (c *Client) Repositories(ctx context.Context, namespace string) ([]Repository, error) {
	var out []Repository
	err := c.manage(ctx, http.MethodGet, "repositories", project(namespace), &out)
	return out, err
}

// Collect removes what nobody uses.
func (c *Client) Collect(ctx context.Context, dryRun bool) (Report, error) {
	var out Report
	query := url.Values{}
	if dryRun {
		query.Set("dryRun", "true")
	}
	err := c.manage(ctx, http.MethodPost, "gc", query, &out)
	return out, err
}

// Remove deletes a tag or a manifest: REPOSITORY:TAG or REPOSITORY@DIGEST.
func (c *Client) Remove(ctx context.Context, reference string) error {
	repository, ref, ok := strings.Cut(reference, "@")
	if !ok {
		if repository, ref, ok = strings.Cut(reference, ":"); !ok {
			return fmt.Errorf("%q names no image: use NAMESPACE/NAME:TAG or NAMESPACE/NAME@DIGEST", reference)
		}
	}
	var login struct {
		Token string `json:"token"`
	}
	query := url.Values{"service": {atoll.RegistryHost}, "scope": {"repository:" + repository + ":delete"}}
	if err := c.authorized(ctx, http.MethodGet, "/registry/token?"+query.Encode(), &login); err != nil {
		return err
	}
	return c.call(ctx, c.plain, http.MethodDelete, "/v2/"+repository+"/manifests/"+ref, login.Token, nil)
}

// Robots of a namespace, or of all.
func (c *Client) Robots(ctx context.Context, namespace string) ([]atoll.RobotAccount, error) {
	list, err := c.robots.Namespace(namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, fmt.Errorf("listing robot accounts: %w", err)
	}
	var out []atoll.RobotAccount
	for i := range list.Items {
		robot, err := decode(&list.Items[i])
		if err != nil {
			return nil, err
		}
		out = append(out, *robot)
	}
	return out, nil
}

func decode(obj *unstructured.Unstructured) (*atoll.RobotAccount, error) {
	var robot atoll.RobotAccount
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(obj.Object, &robot); err != nil {
		return nil, fmt.Errorf("reading robot account %s: %w", obj.GetName(), err)
	}
	return &robot, nil
}

// CreateRobot makes a robot account and waits for its password.
func (c *Client) CreateRobot(ctx context.Context, robot *atoll.RobotAccount) (user, password string, err error) {
	robot.TypeMeta = metav1.TypeMeta{APIVersion: atoll.GroupVersion().String(), Kind: "RobotAccount"}
	content, err := runtime.DefaultUnstructuredConverter.ToUnstructured(robot)
	if err != nil {
		return "", "", err
	}
	if _, err := c.robots.Namespace(robot.Namespace).Create(ctx, &unstructured.Unstructured{Object: content}, metav1.CreateOptions{}); err != nil {
		return "", "", fmt.Errorf("making robot account %s: %w", robot.Name, err)
	}
	return c.robotPassword(ctx, robot.Namespace, robot.Name, 0)
}

// RotateRobot has a new password made, and waits for it.
func (c *Client) RotateRobot(ctx context.Context, namespace, name string) (user, password string, err error) {
	obj, err := c.robots.Namespace(namespace).Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return "", "", fmt.Errorf("reading robot account %s: %w", name, err)
	}
	robot, err := decode(obj)
	if err != nil {
		return "", "", err
	}
	next := robot.Spec.Rotation + 1
	if err := unstructured.SetNestedField(obj.Object, next, "spec", "rotation"); err != nil {
		return "", "", err
	}
	if _, err := c.robots.Namespace(namespace).Update(ctx, obj, metav1.UpdateOptions{}); err != nil {
		return "", "", fmt.Errorf("rotating robot account %s: %w", name, err)
	}
	return c.robotPassword(ctx, namespace, name, next)
}

// robotPassword waits until an account has a password of a rotation.
func (c *Client) robotPassword(ctx context.Context, namespace, name string, rotation int64) (string, string, error) {
	ctx, cancel := context.WithTimeout(ctx, passwordWithin)
	defer cancel()
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	last := "no answer of the controller yet"
	for {
		obj, err := c.robots.Namespace(namespace).Get(ctx, name, metav1.GetOptions{})
		if err == nil {
			robot, err := decode(obj)
			if err != nil {
				return "", "", err
			}
			if robot.Status.SecretHash != "" && robot.Status.Rotation == rotation {
				return c.readPassword(ctx, robot)
			}
			for _, cond := range robot.Status.Conditions {
				if cond.Type == atoll.RobotReady && cond.Message != "" {
					last = cond.Message
				}
			}
		}
		select {
		case <-ctx.Done():
			return "", "", fmt.Errorf("robot account %s/%s has no password: %s", namespace, name, last)
		case <-tick.C:
		}
	}
}

func (c *Client) readPassword(ctx context.Context, robot *atoll.RobotAccount) (string, string, error) {
	secret, err := c.kube.CoreV1().Secrets(robot.Namespace).Get(ctx, robot.Status.SecretName, metav1.GetOptions{})
	if err != nil {
		return "", "", fmt.Errorf("reading the password of robot account %s: %w", robot.Name, err)
	}
	if secret.Type != corev1.SecretTypeDockerConfigJson {
		return "", "", fmt.Errorf("Secret %s is not of type %s", secret.Name, corev1.SecretTypeDockerConfigJson)
	}
	return robot.Status.User, string(secret.Data["password"]), nil
}

// DeleteRobot ends an account.
func (c *Client) DeleteRobot(ctx context.Context, namespace, name string) error {
	if err := c.robots.Namespace(namespace).Delete(ctx, name, metav1.DeleteOptions{}); err != nil {
		return fmt.Errorf("deleting robot account %s: %w", name, err)
	}
	return nil
}
