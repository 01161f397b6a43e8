package fields

import (
	"flag"
	"os"
	"testing"
)

var update = flag.Bool("update", false, "write docs/vm-fields.md again")

func TestMarkdown(t *testing.T) {
	const file = "../../../../docs/vm-fields.md"
	if *update {
		if err := os.WriteFile(file, []byte(Markdown()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	page, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if string(page) != Markdown() {
		t.Error("docs/vm-fields.md is stale; run: go test ./internal/controllers/virtualmachine/fields -update")
	}
}
