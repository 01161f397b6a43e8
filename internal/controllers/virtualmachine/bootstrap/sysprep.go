package bootstrap

import (
	"bytes"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strings"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	"github.com/vmware-tanzu/vm-operator/api/v1alpha5/sysprep"
)

// Windows reads the answer file from the root of read-only media, under the one
// name when it is installed and under the other when a prepared image boots.
var unattendFiles = []string{"unattend.xml", "autounattend.xml"}

// unattendKey is the key of rawSysprep when the field names none.
const unattendKey = "unattend"

// maxBatch bounds a batch file, which goes into the answer file in pieces.
const maxBatch = 50 << 10

// windowsName is what Windows takes for a computer's name.
var windowsName = regexp.MustCompile(`^[A-Za-z0-9-]{1,15}$`)

func visitSysprep(spec *sysprep.Sysprep, add func(field, name string)) {
	const field = fieldSysprep + ".sysprep"
	if g := spec.GUIUnattended; g != nil && g.Password != nil {
		add(field+".guiUnattended.password", g.Password.Name)
	}
	if i := spec.Identification; i != nil && i.DomainAdminPassword != nil {
		add(field+".identification.domainAdminPassword", i.DomainAdminPassword.Name)
	}
	if spec.UserData.ProductID != nil {
		add(field+".userData.productID", spec.UserData.ProductID.Name)
	}
	if spec.ScriptText != nil && spec.ScriptText.From != nil {
		add(field+".scriptText.from", spec.ScriptText.From.Name)
	}
}

func (in *Input) sysprep(spec *vmopv1.VirtualMachineBootstrapSysprepSpec) (*Seed, error) {
	seed := &Seed{Label: LabelUnattend, Files: map[string][]byte{}}
	var answer []byte
	var err error
	switch {
	case spec.Sysprep != nil && spec.RawSysprep != nil:
		return nil, invalid(fieldSysprep, "sysprep and rawSysprep cannot be used together; keep one")
	case spec.RawSysprep != nil:
		answer, err = in.rawSysprep(spec, seed)
	case spec.Sysprep != nil:
		answer, err = in.inlineSysprep(spec.Sysprep, seed)
	default:
		return nil, invalid(fieldSysprep, "neither sysprep nor rawSysprep is set")
	}
	if err != nil {
		return nil, err
	}
	for _, name := range unattendFiles {
		seed.Files[name] = answer
	}
	return seed, nil
}

// rawSysprep reads an answer file as it is in a Secret. It may be a template.
func (in *Input) rawSysprep(spec *vmopv1.VirtualMachineBootstrapSysprepSpec, seed *Seed) ([]byte, error) {
	const field = fieldSysprep + ".rawSysprep"
	key := spec.RawSysprep.Key
	if key == "" {
		key = unattendKey
	}
	data, err := in.lookup(field, spec.RawSysprep.Name, key)
	if err != nil {
		return nil, err
	}
	if data, err = decode(field, data); err != nil {
		return nil, err
	}
	if err := noPlaceholders(field, data); err != nil {
		return nil, err
	}
	render, err := in.newRenderer()
	if err != nil {
		return nil, err
	}
	text, err := render.render(key, string(data))
	if err != nil {
		seed.Notes = append(seed.Notes, fmt.Sprintf("%s is passed on as it is written: %v", field, err))
	}
	if err := checkUnattend([]byte(text)); err != nil {
		return nil, invalid(field, "%q of %q: %v", key, spec.RawSysprep.Name, err)
	}
	return []byte(text), nil
}

// checkUnattend finds what Windows would only complain about at its first boot.
func checkUnattend(data []byte) error {
	decoder := xml.NewDecoder(bytes.NewReader(data))
	// Other encodings than UTF-8 are left to Windows.
	decoder.CharsetReader = func(_ string, input io.Reader) (io.Reader, error) { return input, nil }
	root := ""
	for {
		token, err := decoder.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fmt.Errorf("the answer file is not valid XML: %w", err)
		}
		if start, ok := token.(xml.StartElement); ok && root == "" {
			root = start.Name.Local
		}
	}
	if root != "unattend" {
		return fmt.Errorf("the answer file's root is %q, Windows wants <unattend>", root)
	}
	return nil
}

