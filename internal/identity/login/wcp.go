package login

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strconv"

	"atoll.dev/atoll/internal/identity"
)

// WCPSession is the answer to POST /wcp/login.
type WCPSession struct {
	SessionID string `json:"session_id"`
}

// WCPWorkload is one namespace in the answer to GET /wcp/workloads. The port is there twice: clients that are known
// look for the name with the mistake in it.
type WCPWorkload struct {
	Namespace       string   `json:"namespace"`
	MasterHost      string   `json:"master_host"`
	Port            string   `json:"control_plane_api_server_port"`
	MisspelledPort  string   `json:"conrol_plane_api_server_port"`
	ControlPlaneDNS []string `json:"control_plane_dns_names"`
}

func (h *Handler) banner(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	_, _ = io.WriteString(w, h.cfg.Banner(r.Context()))
}

// wcpLogin begins a session whose token lives as long as the session: the plug-in cannot refresh.
func (h *Handler) wcpLogin(w http.ResponseWriter, r *http.Request) {
	var wanted struct {
		Cluster   string `json:"guest_cluster_name"`
		Namespace string `json:"guest_cluster_namespace"`
	}
	if err := json.NewDecoder(r.Body).Decode(&wanted); err != nil && !errors.Is(err, io.EOF) {
		http.Error(w, "the body is not JSON", http.StatusBadRequest)
		return
	}
	name, password, ok := r.BasicAuth()
	if !ok {
		h.wcpFail(w, identity.ErrRefused)
		return
	}
	t, err := h.cfg.People.Login(r.Context(), name, password, true)
	if err != nil {
		h.wcpFail(w, err)
		return
	}
	if wanted.Cluster != "" || wanted.Namespace != "" {
		if err := h.cfg.People.Logout(r.Context(), t.Access); err != nil {
			h.wcpFail(w, err)
			return
		}
		http.Error(w, "this supervisor has no guest clusters: log in without naming one", http.StatusNotImplemented)
		return
	}
	h.answer(w, WCPSession{SessionID: t.Access})
}

// wcpWorkloads lists namespaces for a token or a password.
func (h *Handler) wcpWorkloads(w http.ResponseWriter, r *http.Request) {
	text := bearer(r)
	if name, password, ok := r.BasicAuth(); ok {
		t, err := h.cfg.People.Login(r.Context(), name, password, true)
		if err != nil {
			h.wcpFail(w, err)
			return
		}
		text = t.Access
		defer func() {
			if err := h.cfg.People.Logout(r.Context(), text); err != nil {
				h.cfg.Logger.Debug("ending the session of a list of namespaces failed", "error", err)
			}
		}()
	}
	p, err := h.cfg.People.Bearer(r.Context(), text)
	if err != nil {
		h.wcpFail(w, err)
		return
	}
	all, err := h.cfg.People.Namespaces(r.Context(), p)
	if err != nil {
		h.wcpFail(w, err)
		return
	}
	out := []WCPWorkload{}
	for _, a := range all {
		port := strconv.Itoa(h.cfg.APIPort)
		out = append(out, WCPWorkload{Namespace: a.Namespace, MasterHost: h.host(r), Port: port, MisspelledPort: port, ControlPlaneDNS: []string{}})
	}
	h.answer(w, out)
}

// wcpFail answers with plain text, which the plug-in prints.
func (h *Handler) wcpFail(w http.ResponseWriter, err error) {
	code, text := status(err)
	if code == http.StatusInternalServerError {
		h.cfg.Logger.Error("a login request failed", "error", err)
	}
	if code == http.StatusUnauthorized {
		w.Header().Set("WWW-Authenticate", `Basic realm="atoll"`)
	}
	http.Error(w, text, code)
}
