package bootstrap

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"sigs.k8s.io/yaml"
)

// userDataKinds are the beginnings by which cloud-init knows what user data are.
var userDataKinds = []string{
	"#!", "#include", "#cloud-boothook", "#part-handler", "#cloud-config-archive", "#cloud-config-jsonp",
	"#upstart-job", "Content-Type: multipart/", "MIME-Version:", "## template: jinja",
}

// shapes says what the values of the usual keys of a cloud-config are.
var shapes = map[string]func(any) error{
	"users":               anyOf(isList, isMap, isText),
	"runcmd":              isCommands,
	"bootcmd":             isCommands,
	"write_files":         isFiles,
	"packages":            isList,
	"package_update":      isTruth,
	"package_upgrade":     isTruth,
	"ssh_authorized_keys": isList,
	"ssh_pwauth":          anyOf(isTruth, isText),
	"disable_root":        anyOf(isTruth, isText),
	"hostname":            isText,
	"fqdn":                isText,
	"timezone":            isText,
	"locale":              anyOf(isText, isTruth),
	"password":            isText,
	"chpasswd":            isMap,
	"groups":              anyOf(isList, isMap, isText),
	"mounts":              isList,
	"growpart":            isMap,
	"apt":                 isMap,
	"ntp":                 isMap,
	"power_state":         isMap,
	"final_message":       isText,
	"manage_etc_hosts":    anyOf(isTruth, isText),
	"preserve_hostname":   isTruth,
}

// checkUserData finds what cloud-init would only complain about inside the guest:
// data that it does not know, that are not YAML, or whose usual keys have values
// of another kind. It is no full validation.
func checkUserData(data []byte) error {
	text := strings.TrimLeft(string(data), " \t\r\n\ufeff")
	if text == "" {
		return errors.New("the user data are empty")
	}
	first, _, _ := strings.Cut(text, "\n")
	first = strings.TrimSpace(first)
	if first != "#cloud-config" {
		for _, kind := range userDataKinds {
			if strings.HasPrefix(text, kind) {
				return nil
			}
		}
		return fmt.Errorf("the user data begin with %.40q; cloud-init wants #cloud-config, a script (#!) or MIME parts", first)
	}
	config := map[string]any{}
	if err := yaml.Unmarshal(bytes.TrimSpace([]byte(text)), &config); err != nil {
		return fmt.Errorf("the cloud-config is not valid YAML: %s", yamlMessage(err))
	}
	for _, key := range slices.Sorted(maps.Keys(config)) {
		if shape, ok := shapes[key]; ok && config[key] != nil {
			if err := shape(config[key]); err != nil {
				return fmt.Errorf("the cloud-config's %s %w", key, err)
			}
		}
	}
	return nil
}

// yamlMessage is the parser's message without what it says about Go.
func yamlMessage(err error) string {
	message := strings.TrimPrefix(err.Error(), "error converting YAML to JSON: ")
	if strings.Contains(message, "cannot unmarshal") {
		return "it is not a mapping of keys to values"
	}
	return message
}

func anyOf(shapes ...func(any) error) func(any) error {
	return func(value any) error {
		var err error
		for _, shape := range shapes {
			if err = shape(value); err == nil {
				return nil
			}
		}
		return err
	}
}

func isList(value any) error {
	if _, ok := value.([]any); !ok {
		return errors.New("is not a list")
	}
	return nil
}

func isMap(value any) error {
	if _, ok := value.(map[string]any); !ok {
		return errors.New("is not a mapping")
	}
	return nil
}

func isText(value any) error {
	switch value.(type) {
	case string, float64, int64:
		return nil
	}
	return errors.New("is not a string")
}

func isTruth(value any) error {
	switch value := value.(type) {
	case bool:
		return nil
	case string:
		if slices.Contains([]string{"yes", "no", "true", "false", "on", "off"}, strings.ToLower(value)) {
			return nil
		}
	}
	return errors.New("is neither true nor false")
}

func isCommands(value any) error {
	list, ok := value.([]any)
	if !ok {
		return errors.New("is not a list")
	}
	for i, entry := range list {
		switch entry.(type) {
		case string, []any, nil:
		default:
			return fmt.Errorf("has an entry %d that is neither a string nor a list of strings; put it in quotes", i)
		}
	}
	return nil
}

func isFiles(value any) error {
	list, ok := value.([]any)
	if !ok {
		return errors.New("is not a list")
	}
	for i, entry := range list {
		file, ok := entry.(map[string]any)
		if !ok {
			return fmt.Errorf("has an entry %d that is not a mapping", i)
		}
		if path, _ := file["path"].(string); path == "" {
			return fmt.Errorf("has an entry %d without a path", i)
		}
		if permissions, ok := file["permissions"]; ok {
			if _, text := permissions.(string); !text {
				return fmt.Errorf("has an entry %d whose permissions are not a string; put them in quotes", i)
			}
		}
	}
	return nil
}