// inlineSysprep makes an answer file of the object's fields.
func (in *Input) inlineSysprep(spec *sysprep.Sysprep, seed *Seed) ([]byte, error) {
	const field = fieldSysprep + ".sysprep"
	answers := answerFile{
		Hostname: strings.ToUpper(in.Hostname), Owner: spec.UserData.FullName, Organization: spec.UserData.OrgName,
		TimeZone: "UTC", NICs: in.unattendNICs(), Search: in.search(),
	}
	if !windowsName.MatchString(in.Hostname) {
		return nil, invalid("spec.network.hostName", "%q is not a name for Windows: 1 to 15 letters, digits and hyphens; set this field", in.Hostname)
	}
	var err error
	if p := spec.UserData.ProductID; p != nil {
		if answers.ProductKey, err = in.secretText(field+".userData.productID", p.Name, p.Key, "product_id"); err != nil {
			return nil, err
		}
	}
	if spec.LicenseFilePrintData != nil {
		seed.Notes = append(seed.Notes, field+".licenseFilePrintData is for Windows Server 2003 and has no effect")
	}
	if err := in.answerLogon(spec, &answers); err != nil {
		return nil, err
	}
	if err := in.answerDomain(spec.Identification, &answers); err != nil {
		return nil, err
	}
	if spec.GUIRunOnce != nil {
		answers.FirstLogon = spec.GUIRunOnce.Commands
	}
	if err := in.answerScript(spec, &answers); err != nil {
		return nil, err
	}
	answer, err := answers.bytes()
	if err != nil {
		return nil, invalid(field, "%v", err)
	}
	return answer, nil
}

// answerLogon fills in what is about the administrator.
func (in *Input) answerLogon(spec *sysprep.Sysprep, answers *answerFile) error {
	const field = fieldSysprep + ".sysprep.guiUnattended"
	gui := spec.GUIUnattended
	if gui == nil {
		return nil
	}
	zone, ok := windowsTimeZones[gui.TimeZone]
	if gui.TimeZone != 0 && !ok {
		return invalid(field+".timeZone", "%d is not an index of a Windows time zone", gui.TimeZone)
	}
	if gui.TimeZone != 0 {
		answers.TimeZone = zone
	}
	if gui.Password != nil {
		password, err := in.secretText(field+".password", gui.Password.Name, gui.Password.Key, "password")
		if err != nil {
			return err
		}
		answers.Password = password
	}
	if gui.AutoLogon {
		if answers.Password == "" {
			return invalid(field+".autoLogon", "it needs a password")
		}
		if gui.AutoLogonCount < 1 {
			return invalid(field+".autoLogonCount", "it is %d; with autoLogon it must be at least 1", gui.AutoLogonCount)
		}
		answers.AutoLogon = int(gui.AutoLogonCount)
	}
	answers.ExpirePassword = spec.ExpirePasswordAfterNextLogin
	return nil
}

// answerDomain fills in what the computer joins.
func (in *Input) answerDomain(id *sysprep.Identification, answers *answerFile) error {
	const field = fieldSysprep + ".sysprep.identification"
	if id == nil {
		return nil
	}
	if id.JoinWorkgroup != "" {
		if id.DomainAdmin != "" || id.DomainAdminPassword != nil || in.Domain != "" {
			return invalid(field+".joinWorkgroup", "a workgroup cannot be joined together with a domain; remove domainAdmin, domainAdminPassword and spec.network.domainName")
		}
		answers.Workgroup = id.JoinWorkgroup
		return nil
	}
	if id.DomainAdmin == "" {
		return nil
	}
	if in.Domain == "" {
		return invalid("spec.network.domainName", "%s.domainAdmin is set, but no domain to join", field)
	}
	answers.Domain, answers.DomainAdmin, answers.DomainOU = in.Domain, id.DomainAdmin, id.DomainOU
	if p := id.DomainAdminPassword; p != nil {
		password, err := in.secretText(field+".domainAdminPassword", p.Name, p.Key, "domain_admin_password")
		if err != nil {
			return err
		}
		answers.DomainPassword = password
	}
	return nil
}

// answerScript has the batch file run in both phases.
func (in *Input) answerScript(spec *sysprep.Sysprep, answers *answerFile) error {
	if spec.ScriptText == nil {
		return nil
	}
	const field = fieldSysprep + ".sysprep.scriptText"
	script, err := in.valueOrSecret(field, spec.ScriptText)
	if err != nil {
		return err
	}
	if len(script) > maxBatch {
		return invalid(field, "the script has %d bytes, the limit is %d; have it fetch the rest", len(script), maxBatch)
	}
	answers.Script = script
	return nil
}

// secretText reads a one-line value; the key may be the usual one.
func (in *Input) secretText(field, name, key, usual string) (string, error) {
	if key == "" {
		key = usual
	}
	value, err := in.lookup(field, name, key)
	return strings.TrimRight(string(value), "\r\n"), err
}

// search lists the DNS suffixes.
func (in *Input) search() []string {
	if network := in.VM.Spec.Network; network != nil {
		return network.SearchDomains
	}
	return nil
}
