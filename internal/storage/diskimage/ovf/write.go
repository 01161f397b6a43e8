package ovf

import (
	"bytes"
	"encoding/xml"
	"fmt"
	"io"
	"strings"
	"text/template"
)

// Machine is a machine to write a descriptor of.
type Machine struct {
	Name string
	// OSID and OSType as in Descriptor; 1 and "otherGuest64" when empty.
	OSID, OSType string
	CPUs         int
	Memory       int64 // bytes
	Firmware     string
	SecureBoot   bool
	// HardwareVersion is 13 when 0, which vSphere 6.5 and later take.
	HardwareVersion int
	NICs            int
	Disks           []MachineDisk
	Product         Product
	Properties      []Property
}

// MachineDisk is a disk of it: a streamOptimized VMDK.
type MachineDisk struct {
	File     string
	Bytes    int64 // of the file
	Capacity int64
}

// Write writes the descriptor of a machine: a SCSI controller for its disks, a CD-ROM drive, and network
// interfaces on one network. vSphere and VirtualBox import it.
func Write(w io.Writer, m Machine) error {
	if m.Name == "" || m.CPUs <= 0 || m.Memory <= 0 || len(m.Disks) == 0 || len(m.Disks) > 15 {
		return fmt.Errorf("writing an OVF: %+v is no machine", m)
	}
	if m.OSID == "" {
		m.OSID, m.OSType = "1", "otherGuest64"
	}
	if m.OSType == "" {
		m.OSType = "otherGuest64"
	}
	if m.Firmware == "" {
		m.Firmware = "bios"
	}
	if m.HardwareVersion == 0 {
		m.HardwareVersion = 13
	}
	t, err := template.New("ovf").Funcs(template.FuncMap{
		"x":    escape,
		"add":  func(a, b int) int { return a + b },
		"unit": func(n int) int { return n + n/7 }, // 7 is the controller's own
		"mib":  func(n int64) int64 { return (n + 1<<20 - 1) >> 20 },
		"nics": func(n int) []struct{} { return make([]struct{}, n) },
	}).Parse(text)
	if err != nil {
		return fmt.Errorf("writing an OVF: %w", err)
	}
	if err := t.Execute(w, m); err != nil {
		return fmt.Errorf("writing an OVF: %w", err)
	}
	return nil
}

func escape(text string) (string, error) {
	var b bytes.Buffer
	err := xml.EscapeText(&b, []byte(clean(text)))
	return strings.ReplaceAll(b.String(), "&#xA;", "&#10;"), err
}

