// Package token makes and checks the tokens of sessions: JSON Web Tokens signed with HMAC-SHA-256.
//
// They are JWTs because clients of VMware's login read the time of expiry from them. Only the server that made a
// token checks it, so the key is a shared one, the header is fixed text (there is no other algorithm to be talked
// into), and a good signature is not enough: internal/identity looks the session up, too.
//
// It does no I/O. What can go wrong is one error, ErrInvalid, that does not say why.
package token

import (
	"bytes"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"strings"
	"time"
)

// Issuer is the claim iss of all tokens. No IdentityProvider may have it.
const Issuer = "https://portal.atoll.local"

// Uses of a token.
const (
	// Access is shown to the API server and the registry.
	Access = "access"
	// Refresh is exchanged for new access tokens, at the portal only.
	Refresh = "refresh"
)

// KeySize is the size of a key in bytes.
const KeySize = 32

// maxSize of a token.
const maxSize = 2048

// header is {"alg":"HS256","typ":"JWT"}.
const header = "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9"

// ErrInvalid says that a text is no token that is valid now.
var ErrInvalid = errors.New("the token is not valid")

// Claims are what a token says.
type Claims struct {
	Issuer string `json:"iss"`
	// Subject is the name in Kubernetes, Username the name and domain.
	Subject  string `json:"sub"`
	Username string `json:"username"`
	Domain   string `json:"domain"`
	// ID is the secret name of the session.
	ID       string `json:"jti"`
	Use      string `json:"use"`
	IssuedAt int64  `json:"iat"`
	Expires  int64  `json:"exp"`
}

// Signer makes and checks tokens with one key.
type Signer struct{ key []byte }

// NewKey makes a key.
func NewKey() []byte {
	key := make([]byte, KeySize)
	_, _ = rand.Read(key) // never fails
	return key
}

// NewSigner takes a key of KeySize bytes.
func NewSigner(key []byte) (*Signer, error) {
	if len(key) != KeySize {
		return nil, errors.New("the key of sessions has the wrong size")
	}
	return &Signer{key: bytes.Clone(key)}, nil
}

// NewID makes the secret name of a session, 256 bits.
func NewID() string {
	var id [32]byte
	_, _ = rand.Read(id[:]) // never fails
	return base64.RawURLEncoding.EncodeToString(id[:])
}

// Digest is what is stored of an ID.
func Digest(id string) string {
	sum := sha256.Sum256([]byte(id))
	return hex.EncodeToString(sum[:16])
}

// Sign makes a token of the claims; it sets the issuer.
func (s *Signer) Sign(c Claims) (string, error) {
	c.Issuer = Issuer
	payload, err := json.Marshal(c)
	if err != nil {
		return "", err
	}
	text := header + "." + base64.RawURLEncoding.EncodeToString(payload)
	return text + "." + base64.RawURLEncoding.EncodeToString(s.mac(text)), nil
}

// Verify checks signature, issuer, use and time.
func (s *Signer) Verify(text, use string, now time.Time) (Claims, error) {
	signed, signature, ok := cutLast(text)
	if !ok || len(text) > maxSize {
		return Claims{}, ErrInvalid
	}
	payload, ok := strings.CutPrefix(signed, header+".")
	if !ok {
		return Claims{}, ErrInvalid
	}
	mac, err := base64.RawURLEncoding.Strict().DecodeString(signature)
	if err != nil || !hmac.Equal(mac, s.mac(signed)) {
		return Claims{}, ErrInvalid
	}
	c, err := decode(payload)
	if err != nil || c.Issuer != Issuer || c.Use != use || c.ID == "" {
		return Claims{}, ErrInvalid
	}
	if at := now.Unix(); at >= c.Expires || at < c.IssuedAt-int64(time.Minute/time.Second) {
		return Claims{}, ErrInvalid
	}
	return c, nil
}

// Looks tells whether a text has the form of a JWT, of whatever issuer. It says nothing about its validity.
func Looks(text string) bool {
	return strings.HasPrefix(text, "eyJ") && strings.Count(text, ".") == 2 && len(text) <= 32<<10
}

// Ours tells whether a text claims to be a token of this package.
func Ours(text string) bool { return strings.HasPrefix(text, header+".") && len(text) <= maxSize }

func (s *Signer) mac(text string) []byte {
	h := hmac.New(sha256.New, s.key)
	h.Write([]byte(text))
	return h.Sum(nil)
}

func cutLast(text string) (before, after string, ok bool) {
	i := strings.LastIndexByte(text, '.')
	if i < 0 {
		return "", "", false
	}
	return text[:i], text[i+1:], true
}

func decode(payload string) (Claims, error) {
	var c Claims
	raw, err := base64.RawURLEncoding.Strict().DecodeString(payload)
	if err != nil {
		return c, err
	}
	return c, json.Unmarshal(raw, &c)
}
