package bootstrap

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"regexp"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	"sigs.k8s.io/yaml"
)

// prepScript is where the guest keeps the script of linuxPrep.
const prepScript = "/var/lib/atoll/customize"

// linuxPrepConfig is a cloud-config that does what VMware's customization does.
type linuxPrepConfig struct {
	Hostname         string      `json:"hostname,omitempty"`
	FQDN             string      `json:"fqdn,omitempty"`
	PreserveHostname bool        `json:"preserve_hostname"`
	ManageEtcHosts   string      `json:"manage_etc_hosts,omitempty"`
	Timezone         string      `json:"timezone,omitempty"`
	ChPasswd         *chPasswd   `json:"chpasswd,omitempty"`
	BootCmd          []any       `json:"bootcmd,omitempty"`
	RunCmd           []any       `json:"runcmd,omitempty"`
	WriteFiles       []writeFile `json:"write_files,omitempty"`
}

type chPasswd struct {
	Expire bool       `json:"expire"`
	Users  []password `json:"users"`
}

type password struct {
	Name     string `json:"name"`
	Password string `json:"password"`
	Type     string `json:"type"`
}

var timezonePattern = regexp.MustCompile(`^[A-Za-z0-9_+-]+(/[A-Za-z0-9_+-]+){0,2}$`)

func (in *Input) linuxPrep(spec *vmopv1.VirtualMachineBootstrapLinuxPrepSpec) (*Seed, error) {
	config := linuxPrepConfig{Hostname: in.Hostname, ManageEtcHosts: "localhost", Timezone: spec.TimeZone}
	if in.Domain != "" {
		config.FQDN = in.fqdn()
	}
	if spec.TimeZone != "" && !timezonePattern.MatchString(spec.TimeZone) {
		return nil, invalid(fieldLinuxPrep+".timeZone", "%q is not a time zone such as Europe/Sofia", spec.TimeZone)
	}
	if err := in.prepPassword(spec, &config); err != nil {
		return nil, err
	}
	if spec.HardwareClockIsUTC != nil {
		zone := "LOCAL"
		if *spec.HardwareClockIsUTC {
			zone = "UTC"
		}
		config.WriteFiles = append(config.WriteFiles, writeFile{Path: "/etc/adjtime", Content: "0.0 0 0.0\n0\n" + zone + "\n", Permissions: "0644"})
	}
	if err := in.prepScript(spec, &config); err != nil {
		return nil, err
	}
	text, err := yaml.Marshal(config)
	if err != nil {
		return nil, invalid(fieldLinuxPrep, "encoding: %v", err)
	}
	if err := noPlaceholders(fieldLinuxPrep, text); err != nil {
		return nil, err
	}
	return in.noCloud(in.customizationID(spec.CustomizeAtNextPowerOn, text), nil, nil, append([]byte("#cloud-config\n"), text...))
}

// prepPassword sets root's password.
func (in *Input) prepPassword(spec *vmopv1.VirtualMachineBootstrapLinuxPrepSpec, config *linuxPrepConfig) error {
	if spec.Password == nil {
		if spec.ExpirePasswordAfterNextLogin {
			config.RunCmd = append(config.RunCmd, []string{"passwd", "--expire", "root"})
		}
		return nil
	}
	key := spec.Password.Key
	if key == "" {
		key = "password"
	}
	value, err := in.lookup(fieldLinuxPrep+".password", spec.Password.Name, key)
	if err != nil {
		return err
	}
	value = bytes.TrimRight(value, "\r\n")
	if len(value) == 0 || bytes.ContainsAny(value, "\n\x00") {
		return invalid(fieldLinuxPrep+".password", "%q of %q is not a password: it is empty or has several lines", key, spec.Password.Name)
	}
	config.ChPasswd = &chPasswd{
		Expire: spec.ExpirePasswordAfterNextLogin,
		Users:  []password{{Name: "root", Password: string(value), Type: "text"}},
	}
	return nil
}

// prepScript has the script run before and after the customization, with the
// word for it as its argument.
func (in *Input) prepScript(spec *vmopv1.VirtualMachineBootstrapLinuxPrepSpec, config *linuxPrepConfig) error {
	const field = fieldLinuxPrep + ".scriptText"
	if spec.ScriptText == nil {
		return nil
	}
	script, err := in.valueOrSecret(field, spec.ScriptText)
	if err != nil {
		return err
	}
	if len(script) == 0 {
		return nil
	}
	if !bytes.HasPrefix(script, []byte("#!")) {
		script = append([]byte("#!/bin/sh\n"), script...)
	}
	install := "umask 077; mkdir -p /var/lib/atoll; echo " + base64.StdEncoding.EncodeToString(script) +
		" | base64 -d >" + prepScript + "; chmod 0700 " + prepScript + "; exec " + prepScript + " precustomization"
	config.BootCmd = append(config.BootCmd, []string{"cloud-init-per", "instance", "linuxprep", "sh", "-c", install})
	config.RunCmd = append(config.RunCmd, []string{prepScript, "postcustomization"})
	return nil
}

// customizationID is an instance-id that changes with what it stands for. When
// customization is not wanted it is that of the last time, when it is wanted
// explicitly it is a new one.
func (in *Input) customizationID(wanted *bool, text []byte) string {
	if annotated := in.VM.Annotations[vmopv1.InstanceIDAnnotation]; annotated != "" {
		return annotated
	}
	if wanted != nil && !*wanted && in.LastInstanceID != "" {
		return in.LastInstanceID
	}
	sum := sha256.Sum256(text)
	id := in.plainInstanceID("") + "-" + hex.EncodeToString(sum[:4])
	if wanted != nil && *wanted {
		// The generation is the same until the field has been set to false.
		return fmt.Sprintf("%s-%d", id, in.VM.Generation)
	}
	return id
}
