// Package robotaccount is the controller of RobotAccounts: it makes their passwords.
//
// A password is in one place, a Secret of type kubernetes.io/dockerconfigjson beside the account, that pods can name in
// imagePullSecrets; the account's status has its hash, which is what the registry compares with. The Secret is written
// first and says which rotation it is of, so that a crash in between makes no second password. A Secret that is lost is
// made anew, with a new password. It is set up in the server's manager, and knows nothing of the registry's HTTP side.
//
// What can go wrong: a Secret of that name is somebody else's, or the namespace may have no more Secrets; the condition
// Ready says so.
package robotaccount

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strconv"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/internal/controllers/condition"
)

const (
	// rotationAnnotation of a Secret is the rotation that its password is of.
	rotationAnnotation = "atoll.dev/robot-rotation"
	// Keys of the Secret beside that of Docker.
	userKey     = "username"
	passwordKey = "password"

	// lookAgain is when a Secret is looked for again; they are not watched.
	lookAgain = 2 * time.Minute
)

// Setup adds the controller to a manager. Hosts are the names that the registry has in images.
func Setup(hosts ...string) func(mgr ctrl.Manager) error {
	return func(mgr ctrl.Manager) error {
		r := &reconciler{client: mgr.GetClient(), hosts: hosts, now: time.Now}
		if err := ctrl.NewControllerManagedBy(mgr).Named("robotaccount").For(&atoll.RobotAccount{}).Complete(r); err != nil {
			return fmt.Errorf("robot account controller: %w", err)
		}
		return nil
	}
}

type reconciler struct {
	client client.Client
	hosts  []string
	now    func() time.Time
}

// Reconcile implements reconcile.Reconciler.
func (r *reconciler) Reconcile(ctx context.Context, req ctrl.Request) (ctrl.Result, error) {
	var robot atoll.RobotAccount
	if err := r.client.Get(ctx, req.NamespacedName, &robot); err != nil {
		return ctrl.Result{}, client.IgnoreNotFound(err)
	}
	if robot.DeletionTimestamp != nil {
		return ctrl.Result{}, nil // its Secret goes with it
	}
	was := robot.DeepCopy()
	failed := r.secret(ctx, &robot)
	after := r.judge(&robot, failed)
	if !equality.Semantic.DeepEqual(was.Status, robot.Status) {
		if err := r.client.Status().Patch(ctx, &robot, client.MergeFrom(was)); err != nil {
			return ctrl.Result{}, fmt.Errorf("writing the status of robot account %s: %w", req, client.IgnoreNotFound(err))
		}
	}
	return ctrl.Result{RequeueAfter: after}, nil
}

// judge sets the condition and says when to look again.
func (r *reconciler) judge(robot *atoll.RobotAccount, failed error) time.Duration {
	after := lookAgain
	expires := robot.Spec.ExpiresAt
	if expires != nil {
		if left := expires.Sub(r.now()); left > 0 {
			after = min(after, left+time.Second)
		}
	}
	switch {
	case failed != nil:
		condition.False(&robot.Status.Conditions, atoll.RobotReady, "SecretFailed", "%v", failed)
		return min(after, 15*time.Second)
	case expires != nil && !r.now().Before(expires.Time):
		condition.False(&robot.Status.Conditions, atoll.RobotReady, "Expired", "the account ended to work at %s; set spec.expiresAt to go on", expires.UTC().Format(time.RFC3339))
	default:
		condition.True(&robot.Status.Conditions, atoll.RobotReady)
	}
	return after
}

// secret sees to it that the account has a Secret with the password that the status has the hash of.
func (r *reconciler) secret(ctx context.Context, robot *atoll.RobotAccount) error {
	name := robot.Spec.SecretName
	if name == "" {
		name = "robot-" + robot.Name
	}
	robot.Status.User, robot.Status.SecretName = atoll.RobotUser(robot.Namespace, robot.Name), name
	var secret corev1.Secret
	err := r.client.Get(ctx, types.NamespacedName{Namespace: robot.Namespace, Name: name}, &secret)
	if client.IgnoreNotFound(err) != nil {
		return fmt.Errorf("reading Secret %s: %w", name, err)
	}
	missing := apierrors.IsNotFound(err)
	if !missing && !metav1.IsControlledBy(&secret, robot) {
		return fmt.Errorf("there is a Secret %s that is not of this account; delete it, or name another in spec.secretName", name)
	}
	rotation := strconv.FormatInt(robot.Spec.Rotation, 10)
	if hash := hashOf(secret.Data[passwordKey]); !missing && secret.Annotations[rotationAnnotation] == rotation && len(secret.Data[passwordKey]) > 0 {
		switch {
		case hash == robot.Status.SecretHash:
			return nil
		case robot.Status.SecretHash == "" || robot.Status.Rotation != robot.Spec.Rotation: // a crash came in between
			robot.Status.SecretHash, robot.Status.Rotation = hash, robot.Spec.Rotation
			return nil
		}
	}
	return r.renew(ctx, robot, &secret, name, missing)
}

// renew makes a password. The one before ends with the status.
func (r *reconciler) renew(ctx context.Context, robot *atoll.RobotAccount, secret *corev1.Secret, name string, missing bool) error {
	password := rand.Text() + rand.Text() // 260 bits
	config, err := r.dockerConfig(robot.Status.User, password)
	if err != nil {
		return err
	}
	was := secret.DeepCopy()
	secret.Namespace, secret.Name, secret.Type = robot.Namespace, name, corev1.SecretTypeDockerConfigJson
	metav1.SetMetaDataAnnotation(&secret.ObjectMeta, rotationAnnotation, strconv.FormatInt(robot.Spec.Rotation, 10))
	secret.Data = map[string][]byte{
		corev1.DockerConfigJsonKey: config, userKey: []byte(robot.Status.User), passwordKey: []byte(password),
	}
	if err := controllerutil.SetControllerReference(robot, secret, r.client.Scheme()); err != nil {
		return fmt.Errorf("writing Secret %s: %w", name, err)
	}
	if missing {
		err = r.client.Create(ctx, secret)
	} else {
		err = r.client.Patch(ctx, secret, client.MergeFrom(was))
	}
	if err != nil {
		return fmt.Errorf("writing Secret %s: %w", name, err)
	}
	robot.Status.SecretHash, robot.Status.Rotation = hashOf([]byte(password)), robot.Spec.Rotation
	return nil
}

func hashOf(password []byte) string {
	sum := sha256.Sum256(password)
	return hex.EncodeToString(sum[:])
}

// dockerConfig is what Docker keeps of logins.
func (r *reconciler) dockerConfig(user, password string) ([]byte, error) {
	type login struct {
		Username string `json:"username"`
		Password string `json:"password"`
		Auth     string `json:"auth"`
	}
	auths := make(map[string]login, len(r.hosts))
	for _, h := range r.hosts {
		auths[h] = login{Username: user, Password: password, Auth: base64.StdEncoding.EncodeToString([]byte(user + ":" + password))}
	}
	return json.Marshal(map[string]any{"auths": auths})
}
