package registry

import (
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4/jwt"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/apimachinery/pkg/util/wait"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
)

// Identity is who a credential belongs to.
type Identity struct {
	Name   string              `json:"name"`
	UID    string              `json:"uid,omitempty"`
	Groups []string            `json:"groups,omitempty"`
	Extra  map[string][]string `json:"extra,omitempty"`
	// Session and Generation are by what People know whether somebody whom they have let in still may be.
	Session    string `json:"session,omitempty"`
	Generation int64  `json:"generation,omitempty"`
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
	// RobotHash is the SecretHash of a robot account as of now; "" when there is none.
	RobotHash(ctx context.Context, namespace, name string) (string, error)
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

// People are those who log in with a password or a session.
type People interface {
	// Authenticate checks a password, or the token of a session in its place. Its errors are refusals, other than
	// ErrUnavailable and ErrBusy.
	Authenticate(ctx context.Context, name, password string) (Identity, error)
	// Stands says whether somebody whom Authenticate has let in may still be, and in which groups. It is asked at each
	// request, and answers from memory.
	Stands(ctx context.Context, id Identity) (now Identity, ok bool, err error)
	// Known says whether there is somebody of a name that was typed. People type passwords there as well.
	Known(ctx context.Context, name string) bool
}

// ErrUnavailable says that nobody can be asked who somebody is, ErrBusy that too many ask; clients try again.
var (
	ErrUnavailable = errors.New("people cannot be asked for")
	ErrBusy        = errors.New("too many log in at the same time; try again in a moment")
)

// Errors of logging in.
var (
	errCredentials = errors.New("the name or the password is wrong, has expired or was revoked")
	errNoRobots    = errors.New("robot accounts log in as robot$NAMESPACE+NAME")
)

// authenticate says who sends a name and a password from an address.
func (r *Registry) authenticate(ctx context.Context, source, name, password string) (Identity, error) {
	if password == "" {
		return Identity{}, errCredentials
	}
	if strings.HasPrefix(name, atoll.RobotPrefix) {
		return r.robot(ctx, name, password)
	}
	// Of service accounts only tokens that are for the registry are taken: what they have for the API server is not to be
	// sent here.
	if isForRegistry(password) {
		return r.review(ctx, source, password)
	}
	if r.cfg.People == nil {
		return Identity{}, errCredentials
	}
	id, err := r.cfg.People.Authenticate(ctx, name, password)
	switch {
	case errors.Is(err, ErrUnavailable) || errors.Is(err, ErrBusy):
		return Identity{}, err
	case err != nil:
		return Identity{}, errors.Join(errCredentials, err)
	case id.Name == "" || slices.Contains(id.Groups, serviceAccounts):
		return Identity{}, errCredentials
	}
	return id, nil
}

const (
	serviceAccounts = "system:serviceaccounts"
	maxToken        = 32 << 10
)

// isForRegistry says whether a text is a JSON Web Token that claims to be for the registry. Whether it is anybody's is not
// looked at.
func isForRegistry(text string) bool {
	parts := strings.Split(text, ".")
	if len(parts) != 3 || len(text) > maxToken {
		return false
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		return false
	}
	var c struct {
		Audience jwt.Audience `json:"aud"`
	}
	return json.Unmarshal(payload, &c) == nil && c.Audience.Contains(atoll.RegistryAudience)
}

// review asks the API server whose a token is, for not too many at a time: anybody may send one. A source that has sent
// tokens of nobody is not locked, since a host pulls for all its pods and these may have its address.
func (r *Registry) review(ctx context.Context, source, token string) (Identity, error) {
	done, ok := r.reviews.take(ctx, source, 1)
	if !ok {
		return Identity{}, ErrBusy
	}
	defer done()
	id, ok, err := r.cfg.Authority.Review(ctx, token, atoll.RegistryAudience)
	if err == nil && !ok {
		err = errCredentials
	}
	return id, err
}

// stands looks whether the owner of a token may still be who it is, and what groups it is in by now.
func (r *Registry) stands(ctx context.Context, id Identity) (Identity, bool, error) {
	switch {
	case id.Robot != nil:
		return id, r.robotStands(id.Robot), nil
	case r.cfg.People == nil || slices.Contains(id.Groups, serviceAccounts):
		return id, true, nil
	}
	return r.cfg.People.Stands(ctx, id)
}

// loggable is a name that somebody has tried to log in as, or "" when that may be a password.
func (r *Registry) loggable(ctx context.Context, name string) string {
	if len(name) > maxLogged {
		return ""
	}
	if strings.HasPrefix(name, atoll.RobotPrefix) {
		if _, _, ok := robotName(name); ok {
			return name
		}
		return ""
	}
	if r.cfg.People != nil && r.cfg.People.Known(ctx, name) {
		return name
	}
	return ""
}

// maxLogged is how many bytes a name may have that is logged.
const maxLogged = 128

// robotName is which robot account a user name is of. Whether there is one is not looked at.
func robotName(user string) (namespace, name string, ok bool) {
	namespace, name, ok = strings.Cut(strings.TrimPrefix(user, atoll.RobotPrefix), "+")
	return namespace, name, ok && projectName.MatchString(namespace) && len(validation.IsDNS1123Subdomain(name)) == 0
}

// robot checks the password of a robot account.
func (r *Registry) robot(ctx context.Context, user, password string) (Identity, error) {
	namespace, name, ok := robotName(user)
	if !ok {
		return Identity{}, errors.Join(errCredentials, errNoRobots)
	}
	sum := sha256.Sum256([]byte(password))
	robot := &Robot{Namespace: namespace, Name: name, Hash: hex.EncodeToString(sum[:])}
	if !r.robotSeen(robot) {
		if err := r.awaitRobot(ctx, robot); err != nil {
			return Identity{}, err
		}
	}
	return Identity{Name: user, Robot: robot}, nil
}

// robotSeen says whether the directory has a robot account with that password, and notes its uid.
func (r *Registry) robotSeen(robot *Robot) bool {
	account, ok := r.cfg.Directory.Robot(robot.Namespace, robot.Name)
	if !ok {
		return false
	}
	robot.UID = string(account.UID)
	return r.robotStands(robot)
}

const (
	// robotWithin is how long the directory may take to see a robot account that the API server has.
	robotWithin = 25 * time.Second
	// robotQuestions are questions to the API server about robot accounts in a second: anybody may send a wrong password.
	robotQuestions = 20
)

// awaitRobot waits for the directory if the API server has the password already: people use it as soon as they have it.
func (r *Registry) awaitRobot(ctx context.Context, robot *Robot) error {
	if !r.questions.Allow() {
		return errCredentials
	}
	ask := func() error {
		hash, err := r.cfg.Authority.RobotHash(ctx, robot.Namespace, robot.Name)
		if err != nil {
			return errors.Join(ErrUnavailable, err)
		}
		if subtle.ConstantTimeCompare([]byte(hash), []byte(robot.Hash)) != 1 {
			return errCredentials
		}
		return nil
	}
	if err := ask(); err != nil {
		return err
	}
	err := wait.PollUntilContextTimeout(ctx, 50*time.Millisecond, robotWithin, true, func(context.Context) (bool, error) {
		account, ok := r.cfg.Directory.Robot(robot.Namespace, robot.Name)
		return ok && account.Status.SecretHash == robot.Hash, nil
	})
	if err != nil { // or it has changed again
		return cmp.Or(ask(), errors.Join(ErrUnavailable, fmt.Errorf("robot account %s of namespace %s is not known here yet: %w", robot.Name, robot.Namespace, err)))
	}
	if !r.robotSeen(robot) { // it has expired, or is being deleted
		return errCredentials
	}
	return nil
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