const text = `<?xml version="1.0" encoding="UTF-8"?>
<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1" xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData" xmlns:vssd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_VirtualSystemSettingData" xmlns:vmw="http://www.vmware.com/schema/ovf">
  <References>
{{- range $i, $d := .Disks}}
    <File ovf:id="file{{add $i 1}}" ovf:href="{{x $d.File}}" ovf:size="{{$d.Bytes}}"/>
{{- end}}
  </References>
  <DiskSection>
    <Info>Virtual disks</Info>
{{- range $i, $d := .Disks}}
    <Disk ovf:diskId="vmdisk{{add $i 1}}" ovf:fileRef="file{{add $i 1}}" ovf:capacity="{{$d.Capacity}}" ovf:capacityAllocationUnits="byte" ovf:format="http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized"/>
{{- end}}
  </DiskSection>
{{- if .NICs}}
  <NetworkSection>
    <Info>Networks</Info>
    <Network ovf:name="VM Network"><Description>The network of the machine</Description></Network>
  </NetworkSection>
{{- end}}
  <VirtualSystem ovf:id="{{x .Name}}">
    <Info>A virtual machine</Info>
    <Name>{{x .Name}}</Name>
    <OperatingSystemSection ovf:id="{{x .OSID}}" vmw:osType="{{x .OSType}}">
      <Info>The operating system</Info>
    </OperatingSystemSection>
    <VirtualHardwareSection>
      <Info>Virtual hardware</Info>
      <System>
        <vssd:ElementName>Virtual Hardware Family</vssd:ElementName>
        <vssd:InstanceID>0</vssd:InstanceID>
        <vssd:VirtualSystemIdentifier>{{x .Name}}</vssd:VirtualSystemIdentifier>
        <vssd:VirtualSystemType>vmx-{{.HardwareVersion}}</vssd:VirtualSystemType>
      </System>
      <Item>
        <rasd:AllocationUnits>hertz * 10^6</rasd:AllocationUnits>
        <rasd:Description>Number of virtual CPUs</rasd:Description>
        <rasd:ElementName>{{.CPUs}} virtual CPU(s)</rasd:ElementName>
        <rasd:InstanceID>1</rasd:InstanceID>
        <rasd:ResourceType>3</rasd:ResourceType>
        <rasd:VirtualQuantity>{{.CPUs}}</rasd:VirtualQuantity>
      </Item>
      <Item>
        <rasd:AllocationUnits>byte * 2^20</rasd:AllocationUnits>
        <rasd:Description>Memory size</rasd:Description>
        <rasd:ElementName>{{mib .Memory}} MiB of memory</rasd:ElementName>
        <rasd:InstanceID>2</rasd:InstanceID>
        <rasd:ResourceType>4</rasd:ResourceType>
        <rasd:VirtualQuantity>{{mib .Memory}}</rasd:VirtualQuantity>
      </Item>
      <Item>
        <rasd:Address>0</rasd:Address>
        <rasd:Description>SCSI controller</rasd:Description>
        <rasd:ElementName>SCSI controller 0</rasd:ElementName>
        <rasd:InstanceID>3</rasd:InstanceID>
        <rasd:ResourceSubType>lsilogic</rasd:ResourceSubType>
        <rasd:ResourceType>6</rasd:ResourceType>
      </Item>
      <Item>
        <rasd:Address>0</rasd:Address>
        <rasd:Description>IDE controller</rasd:Description>
        <rasd:ElementName>IDE 0</rasd:ElementName>
        <rasd:InstanceID>4</rasd:InstanceID>
        <rasd:ResourceType>5</rasd:ResourceType>
      </Item>
      <Item ovf:required="false">
        <rasd:AddressOnParent>0</rasd:AddressOnParent>
        <rasd:AutomaticAllocation>false</rasd:AutomaticAllocation>
        <rasd:ElementName>CD/DVD drive 1</rasd:ElementName>
        <rasd:InstanceID>5</rasd:InstanceID>
        <rasd:Parent>4</rasd:Parent>
        <rasd:ResourceType>15</rasd:ResourceType>
      </Item>
{{- range $i, $d := .Disks}}
      <Item>
        <rasd:AddressOnParent>{{unit $i}}</rasd:AddressOnParent>
        <rasd:ElementName>Hard disk {{add $i 1}}</rasd:ElementName>
        <rasd:HostResource>ovf:/disk/vmdisk{{add $i 1}}</rasd:HostResource>
        <rasd:InstanceID>{{add $i 10}}</rasd:InstanceID>
        <rasd:Parent>3</rasd:Parent>
        <rasd:ResourceType>17</rasd:ResourceType>
      </Item>
{{- end}}
{{- range $i, $n := nics .NICs}}
      <Item>
        <rasd:AddressOnParent>{{add $i 7}}</rasd:AddressOnParent>
        <rasd:AutomaticAllocation>true</rasd:AutomaticAllocation>
        <rasd:Connection>VM Network</rasd:Connection>
        <rasd:ElementName>Network adapter {{add $i 1}}</rasd:ElementName>
        <rasd:InstanceID>{{add $i 40}}</rasd:InstanceID>
        <rasd:ResourceSubType>E1000</rasd:ResourceSubType>
        <rasd:ResourceType>10</rasd:ResourceType>
      </Item>
{{- end}}
      <vmw:Config ovf:required="false" vmw:key="firmware" vmw:value="{{x .Firmware}}"/>
      <vmw:Config ovf:required="false" vmw:key="bootOptions.efiSecureBootEnabled" vmw:value="{{.SecureBoot}}"/>
    </VirtualHardwareSection>
{{- if or .Product.Product .Properties}}
    <ProductSection>
      <Info>The software</Info>
      <Product>{{x .Product.Product}}</Product>
      <Vendor>{{x .Product.Vendor}}</Vendor>
      <Version>{{x .Product.Version}}</Version>
      <FullVersion>{{x .Product.FullVersion}}</FullVersion>
{{- range .Properties}}
      <Property ovf:key="{{x .Key}}" ovf:type="{{x (or .Type "string")}}" ovf:userConfigurable="{{.UserConfigurable}}"{{if .HasDefault}} ovf:value="{{x .Default}}"{{end}}>
        <Label>{{x .Label}}</Label>
        <Description>{{x .Description}}</Description>
      </Property>
{{- end}}
    </ProductSection>
{{- end}}
  </VirtualSystem>
</Envelope>
`
