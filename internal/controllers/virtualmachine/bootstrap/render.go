package bootstrap

import (
	"bytes"
	"compress/gzip"
	"encoding/base64"
	"errors"
	"fmt"
	"io"

	machinev1 "atoll.dev/atoll/api/machine/v1"
)

// Fields of the providers.
const (
	fieldCloudInit = "spec.bootstrap.cloudInit"
	fieldLinuxPrep = "spec.bootstrap.linuxPrep"
	fieldSysprep   = "spec.bootstrap.sysprep"
	fieldVApp      = "spec.bootstrap.vAppConfig"
)

// Labels of seed disks.
const (
	LabelNoCloud  = "cidata"
	LabelOVF      = "OVF ENV"
	LabelUnattend = "UNATTEND"
)

// maxSeed bounds all files of a seed together: they are kept in a Secret.
const maxSeed = 900 << 10

// maxPlain bounds what compressed data may become.
const maxPlain = 8 << 20

// Render makes the seed of a virtual machine. The error is an *Error.
func Render(in Input) (*Seed, error) {
	seed, err := in.render()
	if err != nil {
		return nil, err
	}
	total := 0
	for _, data := range seed.Files {
		total += len(data)
	}
	if total > maxSeed {
		return nil, invalid("spec.bootstrap", "the files for the guest have %d bytes, the limit is %d; have the guest fetch what is large", total, maxSeed)
	}
	return seed, nil
}

func (in *Input) render() (*Seed, error) {
	spec := in.VM.Spec.Bootstrap
	if spec == nil {
		return in.noCloud(in.plainInstanceID(""), nil, nil, nil)
	}
	if err := in.checkProviders(); err != nil {
		return nil, err
	}
	var seed *Seed
	var err error
	switch {
	case spec.CloudInit != nil:
		return in.cloudInit(spec.CloudInit)
	case spec.LinuxPrep != nil:
		seed, err = in.linuxPrep(spec.LinuxPrep)
	case spec.Sysprep != nil:
		seed, err = in.sysprep(spec.Sysprep)
	case spec.VAppConfig != nil:
		seed = &Seed{Label: LabelOVF, Files: map[string][]byte{}}
	default:
		return in.noCloud(in.plainInstanceID(""), nil, nil, nil)
	}
	if err != nil || spec.VAppConfig == nil {
		return seed, err
	}
	return seed, in.addVApp(seed, spec.VAppConfig)
}

// checkProviders refuses providers that exclude each other.
func (in *Input) checkProviders() error {
	spec := in.VM.Spec.Bootstrap
	if spec.CloudInit != nil && (spec.LinuxPrep != nil || spec.Sysprep != nil || spec.VAppConfig != nil) {
		return invalid(fieldCloudInit, "cloudInit cannot be used together with linuxPrep, sysprep or vAppConfig; keep one")
	}
	if spec.LinuxPrep != nil && spec.Sysprep != nil {
		return invalid(fieldLinuxPrep, "linuxPrep and sysprep cannot be used together; keep one")
	}
	return nil
}

// decode makes plain text of what may be plain, base64, or gzip in base64 or not.
func decode(field string, data []byte) ([]byte, error) {
	if plain, err := gunzip(data); err == nil {
		return plain, nil
	} else if !errors.Is(err, errNotGzip) {
		return nil, invalid(field, "%v", err)
	}
	compact := bytes.Join(bytes.Fields(data), nil)
	if len(compact) == 0 || len(compact)%4 != 0 {
		return data, nil
	}
	raw, err := base64.StdEncoding.DecodeString(string(compact))
	if err != nil {
		return data, nil
	}
	plain, err := gunzip(raw)
	if errors.Is(err, errNotGzip) {
		return raw, nil
	}
	if err != nil {
		return nil, invalid(field, "%v", err)
	}
	return plain, nil
}

var errNotGzip = errors.New("not compressed")

func gunzip(data []byte) ([]byte, error) {
	if !bytes.HasPrefix(data, []byte{0x1f, 0x8b}) {
		return nil, errNotGzip
	}
	reader, err := gzip.NewReader(bytes.NewReader(data))
	if err != nil {
		return nil, fmt.Errorf("it is not valid gzip: %w", err)
	}
	plain, err := io.ReadAll(io.LimitReader(reader, maxPlain+1))
	if err != nil {
		return nil, fmt.Errorf("it is not valid gzip: %w", err)
	}
	if len(plain) > maxPlain {
		return nil, fmt.Errorf("it has more than %d bytes without compression", maxPlain)
	}
	return plain, nil
}

// noPlaceholders refuses placeholders that are not ours: the host would replace
// them in the user's data, which is well where a template asks for it only.
func noPlaceholders(field string, data []byte) error {
	for _, placeholder := range []string{
		machinev1.PlaceholderIP4, machinev1.PlaceholderCIDR4, machinev1.PlaceholderNetmask4, machinev1.PlaceholderGateway,
		machinev1.PlaceholderMAC, machinev1.PlaceholderDNS, machinev1.PlaceholderSearch, machinev1.PlaceholderNetplan,
	} {
		if bytes.Contains(data, []byte(placeholder)) {
			return invalid(field, "it contains %s, which is reserved", placeholder)
		}
	}
	return nil
}
