package identity

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"

	"atoll.dev/atoll/internal/identity/attempts"
	"atoll.dev/atoll/internal/identity/token"
)

// SessionExtra is the extra of a local user in Kubernetes with the id of the session. It is in the audit log.
const SessionExtra = "atoll.dev/session"

// WebhookPath is where the API server asks.
const WebhookPath = "/authenticate"

// Bearer tells who a token belongs to: a local one by memory, any other by asking the API server, which knows
// service accounts and IdentityProviders.
func (s *Service) Bearer(ctx context.Context, text string) (Person, error) {
	if !s.isStarted() {
		return Person{}, ErrNotReady
	}
	if token.Ours(text) {
		return s.Review(ctx, text)
	}
	if !token.Looks(text) {
		return Person{}, ErrNoSession
	}
	source := attempts.Source(sourceOf(ctx))
	if until := s.sources.LockedUntil(source); !until.IsZero() {
		return Person{}, LockedError{until}
	}
	leave, ok := s.gate.Enter(source, perSource)
	if !ok {
		return Person{}, ErrBusy
	}
	defer leave()
	review := &authenticationv1.TokenReview{Spec: authenticationv1.TokenReviewSpec{Token: text}}
	if err := s.client.Create(ctx, review); err != nil {
		return Person{}, fmt.Errorf("asking who a token belongs to: %w", err)
	}
	if !review.Status.Authenticated {
		return Person{}, ErrNoSession
	}
	u := review.Status.User
	return Person{Name: u.Username, UID: u.UID, Groups: u.Groups}, nil
}

// serveWebhook answers the API server until ctx ends.
func (s *Service) serveWebhook(ctx context.Context, ready func()) error {
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", s.cfg.WebhookAddress)
	if err != nil {
		return fmt.Errorf("listening for the API server: %w", err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("POST "+WebhookPath, s.answerReview)
	srv := &http.Server{
		Handler: mux, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: 10 * time.Second,
		MaxHeaderBytes: 16 << 10,
		ErrorLog:       slog.NewLogLogger(s.cfg.Logger.Handler(), slog.LevelDebug),
		TLSConfig: &tls.Config{
			MinVersion: tls.VersionTLS12,
			GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
				pair, err := tls.LoadX509KeyPair(s.cfg.CertFile, s.cfg.KeyFile)
				return &pair, err
			},
		},
	}
	stop := context.AfterFunc(ctx, func() { _ = srv.Close() })
	defer stop()
	ready()
	if err := srv.ServeTLS(l, "", ""); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("answering the API server: %w", err)
	}
	return nil
}

// answerReview says whose token it is. A token that is not known is no error.
func (s *Service) answerReview(w http.ResponseWriter, r *http.Request) {
	var review authenticationv1.TokenReview
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 64<<10)).Decode(&review); err != nil {
		http.Error(w, "not a TokenReview", http.StatusBadRequest)
		return
	}
	status := authenticationv1.TokenReviewStatus{}
	switch p, err := s.Review(r.Context(), review.Spec.Token); {
	case err == nil:
		status.Authenticated = true
		status.User = authenticationv1.UserInfo{
			Username: p.Name, UID: p.UID, Groups: p.Groups,
			Extra: map[string]authenticationv1.ExtraValue{SessionExtra: {p.Session}},
		}
	case !errors.Is(err, ErrNoSession):
		status.Error = err.Error()
	}
	review.Spec, review.Status = authenticationv1.TokenReviewSpec{}, status
	w.Header().Set("Content-Type", "application/json")
	if err := json.NewEncoder(w).Encode(review); err != nil {
		s.cfg.Logger.Debug("answering the API server failed", "error", err)
	}
}
