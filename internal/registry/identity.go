package registry

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"slices"
	"strings"
	"sync"
	"time"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
)

// Identity is who a credential belongs to.
type Identity struct {
	Name   string              `json:"name"`
	UID    string              `json:"uid,omitempty"`
	Groups []string            `json:"groups,omitempty"`
	Extra  map[string][]string `json:"extra,omitempty"`
	// Robot is set for robot accounts, which the API server does not know.
	Robot *Robot `json:"robot,omitempty"`
}

// Robot says which robot account an identity is, and which of its passwords was used.
type Robot struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	UID       string `json:"uid"`
	Hash      string `json:"hash"`
}

// Authority is the API server as the registry uses it.
type Authority interface {
	// Review says whose token for an audience it is; ok is false when it is nobody's.
	Review(ctx context.Context, token, audience string) (id Identity, ok bool, err error)
	// Allowed says whether an identity may do something with the repositories of a namespace; "" is of all.
	Allowed(ctx context.Context, id Identity, verb, namespace string) (bool, error)
}

// Directory is what the registry knows of objects of the API, from a cache that is seconds old at most.
type Directory interface {
	// Namespace returns the uid of a namespace that exists and is not being deleted.
	Namespace(name string) (uid string, ok bool)
	// Exists is true of namespaces that are being deleted, too.
	Exists(namespace string) bool
	// Settings of a project; the zero value where there are none.
	Settings(project string) atoll.NamespaceRegistry
	// Robot returns a robot account.
	Robot(namespace, name string) (*atoll.RobotAccount, bool)
	// Configuration is the RegistryConfiguration.
	Configuration() atoll.RegistryConfigurationSpec
}

// ErrUnavailable says that nobody can be asked who somebody is; clients try again.
var ErrUnavailable = errors.New("people cannot be asked for")

// Errors of logging in.
var (
	errCredentials = errors.New("the name or the password is wrong, has expired or was revoked")
	errNoRobots    = errors.New("robot accounts log in as robot$NAMESPACE+NAME")
)

// authenticate says who sends a name and a password.
func (r *Registry) authenticate(ctx context.Context, name, password string) (Identity, error) {
	if password == "" {
		return Identity{}, errCredentials
	}
	if strings.HasPrefix(name, atoll.RobotPrefix) {
		return r.robot(name, password)
	}
	if strings.HasPrefix(password, jwtPrefix) && strings.Count(password, ".") == 2 {
		// Of service accounts only tokens that are for the registry are taken: what they have for the API server is not
		// to be sent here.
		if id, ok, err := r.cfg.Authority.Review(ctx, password, atoll.RegistryAudience); err != nil || ok {
			return id, err
		}
	}
	if r.cfg.Authenticate == nil {
		return Identity{}, errCredentials
	}
	id, err := r.cfg.Authenticate(ctx, name, password)
	switch {
	case errors.Is(err, ErrUnavailable):
		return Identity{}, err
	case err != nil:
		return Identity{}, errors.Join(errCredentials, err)
	case id.Name == "" || slices.Contains(id.Groups, serviceAccounts):
		return Identity{}, errCredentials
	}
	return id, nil
}

const (
	// jwtPrefix is what every JSON Web Token begins with: {" in base64.
	jwtPrefix       = "eyJ"
	serviceAccounts = "system:serviceaccounts"
)

// robot checks the password of a robot account.
func (r *Registry) robot(user, password string) (Identity, error) {
	namespace, name, ok := strings.Cut(strings.TrimPrefix(user, atoll.RobotPrefix), "+")
	if !ok {
		return Identity{}, errors.Join(errCredentials, errNoRobots)
	}
	sum := sha256.Sum256([]byte(password))
	id := Identity{Name: user, Robot: &Robot{Namespace: namespace, Name: name, Hash: hex.EncodeToString(sum[:])}}
	account, ok := r.cfg.Directory.Robot(namespace, name)
	if !ok {
		return Identity{}, errCredentials
	}
	id.Robot.UID = string(account.UID)
	if !r.robotStands(id.Robot) {
		return Identity{}, errCredentials
	}
	return id, nil
}

// robotStands says whether a robot account still is what it was when its token was made.
func (r *Registry) robotStands(robot *Robot) bool {
	a, ok := r.cfg.Directory.Robot(robot.Namespace, robot.Name)
	switch {
	case !ok || a.DeletionTimestamp != nil || string(a.UID) != robot.UID || a.Status.SecretHash == "":
		return false
	case a.Spec.ExpiresAt != nil && !r.now().Before(a.Spec.ExpiresAt.Time):
		return false
	}
	return subtle.ConstantTimeCompare([]byte(a.Status.SecretHash), []byte(robot.Hash)) == 1
}

// Actions of Docker's token specification.
const (
	actionPull   = "pull"
	actionPush   = "push"
	actionDelete = "delete"
	actionList   = "list"
)

// verbOf is what an action is called in Kubernetes.
func verbOf(action string) string {
	switch action {
	case actionPull:
		return "get"
	case actionPush:
		return "update"
	default:
		return action
	}
}

// allowed says whether an identity may do something in a project.
func (r *Registry) allowed(ctx context.Context, id Identity, project, action string) (bool, error) {
	library := project == atoll.RegistryLibrary
	if library && action == actionPull {
		return true, nil
	}
	if id.Robot != nil {
		return !library && r.robotAllowed(id.Robot, project, action), nil
	}
	if library {
		return r.rights.allowed(ctx, id, verbOf(action), "")
	}
	if _, ok := r.cfg.Directory.Namespace(project); !ok {
		return false, nil
	}
	return r.rights.allowed(ctx, id, verbOf(action), project)
}

func (r *Registry) robotAllowed(robot *Robot, project, action string) bool {
	if robot.Namespace != project || !r.robotStands(robot) {
		return false
	}
	if _, ok := r.cfg.Directory.Namespace(project); !ok {
		return false
	}
	account, ok := r.cfg.Directory.Robot(robot.Namespace, robot.Name)
	if !ok {
		return false
	}
	push := slices.Contains(account.Spec.Permissions, atoll.RobotPush)
	switch action {
	case actionPull:
		return push || slices.Contains(account.Spec.Permissions, atoll.RobotPull)
	case actionPush:
		return push
	default:
		return false
	}
}

const (
	// rightsKept is how long an answer of the API server is used again.
	rightsKept = 5 * time.Second
	rightsMax  = 4096
)

// rights asks the API server what identities may do.
type rights struct {
	authority Authority
	now       func() time.Time

	mu      sync.Mutex // guards answers
	answers map[string]answer
}

type answer struct {
	allowed bool
	until   time.Time
}

func (r *rights) allowed(ctx context.Context, id Identity, verb, namespace string) (bool, error) {
	key := strings.Join(append([]string{id.Name, id.UID, verb, namespace}, id.Groups...), "\x00")
	now := r.now()
	r.mu.Lock()
	known, ok := r.answers[key]
	r.mu.Unlock()
	if ok && now.Before(known.until) {
		return known.allowed, nil
	}
	allowed, err := r.authority.Allowed(ctx, id, verb, namespace)
	if err != nil {
		return false, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.answers == nil || len(r.answers) >= rightsMax {
		r.answers = make(map[string]answer)
	}
	r.answers[key] = answer{allowed: allowed, until: now.Add(rightsKept)}
	return allowed, nil
}
