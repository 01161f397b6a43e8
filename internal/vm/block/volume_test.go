package block

import (
	"strings"
	"testing"
)

func TestCheckSerial(t *testing.T) {
	for s, ok := range map[string]bool{
		"a": true, "pvc-0123.x_Y": true, strings.Repeat("x", 36): true,
		"": false, strings.Repeat("x", 37): false, "a b": false, `a"`: false, "a,b": false, "ä": false,
	} {
		if err := CheckSerial(s); (err == nil) != ok {
			t.Errorf("%q: %v", s, err)
		}
	}
}
