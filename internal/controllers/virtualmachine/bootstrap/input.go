package bootstrap

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"

	machinev1 "atoll.dev/atoll/api/machine/v1"
)

// Input is what a seed is made of.
type Input struct {
	VM *vmopv1.VirtualMachine
	// Data are the contents of the objects of References, by name. One that does
	// not exist is not in it.
	Data map[string]map[string][]byte
	// Hostname is without the domain.
	Hostname, Domain string
	// NICs are the interfaces of the machine; the addresses of the pod's own are not
	// known here.
	NICs []machinev1.NIC
	// Properties are those that the image declares.
	Properties []vmopv1.OVFProperty
	// LastInstanceID is the Seed.InstanceID of the last power-on, or empty.
	LastInstanceID string
}

// Seed is the content of a seed disk.
type Seed struct {
	Label string
	Files map[string][]byte
	// InstanceID is cloud-init's, empty without cloud-init.
	InstanceID string
	// Notes say what was accepted without effect, for a condition.
	Notes []string
}

// Reasons of an Error, as VM Operator's conditions have them.
const (
	ReasonNotFound    = "NotFound"
	ReasonKeyNotFound = "RequiredKeyNotFound"
	ReasonInvalid     = "Invalid"
)

// Error says what is wrong with a specification.
type Error struct {
	Field   string // spec.bootstrap.cloudInit.rawCloudConfig
	Reason  string
	Message string
}

func (e *Error) Error() string { return e.Field + ": " + e.Message }

func invalid(field, format string, args ...any) *Error {
	return &Error{Field: field, Reason: ReasonInvalid, Message: fmt.Sprintf(format, args...)}
}

// Reference is an object that a specification refers to: a Secret, or else a
// ConfigMap of that name.
type Reference struct {
	Name  string
	Field string // that refers to it first
}

// References lists the objects whose data Render needs, each once, by name.
func References(vm *vmopv1.VirtualMachine) []Reference {
	found := map[string]Reference{}
	visit(vm, func(field, name string) {
		if _, ok := found[name]; !ok && name != "" {
			found[name] = Reference{Name: name, Field: field}
		}
	})
	out := slices.Collect(maps.Values(found))
	slices.SortFunc(out, func(a, b Reference) int { return strings.Compare(a.Name, b.Name) })
	return out
}

// visit calls add for every reference to an object.
func visit(vm *vmopv1.VirtualMachine, add func(field, name string)) {
	spec := vm.Spec.Bootstrap
	if spec == nil {
		return
	}
	if c := spec.CloudInit; c != nil {
		if c.RawCloudConfig != nil {
			add(fieldCloudInit+".rawCloudConfig", c.RawCloudConfig.Name)
		}
		if c.CloudConfig != nil {
			visitCloudConfig(c.CloudConfig, add)
		}
	}
	if p := spec.LinuxPrep; p != nil {
		if p.Password != nil {
			add(fieldLinuxPrep+".password", p.Password.Name)
		}
		if p.ScriptText != nil && p.ScriptText.From != nil {
			add(fieldLinuxPrep+".scriptText.from", p.ScriptText.From.Name)
		}
	}
	if s := spec.Sysprep; s != nil {
		if s.RawSysprep != nil {
			add(fieldSysprep+".rawSysprep", s.RawSysprep.Name)
		}
		if s.Sysprep != nil {
			visitSysprep(s.Sysprep, add)
		}
	}
	if v := spec.VAppConfig; v != nil {
		if v.RawProperties != "" {
			add(fieldVApp+".rawProperties", v.RawProperties)
		}
		for i, p := range v.Properties {
			if p.Value.From != nil {
				add(fmt.Sprintf("%s.properties[%d].value.from", fieldVApp, i), p.Value.From.Name)
			}
		}
	}
}

// lookup reads one key of an object.
func (in *Input) lookup(field, name, key string) ([]byte, error) {
	if name == "" {
		return nil, invalid(field+".name", "no Secret is named")
	}
	data, ok := in.Data[name]
	if !ok {
		return nil, &Error{
			Field: field + ".name", Reason: ReasonNotFound,
			Message: fmt.Sprintf("there is no Secret and no ConfigMap %q in namespace %s; create it", name, in.VM.Namespace),
		}
	}
	value, ok := data[key]
	if !ok {
		return nil, &Error{
			Field: field + ".key", Reason: ReasonKeyNotFound,
			Message: fmt.Sprintf("%q has no key %q; it has %s", name, key, listKeys(data)),
		}
	}
	return value, nil
}

func listKeys(data map[string][]byte) string {
	if len(data) == 0 {
		return "none"
	}
	keys := slices.Sorted(maps.Keys(data))
	const most = 10
	if len(keys) > most {
		keys = append(keys[:most], "...")
	}
	return strings.Join(keys, ", ")
}

// fqdn is the host name with the domain.
func (in *Input) fqdn() string {
	if in.Domain == "" {
		return in.Hostname
	}
	return in.Hostname + "." + in.Domain
}
