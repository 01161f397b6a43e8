package guest

import "testing"

func TestCloudInitResult(t *testing.T) {
	for text, want := range map[string]string{
		`{"v1":{"datasource":"x","errors":[]}}`:          "done ",
		`{"v1":{"errors":["bad\u0007 thing","second"]}}`: "error bad thing",
		`[`: " ",
	} {
		status, detail := cloudInitResult([]byte(text))
		if got := status + " " + detail; got != want {
			t.Errorf("%s: %q", text, got)
		}
	}
}
