package credentials

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
)

func TestAnswer(t *testing.T) {
	const ask = `{"apiVersion":"credentialprovider.kubelet.k8s.io/v1","kind":"CredentialProviderRequest","image":"registry.atoll.local/shop/web:1","serviceAccountToken":"eyJ.a.b"}`
	for name, c := range map[string]struct {
		in       string
		external bool
		want     string
		fails    bool
	}{
		"a pod":             {in: ask, want: `"registry.atoll.local":{"username":"serviceaccount","password":"eyJ.a.b"}`},
		"external registry": {in: ask, external: true, want: `"auth":{}`},
		"no token":          {in: strings.Replace(ask, "eyJ.a.b", "", 1), want: `"auth":{}`},
		"another version":   {in: strings.Replace(ask, "/v1", "/v2", 1), fails: true},
		"no image":          {in: strings.Replace(ask, "registry.atoll.local/shop/web:1", "", 1), fails: true},
		"no JSON":           {in: "x", fails: true},
	} {
		t.Run(name, func(t *testing.T) {
			var out bytes.Buffer
			err := Answer(strings.NewReader(c.in), &out, c.external)
			if (err != nil) != c.fails || !strings.Contains(out.String(), c.want) {
				t.Errorf("%v, %s", err, &out)
			}
			if !c.fails && (!json.Valid(out.Bytes()) || !strings.Contains(out.String(), `"cacheDuration":"0s"`)) {
				t.Errorf("answered %s", &out)
			}
		})
	}
}

func FuzzAnswer(f *testing.F) {
	f.Add([]byte(`{"apiVersion":"credentialprovider.kubelet.k8s.io/v1","kind":"CredentialProviderRequest","image":"a/b","serviceAccountToken":"x"}`))
	f.Fuzz(func(t *testing.T, in []byte) {
		var out bytes.Buffer
		if err := Answer(bytes.NewReader(in), &out, false); err == nil && !json.Valid(out.Bytes()) {
			t.Errorf("answered %s", &out)
		}
	})
}
