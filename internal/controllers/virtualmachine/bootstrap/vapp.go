package bootstrap

import (
	"bytes"
	"encoding/xml"
	"fmt"
	"maps"
	"slices"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	"github.com/vmware-tanzu/vm-operator/api/v1alpha5/common"
)

// ovfFile is where guests look for the OVF environment (DMTF DSP0243, 11).
const ovfFile = "ovf-env.xml"

// property is a vApp property with its value.
type property struct{ key, value string }

// addVApp puts the OVF environment into a seed. With sysprep or linuxPrep it is a
// file beside theirs.
func (in *Input) addVApp(seed *Seed, spec *vmopv1.VirtualMachineBootstrapVAppConfigSpec) error {
	if len(spec.Properties) > 0 && spec.RawProperties != "" {
		return invalid(fieldVApp, "properties and rawProperties cannot be used together; keep one")
	}
	given, err := in.givenProperties(spec)
	if err != nil {
		return err
	}
	render, err := in.newRenderer()
	if err != nil {
		return err
	}
	values := map[string]string{}
	for _, declared := range in.Properties {
		if declared.Default != nil {
			values[declared.Key] = *declared.Default
		} else {
			values[declared.Key] = ""
		}
	}
	declared := maps.Clone(values)
	for _, p := range given {
		field := fieldVApp + " property " + p.key
		if err := noPlaceholders(field, []byte(p.value)); err != nil {
			return err
		}
		value, err := render.render(p.key, p.value)
		if err != nil {
			seed.Notes = append(seed.Notes, fmt.Sprintf("%s is passed on as it is written: %v", field, err))
		}
		if _, known := declared[p.key]; !known && len(declared) > 0 {
			seed.Notes = append(seed.Notes, field+" is not declared by the image; it is passed on")
		}
		values[p.key] = value
	}
	seed.Files[ovfFile] = in.ovfEnvironment(values)
	return nil
}

// givenProperties lists what the specification sets, by key.
func (in *Input) givenProperties(spec *vmopv1.VirtualMachineBootstrapVAppConfigSpec) ([]property, error) {
	var out []property
	if spec.RawProperties != "" {
		data, ok := in.Data[spec.RawProperties]
		if !ok {
			_, err := in.lookup(fieldVApp+".rawProperties", spec.RawProperties, "")
			return nil, err
		}
		for _, key := range slices.Sorted(maps.Keys(data)) {
			out = append(out, property{key, string(data[key])})
		}
		return out, nil
	}
	for i := range spec.Properties {
		p := &spec.Properties[i]
		field := fmt.Sprintf("%s.properties[%d]", fieldVApp, i)
		if p.Key == "" {
			return nil, invalid(field+".key", "a property needs a key")
		}
		value, err := in.valueOrSecret(field+".value", &p.Value)
		if err != nil {
			return nil, err
		}
		out = append(out, property{p.Key, string(value)})
	}
	return out, nil
}

// valueOrSecret returns a value that is there or in a Secret.
func (in *Input) valueOrSecret(field string, value *common.ValueOrSecretKeySelector) ([]byte, error) {
	switch {
	case value.From != nil && value.Value != nil:
		return nil, invalid(field, "from and value cannot be used together; keep one")
	case value.From != nil:
		return in.lookup(field+".from", value.From.Name, value.From.Key)
	case value.Value != nil:
		return []byte(*value.Value), nil
	}
	return nil, nil
}

// ovfEnvironment writes the document, properties by key.
func (in *Input) ovfEnvironment(values map[string]string) []byte {
	var out bytes.Buffer
	text := func(s string) string {
		var escaped bytes.Buffer
		_ = xml.EscapeText(&escaped, []byte(s)) // a buffer does not fail
		return escaped.String()
	}
	fmt.Fprintf(&out, `<?xml version="1.0" encoding="UTF-8"?>
<Environment
     xmlns="http://schemas.dmtf.org/ovf/environment/1"
     xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance"
     xmlns:oe="http://schemas.dmtf.org/ovf/environment/1"
     xmlns:ve="http://www.vmware.com/schema/ovfenv"
     oe:id=""
     ve:vCenterId="%s">
   <PlatformSection>
      <Kind>Atoll</Kind>
      <Version>1</Version>
      <Vendor>Atoll</Vendor>
      <Locale>en</Locale>
   </PlatformSection>
   <PropertySection>
`, text(in.VM.Name))
	for _, key := range slices.Sorted(maps.Keys(values)) {
		fmt.Fprintf(&out, "      <Property oe:key=\"%s\" oe:value=\"%s\"/>\n", text(key), text(values[key]))
	}
	out.WriteString("   </PropertySection>\n   <ve:EthernetAdapterSection>\n")
	for i, nic := range in.NICs {
		network := nic.Bridge
		if nic.Pod {
			network = "pod"
		}
		fmt.Fprintf(&out, "      <ve:Adapter ve:mac=\"%s\" ve:network=\"%s\" ve:unitNumber=\"%d\"/>\n", text(nic.MAC), text(network), 7+i)
	}
	out.WriteString("   </ve:EthernetAdapterSection>\n</Environment>\n")
	return out.Bytes()
}
