package registry

import (
	"net/http"
	"slices"
	"strings"

	atoll "atoll.dev/atoll/api/atoll/v1alpha1"
)

// deny answers somebody who is known and may not do something. Clients that push ask with HEAD first for what is there,
// and what they print then has no reason in it, as there is no body: to them nothing is there, and the reason comes with
// what they do next.
func (r *Registry) deny(w http.ResponseWriter, req *http.Request, c *call, token *claims, action string) {
	if req.Method == http.MethodHead && slices.Contains(token.Pushes, c.name) {
		writeError(w, http.StatusNotFound, codeNameUnknown, "there is nothing that you may see")
		return
	}
	id := token.Identity
	if _, there := r.cfg.Directory.Namespace(c.project); !there && id.Robot == nil && c.project != atoll.RegistryLibrary {
		// Who may it everywhere may know that it is the namespace that is missing.
		if everywhere, err := r.rights.allowed(req.Context(), id, verbOf(action), ""); err == nil && everywhere {
			writeError(w, http.StatusNotFound, codeNameUnknown, "there is no namespace "+c.project+", or it is being deleted")
			return
		}
	}
	writeError(w, http.StatusForbidden, codeDenied, denied(id, c.name, c.project, action))
}

// denied says what somebody may not do, and whom to ask.
func denied(id Identity, repository, project, action string) string {
	what := id.Name + " may not " + action + " " + repository + ": "
	switch {
	case project == atoll.RegistryLibrary:
		return what + "project library is for administrators to push to"
	case id.Robot != nil && id.Robot.Namespace != project:
		return what + "a robot account is for the project of its own namespace, " + id.Robot.Namespace
	case id.Robot != nil && action == actionDelete:
		return what + "robot accounts do not delete; a person with the role Edit does"
	case id.Robot != nil:
		return what + "spec.permissions of RobotAccount " + id.Robot.Name + " in namespace " + project + " does not have it"
	case strings.HasPrefix(id.Name, "system:serviceaccount:"):
		return what + "pods pull from the project of their own namespace and from library"
	}
	role := "Edit"
	if action == actionPull || action == actionList {
		role = "View"
	}
	return what + "it takes the role " + role + " in namespace " + project + ", which its owners give (or there is no such namespace)"
}

// refuseName answers for a name that no repository can have. As with deny, HEAD leads to the request that has a body.
func refuseName(w http.ResponseWriter, req *http.Request, name string) {
	status := http.StatusBadRequest
	if req.Method == http.MethodHead {
		status = http.StatusNotFound
	}
	message := "the name of a repository is NAMESPACE/NAME, in lower case and at most 255 bytes long"
	if !strings.Contains(name, "/") {
		message += ": " + name + " does not say which namespace"
	}
	writeError(w, status, codeNameInvalid, message)
}

// pushesTo are the repositories that a client has asked to push to.
func pushesTo(asked []scope) []string {
	var out []string
	for _, s := range asked {
		if slices.Contains(s.Actions, actionPush) {
			out = append(out, s.Name)
		}
	}
	return out
}
