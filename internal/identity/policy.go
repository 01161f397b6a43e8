package identity

import (
	"context"
	"fmt"
	"strconv"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"sigs.k8s.io/controller-runtime/pkg/client"

	api "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/internal/identity/attempts"
	"atoll.dev/atoll/internal/identity/password"
)

// PolicyName is the ConfigMap in atoll-system with which an administrator changes the rules below. Each entry is
// optional; one that is no number, or out of bounds, is as if it were not there.
const PolicyName = "identity-policy"

// Entries of the ConfigMap.
const (
	policyMinLength = "passwordMinLength"
	policyMaxAge    = "passwordMaxAgeDays"
	policyLockAfter = "lockAfterFailures"
	policySession   = "sessionHours"
	policyBanner    = "loginBanner"
)

// policy is what holds for everybody.
type policy struct {
	password password.Policy
	// maxAge of a password, 0 for any.
	maxAge time.Duration
	// lockAfter failures; 0 is the default.
	lockAfter int
	// session is how long a login is good for; 0 is the default.
	session time.Duration
	banner  string
}

const (
	defaultLockAfter = 5
	defaultSession   = 10 * time.Hour
	maxSession       = 7 * 24 * time.Hour
	maxBanner        = 4096
)

// userRule locks users.
func userRule(p policy) attempts.Rule {
	after := p.lockAfter
	if after == 0 {
		after = defaultLockAfter
	}
	return attempts.Rule{After: after, First: 30 * time.Second, Most: 15 * time.Minute}
}

// lifetime of a session.
func (p policy) lifetime() time.Duration {
	if p.session == 0 {
		return defaultSession
	}
	return p.session
}

// policy reads the rules.
func (s *Service) policy(ctx context.Context) (policy, error) {
	m := &corev1.ConfigMap{}
	err := s.client.Get(ctx, client.ObjectKey{Namespace: api.IdentityNamespace, Name: PolicyName}, m)
	if err != nil && !apierrors.IsNotFound(err) {
		return policy{}, fmt.Errorf("reading the policy of passwords: %w", err)
	}
	p, wrong := parsePolicy(m.Data)
	for _, entry := range wrong {
		s.cfg.Logger.Warn("an entry of the policy of passwords is ignored", "configMap", api.IdentityNamespace+"/"+PolicyName, "entry", entry)
	}
	return p, nil
}

// parsePolicy reads the entries and names those that are wrong.
func parsePolicy(data map[string]string) (p policy, wrong []string) {
	number := func(key string, least, most int) int {
		text, ok := data[key]
		if !ok {
			return 0
		}
		n, err := strconv.Atoi(text)
		if err != nil || n < least || n > most {
			wrong = append(wrong, key)
			return 0
		}
		return n
	}
	const day = 24 * time.Hour
	p.password.MinLength = number(policyMinLength, 8, password.MaxBytes)
	p.maxAge = time.Duration(number(policyMaxAge, 0, 3650)) * day
	p.lockAfter = number(policyLockAfter, 1, 100)
	p.session = time.Duration(number(policySession, 1, int(maxSession/time.Hour))) * time.Hour
	if p.banner = data[policyBanner]; len(p.banner) > maxBanner {
		p.banner, wrong = "", append(wrong, policyBanner)
	}
	return p, wrong
}

// Banner is what people are shown before they log in.
func (s *Service) Banner(ctx context.Context) string {
	if !s.isStarted() {
		return ""
	}
	p, err := s.policy(ctx)
	if err != nil {
		return ""
	}
	return p.banner
}
