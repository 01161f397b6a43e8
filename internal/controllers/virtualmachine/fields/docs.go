package fields

import (
	"fmt"
	"strings"
)

// Markdown is docs/vm-fields.md; a test writes it.
func Markdown() string {
	var out strings.Builder
	out.WriteString(`# Fields of the VM Operator API

What each field of a specification does in Atoll, as of v1alpha5, the version that is stored. Fields of v1alpha2 to v1alpha4 are converted to these. A field stands for all that is below it. This page is written by ` + "`go test ./internal/controllers/virtualmachine/fields -update`" + `; the test fails when the API has a field that is missing here.

- **honoured**: as VMware documents it.
- **mapped**: to something that serves the same end.
- **accepted without effect**: kept, and named in the condition ` + "`" + `atoll.dev/FieldsWithoutEffect` + "`" + ` of a VirtualMachine, a Network or a NetworkInterface that sets it.
`)
	for _, k := range Kinds() {
		fmt.Fprintf(&out, "\n## %s\n\n| field | effect | |\n|---|---|---|\n", k.Name)
		for _, f := range k.Fields {
			fmt.Fprintf(&out, "| `%s` | %s | %s |\n", f.Path, f.Effect, strings.ReplaceAll(f.Note, "|", `\|`))
		}
	}
	return out.String()
}
