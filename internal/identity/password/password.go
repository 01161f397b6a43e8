// Package password says which passwords are good enough, hashes them with bcrypt, compares them and makes new ones.
//
// bcrypt and not argon2id, because the memory of argon2id would be that of the server process, which holds the whole
// control plane; hashes are kept in Secrets, which are encrypted in etcd. What bcrypt does not look at, the bytes
// after the 72nd, is refused rather than ignored. Comparing is bounded: few at a time and few that wait, so that
// guessing cannot take the processors away from the API server.
//
// internal/identity compares, the command line sets. Errors say what to do differently and never hold a password.
package password

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"math/big"
	"strings"
	"unicode"
	"unicode/utf8"

	"golang.org/x/crypto/bcrypt"
)

const (
	// cost makes one comparison take about a tenth of a second.
	cost = 11
	// MaxBytes is what bcrypt takes.
	MaxBytes = 72
	// DefaultMinLength is the least number of characters.
	DefaultMinLength = 12
	// leastMinLength is what no policy goes below.
	leastMinLength = 8
	// maxWaiting is how many comparisons may wait for their turn.
	maxWaiting = 32
)

// ErrBusy says that too many people log in at once.
var ErrBusy = errors.New("too many logins at once; try again in a moment")

// Policy is what a password must be like.
type Policy struct {
	// MinLength in characters; 0 is DefaultMinLength.
	MinLength int
}

// Check says what is wrong with a new password of a user.
func (p Policy) Check(user, password string) error {
	least := p.MinLength
	if least == 0 {
		least = DefaultMinLength
	}
	least = max(least, leastMinLength)
	switch length := utf8.RuneCountInString(password); {
	case !utf8.ValidString(password):
		return errors.New("the password is not UTF-8 text")
	case length < least:
		return fmt.Errorf("the password has %d characters; use at least %d", length, least)
	case len(password) > MaxBytes:
		return fmt.Errorf("the password has %d bytes; use at most %d", len(password), MaxBytes)
	case strings.ContainsFunc(password, unicode.IsControl):
		return errors.New("the password has control characters; leave them out")
	}
	low := strings.ToLower(password)
	if user = strings.ToLower(user); user != "" && strings.Contains(low, user) {
		return errors.New("the password contains the name of the user; choose another")
	}
	kinds := map[rune]bool{}
	for _, r := range low {
		kinds[r] = true
	}
	if len(kinds) < 5 {
		return fmt.Errorf("the password is made of only %d different characters; use at least 5", len(kinds))
	}
	return nil
}

// Hash makes what is stored.
func Hash(password string) (string, error) {
	hash, err := bcrypt.GenerateFromPassword([]byte(password), cost)
	if err != nil {
		return "", fmt.Errorf("hashing the password: %w", err)
	}
	return string(hash), nil
}

// alphabet has no characters that look like others.
const alphabet = "abcdefghijkmnpqrstuvwxyzABCDEFGHJKLMNPQRSTUVWXYZ23456789"

// Generate makes a password of four groups of five characters, 116 bits.
func Generate() (string, error) {
	var out strings.Builder
	for i := range 20 {
		if i > 0 && i%5 == 0 {
			out.WriteByte('-')
		}
		n, err := rand.Int(rand.Reader, big.NewInt(int64(len(alphabet))))
		if err != nil {
			return "", fmt.Errorf("making a password: %w", err)
		}
		out.WriteByte(alphabet[n.Int64()])
	}
	return out.String(), nil
}

// Comparer compares passwords, a bounded number at a time.
type Comparer struct {
	slots   chan struct{}
	waiting chan struct{}
	// decoy is the hash of a password that nobody has.
	decoy string
}

// NewComparer makes one that compares up to parallel passwords at a time.
func NewComparer(parallel int) (*Comparer, error) {
	secret, err := Generate()
	if err != nil {
		return nil, err
	}
	decoy, err := Hash(secret)
	if err != nil {
		return nil, err
	}
	parallel = max(parallel, 1)
	return &Comparer{slots: make(chan struct{}, parallel), waiting: make(chan struct{}, maxWaiting+parallel), decoy: decoy}, nil
}

// Matches compares. An empty hash takes as long as any and matches nothing. It fails with ErrBusy or that of ctx.
func (c *Comparer) Matches(ctx context.Context, hash, password string) (bool, error) {
	select {
	case c.waiting <- struct{}{}:
		defer func() { <-c.waiting }()
	default:
		return false, ErrBusy
	}
	select {
	case c.slots <- struct{}{}:
		defer func() { <-c.slots }()
	case <-ctx.Done():
		return false, ctx.Err()
	}
	against := hash
	if against == "" {
		against = c.decoy
	}
	if len(password) > MaxBytes {
		password, hash = password[:MaxBytes], ""
	}
	err := bcrypt.CompareHashAndPassword([]byte(against), []byte(password))
	return err == nil && hash != "", nil
}
