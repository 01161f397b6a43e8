package main

import (
	"bytes"
	"compress/gzip"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// cloudConfig is the part of user data that is understood; the rest of it is
// accepted without effect, as the users and packages of a real system are.
type cloudConfig struct {
	Hostname   string      `yaml:"hostname"`
	FQDN       string      `yaml:"fqdn"`
	BootCmd    []command   `yaml:"bootcmd"`
	RunCmd     []command   `yaml:"runcmd"`
	WriteFiles []writeFile `yaml:"write_files"`
}

// command is a line for the shell, or a program with its arguments.
type command []string

func (c *command) UnmarshalYAML(node *yaml.Node) error {
	if node.Kind == yaml.ScalarNode {
		*c = command{"/bin/sh", "-c", node.Value}
		return nil
	}
	var words []string
	if err := node.Decode(&words); err != nil {
		return fmt.Errorf("line %d: a command is a string or a list of strings", node.Line)
	}
	if len(words) == 0 {
		return fmt.Errorf("line %d: an empty command", node.Line)
	}
	*c = words
	return nil
}

func (c command) run() error {
	if len(c) == 0 {
		return nil
	}
	out, err := os.OpenFile("/run/cloud-init/output.log", os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer func() { _ = out.Close() }()
	cmd := exec.Command(c[0], c[1:]...)
	cmd.Stdout, cmd.Stderr = out, out
	return cmd.Run()
}

type writeFile struct {
	Path        string `yaml:"path"`
	Content     string `yaml:"content"`
	Encoding    string `yaml:"encoding"`
	Permissions string `yaml:"permissions"`
	Append      bool   `yaml:"append"`
}

func (f writeFile) write() error {
	if !filepath.IsAbs(f.Path) {
		return fmt.Errorf("path %q is not absolute", f.Path)
	}
	data := []byte(f.Content)
	for step := range strings.SplitSeq(reverseSteps(f.Encoding), "+") {
		var err error
		if data, err = decode(data, step); err != nil {
			return fmt.Errorf("encoding %q: %w", f.Encoding, err)
		}
	}
	mode := uint64(0o644)
	if f.Permissions != "" {
		var err error
		if mode, err = strconv.ParseUint(f.Permissions, 8, 12); err != nil {
			return fmt.Errorf("permissions %q are not octal", f.Permissions)
		}
	}
	if err := os.MkdirAll(filepath.Dir(f.Path), 0o755); err != nil {
		return err
	}
	flags := os.O_CREATE | os.O_WRONLY | os.O_TRUNC
	if f.Append {
		flags = os.O_CREATE | os.O_WRONLY | os.O_APPEND
	}
	file, err := os.OpenFile(f.Path, flags, os.FileMode(mode))
	if err != nil {
		return err
	}
	_, err = file.Write(data)
	return errors.Join(err, file.Chmod(os.FileMode(mode)), file.Close())
}

// reverseSteps turns "gz+b64" into the order of decoding, "b64+gz".
func reverseSteps(encoding string) string {
	if first, second, ok := strings.Cut(encoding, "+"); ok {
		return second + "+" + first
	}
	return encoding
}

func decode(data []byte, step string) ([]byte, error) {
	switch step {
	case "", "text/plain":
		return data, nil
	case "b64", "base64":
		return base64.StdEncoding.DecodeString(strings.Join(strings.Fields(string(data)), ""))
	case "gz", "gzip":
		reader, err := gzip.NewReader(bytes.NewReader(data))
		if err != nil {
			return nil, err
		}
		return io.ReadAll(io.LimitReader(reader, maxSeedFile))
	}
	return nil, fmt.Errorf("unknown step %q", step)
}

// jinja is the first line of user data with placeholders.
const jinja = "## template: jinja"

// fillIn replaces the placeholders for meta-data in user data that say they have such. cloud-init knows much more of Jinja.
func fillIn(data []byte, meta metaData) []byte {
	first, rest, _ := bytes.Cut(bytes.TrimLeft(data, "\n"), []byte("\n"))
	if string(bytes.TrimSpace(first)) != jinja {
		return data
	}
	text := string(rest)
	for name, value := range map[string]string{
		"instance_id": meta.InstanceID, "local_hostname": meta.LocalHostname, "hostname": meta.Hostname,
	} {
		text = strings.ReplaceAll(text, "{{ ds.meta_data."+name+" }}", value)
	}
	return []byte(text)
}

// parseUserData reads a cloud-config or a script.
func parseUserData(data []byte) (cloudConfig, error) {
	var config cloudConfig
	text := bytes.TrimSpace(data)
	first, _, _ := bytes.Cut(text, []byte("\n"))
	switch {
	case len(text) == 0:
		return config, nil
	case bytes.HasPrefix(first, []byte("#!")):
		config.WriteFiles = []writeFile{{Path: "/run/cloud-init/script", Content: string(text) + "\n", Permissions: "0700"}}
		config.RunCmd = []command{{"/run/cloud-init/script"}}
		return config, nil
	case bytes.Equal(bytes.TrimSpace(first), []byte("#cloud-config")):
		if err := yaml.Unmarshal(text, &config); err != nil {
			return cloudConfig{}, fmt.Errorf("user-data: %w", err)
		}
		return config, nil
	}
	return cloudConfig{}, errors.New("user-data: neither #cloud-config nor #! is its first line")
}
