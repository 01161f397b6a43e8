package bootstrap

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strconv"

	"github.com/vmware-tanzu/vm-operator/api/v1alpha5/cloudinit"
	"github.com/vmware-tanzu/vm-operator/api/v1alpha5/common"
	"sigs.k8s.io/yaml"
)

// cloudConfig is a cloud-config with what Secrets hold put in.
type cloudConfig struct {
	Timezone   string      `json:"timezone,omitempty"`
	Users      []any       `json:"users,omitempty"`
	RunCmd     []any       `json:"runcmd,omitempty"`
	WriteFiles []writeFile `json:"write_files,omitempty"`
	SSHPwAuth  *bool       `json:"ssh_pwauth,omitempty"`
}

// cloudUser is a user with the secrets in it.
type cloudUser struct {
	CreateGroups      *bool    `json:"create_groups,omitempty"`
	ExpireDate        *string  `json:"expiredate,omitempty"`
	Gecos             *string  `json:"gecos,omitempty"`
	Groups            []string `json:"groups,omitempty"`
	HashedPasswd      string   `json:"hashed_passwd,omitempty"`
	Homedir           *string  `json:"homedir,omitempty"`
	Inactive          *string  `json:"inactive,omitempty"`
	LockPasswd        *bool    `json:"lock_passwd,omitempty"`
	Name              string   `json:"name"`
	NoCreateHome      *bool    `json:"no_create_home,omitempty"`
	NoLogInit         *bool    `json:"no_log_init,omitempty"`
	NoUserGroup       *bool    `json:"no_user_group,omitempty"`
	Passwd            string   `json:"passwd,omitempty"`
	PrimaryGroup      *string  `json:"primary_group,omitempty"`
	SELinuxUser       *string  `json:"selinux_user,omitempty"`
	Shell             *string  `json:"shell,omitempty"`
	SnapUser          *string  `json:"snapuser,omitempty"`
	SSHAuthorizedKeys []string `json:"ssh_authorized_keys,omitempty"`
	SSHImportID       []string `json:"ssh_import_id,omitempty"`
	SSHRedirectUser   *bool    `json:"ssh_redirect_user,omitempty"`
	Sudo              *string  `json:"sudo,omitempty"`
	System            *bool    `json:"system,omitempty"`
	UID               *int64   `json:"uid,omitempty"`
}

type writeFile struct {
	Append      bool   `json:"append,omitempty"`
	Content     string `json:"content"`
	Defer       bool   `json:"defer,omitempty"`
	Encoding    string `json:"encoding,omitempty"`
	Owner       string `json:"owner,omitempty"`
	Path        string `json:"path"`
	Permissions string `json:"permissions,omitempty"`
}

func visitCloudConfig(config *cloudinit.CloudConfig, add func(field, name string)) {
	const field = fieldCloudInit + ".cloudConfig"
	for i, user := range config.Users {
		if user.Passwd != nil {
			add(fmt.Sprintf("%s.users[%d].passwd", field, i), user.Passwd.Name)
		}
		if user.HashedPasswd != nil {
			add(fmt.Sprintf("%s.users[%d].hashed_passwd", field, i), user.HashedPasswd.Name)
		}
	}
	for i, file := range config.WriteFiles {
		if selector := contentSecret(file.Content); selector != nil {
			add(fmt.Sprintf("%s.write_files[%d].content", field, i), selector.Name)
		}
	}
}

// contentSecret returns the reference that a file's content is, or nil.
func contentSecret(content json.RawMessage) *common.SecretKeySelector {
	if !bytes.HasPrefix(bytes.TrimSpace(content), []byte("{")) {
		return nil
	}
	var selector common.SecretKeySelector
	if err := json.Unmarshal(content, &selector); err != nil {
		return nil
	}
	return &selector
}

