package identity

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	api "atoll.dev/atoll/api/atoll/v1alpha1"
)

// fieldOwner owns the fields of the Secrets with hashes.
const fieldOwner = client.FieldOwner("atoll-identity")

// StorePassword writes the hash of a user's password and ends the sessions that began with another one. mustChange
// has the user change it at the next login. Whoever calls it has checked the password.
func StorePassword(ctx context.Context, c client.Client, user *api.User, hash string, mustChange bool, now time.Time) error {
	secret := passwordSecret(user, hash, now)
	patch, err := json.Marshal(secret)
	if err != nil {
		return err
	}
	target := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: secret.Namespace, Name: secret.Name}}
	if err := c.Patch(ctx, target, client.RawPatch(types.ApplyPatchType, patch), client.ForceOwnership, fieldOwner); err != nil {
		return fmt.Errorf("storing the password of user %s: %w", user.Name, err)
	}
	err = merge(ctx, c, user.Name, map[string]any{"spec": map[string]any{
		"mustChangePassword": mustChange, "sessionGeneration": user.Spec.SessionGeneration + 1,
	}})
	if err != nil {
		return fmt.Errorf("ending the sessions of user %s: %w", user.Name, err)
	}
	return patchStatus(ctx, c, user.Name, map[string]any{"passwordChanged": metav1.NewTime(now)})
}

// passwordSecret is the Secret with the hash of a user's password. It goes with the user.
func passwordSecret(user *api.User, hash string, changed time.Time) *corev1.Secret {
	return &corev1.Secret{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Secret"},
		ObjectMeta: metav1.ObjectMeta{
			Namespace: api.IdentityNamespace, Name: api.PasswordSecretPrefix + user.Name, Labels: map[string]string{api.PasswordSecretLabel: user.Name},
			OwnerReferences: []metav1.OwnerReference{{APIVersion: api.GroupVersion().String(), Kind: "User", Name: user.Name, UID: user.UID}},
		},
		Data: map[string][]byte{
			api.PasswordHashKey:    []byte(hash),
			api.PasswordChangedKey: []byte(changed.UTC().Format(time.RFC3339)),
		},
	}
}

// Revoke ends all sessions of a user.
func Revoke(ctx context.Context, c client.Client, user *api.User) error {
	return merge(ctx, c, user.Name, map[string]any{"spec": map[string]any{"sessionGeneration": user.Spec.SessionGeneration + 1}})
}

// Unlock forgets the failed logins of a user.
func Unlock(ctx context.Context, c client.Client, name string) error {
	return patchStatus(ctx, c, name, map[string]any{"failedLogins": nil, "lockedUntil": nil})
}

func merge(ctx context.Context, c client.Client, name string, change map[string]any) error {
	patch, err := json.Marshal(change)
	if err != nil {
		return err
	}
	return c.Patch(ctx, &api.User{ObjectMeta: metav1.ObjectMeta{Name: name}}, client.RawPatch(types.MergePatchType, patch))
}

func patchStatus(ctx context.Context, c client.Client, name string, status map[string]any) error {
	patch, err := json.Marshal(map[string]any{"status": status})
	if err != nil {
		return err
	}
	u := &api.User{ObjectMeta: metav1.ObjectMeta{Name: name}}
	return c.Status().Patch(ctx, u, client.RawPatch(types.MergePatchType, patch))
}
