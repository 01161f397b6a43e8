package bootstrap

import (
	"bytes"
	"encoding/base64"
	"encoding/xml"
	"fmt"
	"strings"
	"text/template"

	machinev1 "atoll.dev/atoll/api/machine/v1"
)

// answerFile is what goes into unattend.xml.
type answerFile struct {
	Hostname, Owner, Organization, ProductKey, TimeZone string

	Password       string
	AutoLogon      int
	ExpirePassword bool

	Workgroup, Domain, DomainAdmin, DomainPassword, DomainOU string

	NICs       []unattendNIC
	Search     []string
	FirstLogon []string
	Script     []byte
}

// unattendNIC is an interface with a fixed configuration.
type unattendNIC struct {
	MAC, Gateway string
	Addresses    []string
	Nameservers  []string
}

// unattendNICs lists the interfaces that do not ask DHCP.
func (in *Input) unattendNICs() []unattendNIC {
	var out []unattendNIC
	for _, nic := range in.NICs {
		if nic.DHCP4 && !nic.Pod {
			continue
		}
		entry := unattendNIC{
			MAC: strings.ReplaceAll(nic.MAC, ":", "-"), Gateway: nic.Gateway4,
			Addresses: nic.Addresses, Nameservers: nic.Nameservers,
		}
		if nic.Pod {
			entry.Gateway, entry.Addresses = machinev1.PlaceholderGateway, []string{machinev1.PlaceholderCIDR4}
		}
		if len(entry.Nameservers) == 0 {
			entry.Nameservers = in.templateNetwork().Nameservers
		}
		out = append(out, entry)
	}
	return out
}

// ScriptCommands are the commands of the first boot, before the customization. The
// script is in the answer file itself, in pieces that fit one command: Windows
// takes up to 259 characters, and up to 500 commands.
func (a *answerFile) ScriptCommands() []string {
	if len(a.Script) == 0 {
		return nil
	}
	const piece = 150
	const dir = `%SystemRoot%\Setup\Atoll`
	commands := []string{`cmd /c mkdir ` + dir}
	encoded := base64.StdEncoding.EncodeToString(a.Script)
	for len(encoded) > 0 {
		n := min(piece, len(encoded))
		commands = append(commands, `cmd /c echo `+encoded[:n]+`>>`+dir+`\script.b64`)
		encoded = encoded[n:]
	}
	return append(commands,
		`cmd /c certutil -f -decode `+dir+`\script.b64 `+dir+`\customize.bat`,
		`cmd /c `+dir+`\customize.bat precustomization`,
	)
}

// Logon are the commands of the first logon.
func (a *answerFile) Logon() []string {
	var out []string
	if a.ExpirePassword {
		out = append(out, `cmd /c net user Administrator /logonpasswordchg:yes`)
	}
	if len(a.Script) > 0 {
		out = append(out, `cmd /c %SystemRoot%\Setup\Atoll\customize.bat postcustomization`)
	}
	return append(out, a.FirstLogon...)
}