// inlineCloudConfig renders the cloud-config that is written in the object. As
// with VM Operator it is a Jinja template: {{ ds.meta_data.hostname }}.
func (in *Input) inlineCloudConfig(config *cloudinit.CloudConfig) ([]byte, error) {
	const field = fieldCloudInit + ".cloudConfig"
	out := cloudConfig{Timezone: config.Timezone, SSHPwAuth: config.SSHPwdAuth}
	if config.DefaultUserEnabled && len(config.Users) > 0 {
		out.Users = append(out.Users, "default")
	}
	for i := range config.Users {
		user, err := in.inlineUser(fmt.Sprintf("%s.users[%d]", field, i), &config.Users[i])
		if err != nil {
			return nil, err
		}
		out.Users = append(out.Users, user)
	}
	commands, err := runCommands(field+".runcmd", config.RunCmd)
	if err != nil {
		return nil, err
	}
	out.RunCmd = commands
	for i := range config.WriteFiles {
		file, err := in.inlineFile(fmt.Sprintf("%s.write_files[%d]", field, i), &config.WriteFiles[i])
		if err != nil {
			return nil, err
		}
		out.WriteFiles = append(out.WriteFiles, file)
	}
	text, err := yaml.Marshal(out)
	if err != nil {
		return nil, invalid(field, "encoding: %v", err)
	}
	if err := noPlaceholders(field, text); err != nil {
		return nil, err
	}
	return append([]byte("## template: jinja\n#cloud-config\n"), text...), nil
}

func (in *Input) inlineUser(field string, user *cloudinit.User) (cloudUser, error) {
	out := cloudUser{
		CreateGroups: user.CreateGroups, ExpireDate: user.ExpireDate, Gecos: user.Gecos, Groups: user.Groups,
		Homedir: user.Homedir, LockPasswd: user.LockPasswd, Name: user.Name, NoCreateHome: user.NoCreateHome,
		NoLogInit: user.NoLogInit, NoUserGroup: user.NoUserGroup, PrimaryGroup: user.PrimaryGroup,
		SELinuxUser: user.SELinuxUser, Shell: user.Shell, SnapUser: user.SnapUser,
		SSHAuthorizedKeys: user.SSHAuthorizedKeys, SSHImportID: user.SSHImportID, SSHRedirectUser: user.SSHRedirectUser,
		Sudo: user.Sudo, System: user.System, UID: user.UID,
	}
	if user.Name == "" {
		return out, invalid(field+".name", "a user needs a name")
	}
	if user.Inactive != nil {
		days := strconv.Itoa(int(*user.Inactive))
		out.Inactive = &days
	}
	for _, secret := range []struct {
		name     string
		selector *common.SecretKeySelector
		out      *string
	}{{"passwd", user.Passwd, &out.Passwd}, {"hashed_passwd", user.HashedPasswd, &out.HashedPasswd}} {
		if secret.selector == nil {
			continue
		}
		value, err := in.lookup(field+"."+secret.name, secret.selector.Name, secret.selector.Key)
		if err != nil {
			return out, err
		}
		*secret.out = string(bytes.TrimRight(value, "\r\n"))
	}
	return out, nil
}

// runCommands are strings and lists of strings.
func runCommands(field string, raw json.RawMessage) ([]any, error) {
	if len(raw) == 0 {
		return nil, nil
	}
	var entries []json.RawMessage
	if err := json.Unmarshal(raw, &entries); err != nil {
		return nil, invalid(field, "it is not a list")
	}
	var out []any
	for i, entry := range entries {
		var line string
		if json.Unmarshal(entry, &line) == nil {
			out = append(out, line)
			continue
		}
		var words []string
		if err := json.Unmarshal(entry, &words); err != nil {
			return nil, invalid(fmt.Sprintf("%s[%d]", field, i), "a command is a string or a list of strings; put numbers in quotes")
		}
		out = append(out, words)
	}
	return out, nil
}

func (in *Input) inlineFile(field string, file *cloudinit.WriteFile) (writeFile, error) {
	out := writeFile{
		Append: file.Append, Defer: file.Defer, Encoding: string(file.Encoding), Owner: file.Owner, Path: file.Path,
		Permissions: file.Permissions,
	}
	if file.Path == "" {
		return out, invalid(field+".path", "a file needs a path")
	}
	if selector := contentSecret(file.Content); selector != nil {
		value, err := in.lookup(field+".content", selector.Name, selector.Key)
		if err != nil {
			return out, err
		}
		out.Content = string(value)
		return out, nil
	}
	if len(file.Content) > 0 {
		if err := json.Unmarshal(file.Content, &out.Content); err != nil {
			return out, invalid(field+".content", "it is neither a string nor a reference with name and key")
		}
	}
	return out, nil
}
