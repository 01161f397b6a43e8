package robotaccount

import (
	"context"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/internal/controllers/condition"
)

type bench struct {
	t *testing.T
	r *reconciler
	// failStatus fails the next writing of the status.
	failStatus bool
}

func newBench(t *testing.T, objects ...client.Object) *bench {
	t.Helper()
	s := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{clientgoscheme.AddToScheme, atoll.AddToScheme} {
		if err := add(s); err != nil {
			t.Fatal(err)
		}
	}
	b := &bench{t: t}
	c := fake.NewClientBuilder().WithScheme(s).WithObjects(objects...).WithStatusSubresource(&atoll.RobotAccount{}).
		WithInterceptorFuncs(interceptor.Funcs{SubResourcePatch: func(ctx context.Context, c client.Client, sub string, obj client.Object, patch client.Patch, opts ...client.SubResourcePatchOption) error {
			if b.failStatus {
				b.failStatus = false
				return errors.New("killed")
			}
			return c.SubResource(sub).Patch(ctx, obj, patch, opts...)
		}}).Build()
	b.r = &reconciler{client: c, hosts: []string{atoll.RegistryHost, "192.0.2.7"}, now: time.Now}
	return b
}

func key() types.NamespacedName { return types.NamespacedName{Namespace: "shop", Name: "ci"} }

func account(change func(*atoll.RobotAccount)) *atoll.RobotAccount {
	r := &atoll.RobotAccount{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "ci", UID: "u1"}, Spec: atoll.RobotAccountSpec{Permissions: []atoll.RobotPermission{atoll.RobotPush}}}
	if change != nil {
		change(r)
	}
	return r
}

func (b *bench) reconcile() (ctrl.Result, error) {
	b.t.Helper()
	return b.r.Reconcile(b.t.Context(), ctrl.Request{NamespacedName: key()})
}

func (b *bench) robot() *atoll.RobotAccount {
	b.t.Helper()
	var r atoll.RobotAccount
	if err := b.r.client.Get(b.t.Context(), key(), &r); err != nil {
		b.t.Fatal(err)
	}
	return &r
}

func (b *bench) secret() *corev1.Secret {
	b.t.Helper()
	var s corev1.Secret
	if err := b.r.client.Get(b.t.Context(), types.NamespacedName{Namespace: "shop", Name: "robot-ci"}, &s); err != nil {
		b.t.Fatal(err)
	}
	return &s
}

func TestPassword(t *testing.T) {
	b := newBench(t, account(nil))
	for range 2 {
		if _, err := b.reconcile(); err != nil {
			t.Fatal(err)
		}
	}
	robot, secret := b.robot(), b.secret()
	password := string(secret.Data[passwordKey])
	if robot.Status.SecretHash != hashOf([]byte(password)) || len(password) < 50 || robot.Status.User != "robot$shop+ci" || !condition.IsTrue(robot.Status.Conditions, atoll.RobotReady) {
		t.Errorf("%+v", robot.Status)
	}
	if secret.Type != corev1.SecretTypeDockerConfigJson || !metav1.IsControlledBy(secret, robot) {
		t.Errorf("%+v", secret.ObjectMeta)
	}
	var config struct {
		Auths map[string]struct{ Username, Password string }
	}
	if err := json.Unmarshal(secret.Data[corev1.DockerConfigJsonKey], &config); err != nil || config.Auths["192.0.2.7"].Password != password || config.Auths[atoll.RegistryHost].Username != "robot$shop+ci" {
		t.Errorf("%v %v", config, err)
	}

	robot.Spec.Rotation = 3
	if err := b.r.client.Update(t.Context(), robot); err != nil {
		t.Fatal(err)
	}
	if _, err := b.reconcile(); err != nil {
		t.Fatal(err)
	}
	after := string(b.secret().Data[passwordKey])
	if after == password || b.robot().Status.SecretHash != hashOf([]byte(after)) || b.robot().Status.Rotation != 3 {
		t.Error("it was not rotated")
	}
	// A Secret that is lost is made anew, with another password.
	if err := b.r.client.Delete(t.Context(), b.secret()); err != nil {
		t.Fatal(err)
	}
	if _, err := b.reconcile(); err != nil {
		t.Fatal(err)
	}
	if again := string(b.secret().Data[passwordKey]); again == after || b.robot().Status.SecretHash != hashOf([]byte(again)) {
		t.Error("the password was not made anew")
	}
}

func TestKilledBeforeTheStatus(t *testing.T) {
	b := newBench(t, account(nil))
	b.failStatus = true
	if _, err := b.reconcile(); err == nil {
		t.Fatal("the status was written")
	}
	password := string(b.secret().Data[passwordKey])
	if _, err := b.reconcile(); err != nil {
		t.Fatal(err)
	}
	if got := string(b.secret().Data[passwordKey]); got != password || b.robot().Status.SecretHash != hashOf([]byte(password)) {
		t.Error("the password was made twice")
	}
}

func TestForeignSecret(t *testing.T) {
	b := newBench(t, account(nil), &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "robot-ci"}, Data: map[string][]byte{"x": []byte("y")}})
	if _, err := b.reconcile(); err != nil {
		t.Fatal(err)
	}
	c := condition.Get(b.robot().Status.Conditions, atoll.RobotReady)
	if c == nil || c.Reason != "SecretFailed" || !strings.Contains(c.Message, "not of this account") || string(b.secret().Data["x"]) != "y" {
		t.Errorf("%+v", c)
	}
}

func TestExpiry(t *testing.T) {
	b := newBench(t, account(func(r *atoll.RobotAccount) { r.Spec.ExpiresAt = &metav1.Time{Time: time.Now().Add(30 * time.Second)} }))
	result, err := b.reconcile()
	if err != nil || result.RequeueAfter > 32*time.Second {
		t.Errorf("%+v, %v", result, err)
	}
	b.r.now = func() time.Time { return time.Now().Add(time.Minute) }
	if _, err := b.reconcile(); err != nil {
		t.Fatal(err)
	}
	if c := condition.Get(b.robot().Status.Conditions, atoll.RobotReady); c == nil || c.Reason != "Expired" {
		t.Errorf("%+v", c)
	}
}
