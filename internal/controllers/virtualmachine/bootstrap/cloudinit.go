package bootstrap

import (
	"strings"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	"sigs.k8s.io/yaml"

	machinev1 "atoll.dev/atoll/api/machine/v1"
)

// rawKeys are tried after the key that the field names.
var rawKeys = []string{"user-data", "value"}

// metaData is NoCloud's, with the keys that VM Operator sends.
type metaData struct {
	InstanceID    string         `json:"instance-id"`
	LocalHostname string         `json:"local-hostname,omitempty"`
	Hostname      string         `json:"hostname,omitempty"`
	PublicKeys    []string       `json:"public-keys,omitempty"`
	WaitOnNetwork *waitOnNetwork `json:"wait-on-network,omitempty"`
}

type waitOnNetwork struct {
	IPv4 bool `json:"ipv4"`
	IPv6 bool `json:"ipv6"`
}

// plainInstanceID is the instance-id for what does not say one itself.
func (in *Input) plainInstanceID(own string) string {
	if annotated := in.VM.Annotations[vmopv1.InstanceIDAnnotation]; annotated != "" {
		return annotated
	}
	if own != "" {
		return own
	}
	if in.VM.Spec.BiosUUID != "" {
		return in.VM.Spec.BiosUUID
	}
	return string(in.VM.UID)
}

// noCloud puts the files of a NoCloud seed together.
func (in *Input) noCloud(instanceID string, keys []string, wait *waitOnNetwork, userData []byte) (*Seed, error) {
	meta, err := yaml.Marshal(metaData{
		InstanceID: instanceID, LocalHostname: in.fqdn(), Hostname: in.fqdn(), PublicKeys: keys, WaitOnNetwork: wait,
	})
	if err != nil {
		return nil, invalid("spec.bootstrap", "encoding meta-data: %v", err)
	}
	if len(userData) == 0 {
		userData = []byte("#cloud-config\n{}\n")
	}
	seed := &Seed{Label: LabelNoCloud, InstanceID: instanceID, Files: map[string][]byte{
		"meta-data": meta, "user-data": userData,
	}}
	if network := in.VM.Spec.Network; network == nil || !network.Disabled {
		seed.Files["network-config"] = []byte(machinev1.PlaceholderNetplan + "\n")
	}
	return seed, nil
}

func (in *Input) cloudInit(spec *vmopv1.VirtualMachineBootstrapCloudInitSpec) (*Seed, error) {
	if spec.CloudConfig != nil && spec.RawCloudConfig != nil {
		return nil, invalid(fieldCloudInit, "cloudConfig and rawCloudConfig cannot be used together; keep one")
	}
	keys := spec.SSHAuthorizedKeys
	var userData []byte
	var err error
	switch {
	case spec.CloudConfig != nil:
		userData, err = in.inlineCloudConfig(spec.CloudConfig)
	case spec.RawCloudConfig != nil:
		userData, err = in.rawCloudConfig(spec)
		if data := in.Data[spec.RawCloudConfig.Name]["ssh-public-keys"]; len(keys) == 0 && len(data) > 0 {
			keys = strings.Split(strings.TrimSpace(string(data)), "\n")
		}
	}
	if err != nil {
		return nil, err
	}
	var wait *waitOnNetwork
	if spec.WaitOnNetwork4 != nil || spec.WaitOnNetwork6 != nil {
		yes := func(b *bool) bool { return b != nil && *b }
		wait = &waitOnNetwork{IPv4: yes(spec.WaitOnNetwork4), IPv6: yes(spec.WaitOnNetwork6)}
	}
	return in.noCloud(in.plainInstanceID(spec.InstanceID), keys, wait, userData)
}

// rawCloudConfig reads user data as they are in a Secret.
func (in *Input) rawCloudConfig(spec *vmopv1.VirtualMachineBootstrapCloudInitSpec) ([]byte, error) {
	const field = fieldCloudInit + ".rawCloudConfig"
	selector := spec.RawCloudConfig
	key := selector.Key
	for _, other := range rawKeys {
		if _, ok := in.Data[selector.Name][key]; ok && key != "" {
			break
		}
		key = other
	}
	if _, ok := in.Data[selector.Name][key]; !ok && selector.Key != "" {
		key = selector.Key
	}
	data, err := in.lookup(field, selector.Name, key)
	if err != nil {
		return nil, err
	}
	if data, err = decode(field, data); err != nil {
		return nil, err
	}
	if err := noPlaceholders(field, data); err != nil {
		return nil, err
	}
	if err := checkUserData(data); err != nil {
		return nil, invalid(field, "%q of %q: %v", key, selector.Name, err)
	}
	return data, nil
}