// unattendTemplate is the answer file (Microsoft, "Unattended Windows Setup
// Reference"). Every value goes through text, which escapes it.
const unattendTemplate = `{{define "component"}}processorArchitecture="amd64" publicKeyToken="31bf3856ad364e35" language="neutral" versionScope="nonSxS"{{end -}}
<?xml version="1.0" encoding="UTF-8"?>
<unattend xmlns="urn:schemas-microsoft-com:unattend" xmlns:wcm="http://schemas.microsoft.com/WMIConfig/2002/State">
  <settings pass="specialize">
    <component name="Microsoft-Windows-Shell-Setup" {{template "component"}}>
      <ComputerName>{{text .Hostname}}</ComputerName>
      <RegisteredOwner>{{text .Owner}}</RegisteredOwner>
      <RegisteredOrganization>{{text .Organization}}</RegisteredOrganization>
      <TimeZone>{{text .TimeZone}}</TimeZone>
{{- if .ProductKey}}
      <ProductKey>{{text .ProductKey}}</ProductKey>
{{- end}}
    </component>
{{- if .NICs}}
    <component name="Microsoft-Windows-TCPIP" {{template "component"}}>
      <Interfaces>
{{- range .NICs}}
        <Interface wcm:action="add">
          <Identifier>{{text .MAC}}</Identifier>
          <Ipv4Settings><DhcpEnabled>false</DhcpEnabled></Ipv4Settings>
          <UnicastIpAddresses>
{{- range $i, $address := .Addresses}}
            <IpAddress wcm:action="add" wcm:keyValue="{{add $i 1}}">{{text $address}}</IpAddress>
{{- end}}
          </UnicastIpAddresses>
{{- if .Gateway}}
          <Routes>
            <Route wcm:action="add">
              <Identifier>1</Identifier>
              <Metric>10</Metric>
              <NextHopAddress>{{text .Gateway}}</NextHopAddress>
              <Prefix>0.0.0.0/0</Prefix>
            </Route>
          </Routes>
{{- end}}
        </Interface>
{{- end}}
      </Interfaces>
    </component>
    <component name="Microsoft-Windows-DNS-Client" {{template "component"}}>
{{- if .Search}}
      <DNSSuffixSearchOrder>
{{- range $i, $domain := .Search}}
        <DomainName wcm:action="add" wcm:keyValue="{{add $i 1}}">{{text $domain}}</DomainName>
{{- end}}
      </DNSSuffixSearchOrder>
{{- end}}
      <Interfaces>
{{- range .NICs}}
        <Interface wcm:action="add">
          <Identifier>{{text .MAC}}</Identifier>
          <DNSServerSearchOrder>
{{- range $i, $server := .Nameservers}}
            <IpAddress wcm:action="add" wcm:keyValue="{{add $i 1}}">{{text $server}}</IpAddress>
{{- end}}
          </DNSServerSearchOrder>
        </Interface>
{{- end}}
      </Interfaces>
    </component>
{{- end}}
{{- if or .Workgroup .Domain}}
    <component name="Microsoft-Windows-UnattendedJoin" {{template "component"}}>
      <Identification>
{{- if .Workgroup}}
        <JoinWorkgroup>{{text .Workgroup}}</JoinWorkgroup>
{{- else}}
        <Credentials>
          <Domain>{{text .Domain}}</Domain>
          <Username>{{text .DomainAdmin}}</Username>
          <Password>{{text .DomainPassword}}</Password>
        </Credentials>
        <JoinDomain>{{text .Domain}}</JoinDomain>
{{- if .DomainOU}}
        <MachineObjectOU>{{text .DomainOU}}</MachineObjectOU>
{{- end}}
{{- end}}
      </Identification>
    </component>
{{- end}}
{{- if .ScriptCommands}}
    <component name="Microsoft-Windows-Deployment" {{template "component"}}>
      <RunSynchronous>
{{- range $i, $command := .ScriptCommands}}
        <RunSynchronousCommand wcm:action="add">
          <Order>{{add $i 1}}</Order>
          <Path>{{text $command}}</Path>
        </RunSynchronousCommand>
{{- end}}
      </RunSynchronous>
    </component>
{{- end}}
  </settings>
  <settings pass="oobeSystem">
    <component name="Microsoft-Windows-Shell-Setup" {{template "component"}}>
      <OOBE>
        <HideEULAPage>true</HideEULAPage>
        <HideLocalAccountScreen>true</HideLocalAccountScreen>
        <HideOnlineAccountScreens>true</HideOnlineAccountScreens>
        <HideWirelessSetupInOOBE>true</HideWirelessSetupInOOBE>
        <ProtectYourPC>3</ProtectYourPC>
      </OOBE>
      <TimeZone>{{text .TimeZone}}</TimeZone>
{{- if .Password}}
      <UserAccounts>
        <AdministratorPassword>
          <Value>{{text .Password}}</Value>
          <PlainText>true</PlainText>
        </AdministratorPassword>
      </UserAccounts>
{{- end}}
{{- if .AutoLogon}}
      <AutoLogon>
        <Enabled>true</Enabled>
        <LogonCount>{{.AutoLogon}}</LogonCount>
        <Username>Administrator</Username>
        <Password>
          <Value>{{text .Password}}</Value>
          <PlainText>true</PlainText>
        </Password>
      </AutoLogon>
{{- end}}
{{- if .Logon}}
      <FirstLogonCommands>
{{- range $i, $command := .Logon}}
        <SynchronousCommand wcm:action="add">
          <Order>{{add $i 1}}</Order>
          <CommandLine>{{text $command}}</CommandLine>
        </SynchronousCommand>
{{- end}}
      </FirstLogonCommands>
{{- end}}
    </component>
  </settings>
</unattend>
`

func (a *answerFile) bytes() ([]byte, error) {
	parsed, err := template.New("unattend").Funcs(template.FuncMap{
		"add": func(x, y int) int { return x + y },
		"text": func(s string) (string, error) {
			var out bytes.Buffer
			err := xml.EscapeText(&out, []byte(s))
			return out.String(), err
		},
	}).Parse(unattendTemplate)
	if err != nil {
		return nil, fmt.Errorf("parsing the answer file's template: %w", err)
	}
	var out bytes.Buffer
	if err := parsed.Execute(&out, a); err != nil {
		return nil, fmt.Errorf("writing the answer file: %w", err)
	}
	return out.Bytes(), nil
}
