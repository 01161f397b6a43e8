// Package directory looks up local users and the groups they are in.
//
// It reads from a cache that a watch keeps up to date, so that an answer costs no request and a change counts within
// a moment; or from the API server, where somebody logs in. It knows nothing about passwords or sessions. internal/identity is the caller.
package directory

import (
	"context"
	"fmt"
	"regexp"
	"slices"
	"strings"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"sigs.k8s.io/controller-runtime/pkg/client"

	api "atoll.dev/atoll/api/atoll/v1alpha1"
)

// Directory reads Users and Groups.
type Directory struct{ reader client.Reader }

// New makes a directory on a cache or a client.
func New(reader client.Reader) *Directory { return &Directory{reader: reader} }

// User returns a user, nil when there is none of the name.
func (d *Directory) User(ctx context.Context, name string) (*api.User, error) {
	u := &api.User{}
	err := d.reader.Get(ctx, client.ObjectKey{Name: name}, u)
	switch {
	case apierrors.IsNotFound(err):
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("looking up user %s: %w", name, err)
	}
	return u, nil
}

// Groups are the names that the groups of a user have in Kubernetes, sorted.
func (d *Directory) Groups(ctx context.Context, user string) ([]string, error) {
	var list api.GroupList
	if err := d.reader.List(ctx, &list, client.UnsafeDisableDeepCopy); err != nil {
		return nil, fmt.Errorf("looking up the groups of %s: %w", user, err)
	}
	var out []string
	for _, name := range GroupsOf(list.Items, user) {
		out = append(out, api.LocalSubject(name))
	}
	return out, nil
}

// GroupsOf are the names of the groups that a user is in, itself or by way of other groups, sorted. Circles do no
// harm: a group is looked at once.
func GroupsOf(groups []api.Group, user string) []string {
	holders := map[string][]string{} // by the group they hold
	var in []string
	seen := map[string]bool{}
	add := func(name string) {
		if !seen[name] {
			seen[name] = true
			in = append(in, name)
		}
	}
	for _, g := range groups {
		for _, inner := range g.Spec.Groups {
			holders[inner] = append(holders[inner], g.Name)
		}
		if slices.Contains(g.Spec.Members, user) {
			add(g.Name)
		}
	}
	for i := 0; i < len(in); i++ {
		for _, holder := range holders[in[i]] {
			add(holder)
		}
	}
	slices.Sort(in)
	return in
}

// Reaches tells whether from holds to, itself or by way of other groups: adding the first to the second would close a circle.
func Reaches(groups []api.Group, from, to string) bool {
	byName := map[string]api.Group{}
	for _, g := range groups {
		byName[g.Name] = g
	}
	todo, seen := []string{from}, map[string]bool{from: true}
	for i := 0; i < len(todo); i++ {
		if todo[i] == to {
			return true
		}
		for _, inner := range byName[todo[i]].Spec.Groups {
			if !seen[inner] {
				seen[inner] = true
				todo = append(todo, inner)
			}
		}
	}
	return false
}

// LocalName turns what a person typed into the name of a User: NAME, NAME@atoll.local or sso:NAME@atoll.local, in
// capitals or not. ok is false when no User can have the name.
func LocalName(typed string) (name string, ok bool) {
	if len(typed) > 128 {
		return "", false
	}
	name = strings.TrimPrefix(strings.ToLower(typed), api.SubjectPrefix)
	name = strings.TrimSuffix(name, "@"+api.LocalDomain)
	pattern := regexp.MustCompile(`^[a-z0-9]([-._a-z0-9]*[a-z0-9])?$`)
	return name, len(name) <= 63 && pattern.MatchString(name)
}
