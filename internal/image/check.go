package image

import (
	"errors"
	"fmt"
	"path"
	"regexp"
	"slices"
	"strings"

	"github.com/distribution/reference"
)

var (
	packageName = regexp.MustCompile(`^[a-z0-9][a-z0-9+.-]+(=[A-Za-z0-9.+:~-]+)?$`)
	accountName = regexp.MustCompile(`^[a-z_][a-z0-9_-]*$`)
	portPattern = regexp.MustCompile(`^[0-9]{1,5}(/(tcp|udp|sctp))?$`)
	envPattern  = regexp.MustCompile(`^[^=]+=`)
)

// check reports everything wrong with the recipe, each with its field.
func (r *Recipe) check() error {
	var errs []error
	fail := func(field, format string, args ...any) {
		errs = append(errs, fmt.Errorf("%s: %s", field, fmt.Sprintf(format, args...)))
	}
	imagePath := func(field, value string) {
		if !path.IsAbs(value) || path.Clean(value) != value {
			fail(field, "%q is not an absolute, clean path", value)
		}
	}
	if len(r.Names) == 0 {
		fail("names", "an image needs at least one name")
	}
	for i, name := range r.Names {
		if err := checkName(name); err != nil {
			fail(fmt.Sprintf("names[%d]", i), "%v", err)
		}
		if slices.Contains(r.Names[:i], name) {
			fail(fmt.Sprintf("names[%d]", i), "%q is listed twice", name)
		}
	}
	for i, pkg := range r.Debian {
		if !packageName.MatchString(pkg) {
			fail(fmt.Sprintf("debian[%d]", i), "%q is not a package name", pkg)
		}
	}
	for i, keep := range r.Keep {
		if keep != "docs" && keep != "locales" {
			fail(fmt.Sprintf("keep[%d]", i), `%q is not "docs" or "locales"`, keep)
		}
	}
	r.checkPrograms(fail, imagePath)
	r.checkAccounts(fail)
	r.checkTree(fail, imagePath)
	r.checkConfig(fail, imagePath)
	return errors.Join(errs...)
}

func checkName(name string) error {
	named, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		return fmt.Errorf("%q: %w", name, err)
	}
	if _, tagged := named.(reference.NamedTagged); !tagged {
		return fmt.Errorf("%q has no tag", name)
	}
	if _, digested := named.(reference.Digested); digested {
		return fmt.Errorf("%q has a digest; a recipe cannot promise one", name)
	}
	if named.String() != name {
		return fmt.Errorf("%q is not a full reference; write %q", name, named.String())
	}
	return nil
}

type (
	failFunc func(field, format string, args ...any)
	pathFunc func(field, value string)
)

func (r *Recipe) checkPrograms(fail failFunc, imagePath pathFunc) {
	for i, program := range r.Go {
		field := fmt.Sprintf("go[%d]", i)
		if program.Package == "" || strings.HasPrefix(program.Package, "-") {
			fail(field+".package", "%q is not a Go package", program.Package)
		}
		imagePath(field+".output", program.Output)
	}
	for i, program := range r.C {
		field := fmt.Sprintf("c[%d]", i)
		if program.Source == "" || strings.HasPrefix(program.Source, "-") {
			fail(field+".source", "%q is not a C file", program.Source)
		}
		imagePath(field+".output", program.Output)
	}
}

func (r *Recipe) checkAccounts(fail failFunc) {
	for i, group := range r.Groups {
		field := fmt.Sprintf("groups[%d]", i)
		if !accountName.MatchString(group.Name) {
			fail(field+".name", "%q is not a group name", group.Name)
		}
		if group.GID < 0 {
			fail(field+".gid", "%d is negative", group.GID)
		}
		for j, member := range group.Members {
			if !accountName.MatchString(member) {
				fail(fmt.Sprintf("%s.members[%d]", field, j), "%q is not a user name", member)
			}
		}
	}
	for i, user := range r.Users {
		field := fmt.Sprintf("users[%d]", i)
		if !accountName.MatchString(user.Name) {
			fail(field+".name", "%q is not a user name", user.Name)
		}
		if user.UID < 0 || user.GID < 0 {
			fail(field, "uid and gid must not be negative")
		}
		if strings.ContainsAny(user.Home+user.Shell, ":\n") {
			fail(field, "home and shell must not hold a colon or a newline")
		}
	}
}

func (r *Recipe) checkTree(fail failFunc, imagePath pathFunc) {
	for i, dir := range r.Directories {
		imagePath(fmt.Sprintf("directories[%d].path", i), dir.Path)
	}
	for i, file := range r.Files {
		field := fmt.Sprintf("files[%d]", i)
		imagePath(field+".path", file.Path)
		if (file.Content == nil) == (file.Source == "") {
			fail(field, "exactly one of content and source is needed")
		}
		if file.Module != "" && file.Source == "" {
			fail(field+".module", "only has a meaning together with source")
		}
		if file.Module != "" && (path.IsAbs(file.Source) || strings.HasPrefix(path.Clean(file.Source), "..")) {
			fail(field+".source", "%q leaves the module", file.Source)
		}
	}
	for i, link := range r.Symlinks {
		field := fmt.Sprintf("symlinks[%d]", i)
		if link.Target == "" {
			fail(field+".target", "is missing")
		}
		switch {
		case link.Path != "" && link.In == "" && len(link.Names) == 0:
			imagePath(field+".path", link.Path)
		case link.Path == "" && len(link.Names) > 0:
			imagePath(field+".in", link.In)
		default:
			fail(field, "either path, or in and names are needed")
		}
		for j, name := range link.Names {
			if name == "" || name == "." || name == ".." || strings.Contains(name, "/") {
				fail(fmt.Sprintf("%s.names[%d]", field, j), "%q is not a file name", name)
			}
		}
	}
	for i, permission := range r.Permissions {
		field := fmt.Sprintf("permissions[%d]", i)
		imagePath(field+".path", permission.Path)
		if !permission.Mode.set && permission.Owner == nil {
			fail(field, "mode or owner is needed")
		}
	}
	for i, entry := range r.Registry {
		field := fmt.Sprintf("registry[%d]", i)
		imagePath(field+".root", entry.Root)
		if entry.Recipe == "" {
			fail(field+".recipe", "is missing")
		}
		if _, err := reference.ParseNormalizedNamed("localhost/" + entry.Repository + ":" + entry.Tag); err != nil {
			fail(field, "repository and tag: %v", err)
		}
	}
	for i, pattern := range r.Remove {
		field := fmt.Sprintf("remove[%d]", i)
		imagePath(field, pattern)
		if _, err := path.Match(pattern, ""); err != nil {
			fail(field, "%q: %v", pattern, err)
		}
	}
}

func (r *Recipe) checkConfig(fail failFunc, imagePath pathFunc) {
	for i, env := range r.Config.Env {
		if !envPattern.MatchString(env) {
			fail(fmt.Sprintf("config.env[%d]", i), "%q is not of the form NAME=value", env)
		}
	}
	for i, port := range r.Config.ExposedPorts {
		if !portPattern.MatchString(port) {
			fail(fmt.Sprintf("config.exposedPorts[%d]", i), "%q is not of the form 80 or 80/tcp", port)
		}
	}
	for i, volume := range r.Config.Volumes {
		imagePath(fmt.Sprintf("config.volumes[%d]", i), volume)
	}
	if r.Config.WorkDir != "" {
		imagePath("config.workdir", r.Config.WorkDir)
	}
}
