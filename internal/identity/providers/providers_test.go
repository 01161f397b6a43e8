package providers

import (
	"context"
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"reflect"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	authenticationcel "k8s.io/apiserver/pkg/authentication/cel"

	api "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/internal/testkit/golden"
)

const base = `apiVersion: apiserver.config.k8s.io/v1
kind: AuthenticationConfiguration
anonymous:
  enabled: true
  conditions:
  - path: /livez
`

func provider(name, domain, issuer string) api.IdentityProvider {
	return api.IdentityProvider{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec:       api.IdentityProviderSpec{Domain: domain, IssuerURL: issuer, ClientID: "atoll", UsernameClaim: "preferred_username", GroupsClaim: "groups"},
	}
}

func TestGoldenConfiguration(t *testing.T) {
	corp := provider("corp", "corp.example", "https://issuer.corp.example/realm")
	mail := provider("mail", "mail.example", "https://mail.example")
	mail.Spec.UsernameClaim, mail.Spec.GroupsClaim = "email", "realm_access.roles"
	text, err := render(base, []*api.IdentityProvider{&corp, &mail})
	if err != nil {
		t.Fatal(err)
	}
	golden.Compare(t, "authentication.yaml", string(text))
	if err := validate(text); err != nil {
		t.Error(err)
	}
	if text, err := render(base, nil); err != nil || string(text) != base {
		t.Errorf("without any: %s, %v", text, err)
	}
}

// TestNames runs the expressions as the API server does.
func TestNames(t *testing.T) {
	p := provider("corp", "corp.example", "https://issuer")
	a := authenticator(&p)
	compiler := authenticationcel.NewDefaultCompiler()
	name, err := compiler.CompileClaimsExpression(&authenticationcel.ClaimMappingExpression{Expression: a.ClaimMappings.Username.Expression})
	if err != nil {
		t.Fatal(err)
	}
	groups, err := compiler.CompileClaimsExpression(&authenticationcel.ClaimMappingExpression{Expression: a.ClaimMappings.Groups.Expression})
	if err != nil {
		t.Fatal(err)
	}
	rule, err := compiler.CompileUserExpression(&authenticationcel.UserValidationCondition{Expression: a.UserValidationRules[0].Expression})
	if err != nil {
		t.Fatal(err)
	}
	eval := func(r authenticationcel.CompilationResult, key string, value, native any) (any, error) {
		out, _, err := r.Program.ContextEval(context.Background(), map[string]any{key: value})
		if err != nil {
			return nil, err
		}
		return out.ConvertToNative(reflect.TypeOf(native))
	}
	for in, want := range map[string]string{
		"anna": "sso:anna@corp.example", "anna@corp.example": "sso:anna@corp.example", "Ännä+x": "sso:Ännä+x@corp.example",
		"administrator@atoll.local": "", "anna@other.example": "", "system:admin": "", "a b": "", "a/b": "", "": "", "a\u200bb": "", "a\nb": "",
		"@corp.example": "", "x@corp.example@corp.example": "",
	} {
		got, err := eval(name, "claims", map[string]any{"preferred_username": in}, "")
		if err != nil {
			t.Errorf("%q: %v", in, err)
			continue
		}
		allowed, err := eval(rule, "user", map[string]any{"username": got}, true)
		if err != nil || allowed != (want != "") || want != "" && got != want {
			t.Errorf("%q: %v, allowed %v, %v", in, got, allowed, err)
		}
	}
	if got, err := eval(name, "claims", map[string]any{}, ""); err == nil {
		t.Errorf("without the claim: %v", got)
	}
	for in, want := range map[string]string{
		"dev|ops": "[sso:dev@corp.example sso:ops@corp.example]", "system:masters": "[]", "administrators@atoll.local": "[]", "": "[]",
	} {
		var list []any
		for part := range strings.SplitSeq(in, "|") {
			list = append(list, part)
		}
		got, err := eval(groups, "claims", map[string]any{"groups": append(list, 7, nil)}, []string{})
		if err != nil || fmt.Sprint(got) != want {
			t.Errorf("%s: %v, %v", in, got, err)
		}
	}
	for want, claims := range map[string][]map[string]any{
		"[]":                     {{}, {"groups": nil}, {"groups": []any{}}, {"groups": 7}, {"groups": map[string]any{"dev": true}}, {"groups": "system:masters"}},
		"[sso:dev@corp.example]": {{"groups": "dev"}},
	} {
		for _, c := range claims {
			if got, err := eval(groups, "claims", c, []string{}); err != nil || fmt.Sprint(got) != want {
				t.Errorf("%v: %v, %v", c, got, err)
			}
		}
	}
}

func TestJudge(t *testing.T) {
	at := func(p api.IdentityProvider, minute int) api.IdentityProvider {
		p.CreationTimestamp = metav1.NewTime(time.Unix(1e9, 0).Add(time.Duration(minute) * time.Minute))
		return p
	}
	bad := provider("bad-ca", "ca.example", "https://ca")
	bad.Spec.CertificateAuthority = "nonsense"
	claim := provider("bad-claim", "claim.example", "https://claim")
	claim.Spec.UsernameClaim = "in"
	items := []api.IdentityProvider{
		at(provider("late", "corp.example", "https://late"), 2),
		at(provider("first", "corp.example", "https://first"), 1),
		at(provider("same-issuer", "x.example", "https://first"), 3),
		at(provider("local", "atoll.local", "https://local"), 4),
		at(provider("below", "evil.atoll.local", "https://below"), 5),
		at(provider("ours", "ours.example", "https://portal.atoll.local"), 6),
		at(provider("plain", "plain.example", "http://plain"), 7),
		at(bad, 8), at(claim, 9),
	}
	want := map[string]string{
		"first": "", "late": reasonDomainTaken, "same-issuer": reasonIssuerTaken, "local": reasonInvalid, "below": reasonInvalid,
		"ours": reasonInvalid, "plain": reasonInvalid, "bad-ca": reasonInvalid, "bad-claim": reasonInvalid,
	}
	c := New(Config{Base: base})
	for _, v := range c.judge(items) {
		if v.reason != want[v.provider.Name] || v.valid != (v.reason == "") {
			t.Errorf("%s: %s %s", v.provider.Name, v.reason, v.message)
		}
	}
}

func TestDiscover(t *testing.T) {
	var answer string
	issuer := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/.well-known/openid-configuration" {
			http.NotFound(w, r)
			return
		}
		_, _ = fmt.Fprint(w, answer)
	}))
	defer issuer.Close()
	p := provider("p", "corp.example", issuer.URL)
	p.Spec.CertificateAuthority = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: issuer.Certificate().Raw}))
	for text, want := range map[string]string{
		`{"issuer":"` + issuer.URL + `","token_endpoint":"https://x/t","jwks_uri":"https://x/k"}`: "",
		`{"issuer":"https://other","token_endpoint":"https://x/t","jwks_uri":"https://x/k"}`:      "calls itself",
		`{"issuer":"` + issuer.URL + `","token_endpoint":"http://x/t","jwks_uri":"https://x/k"}`:  "is not HTTPS",
		`{"issuer":"` + issuer.URL + `"}`: "names no token_endpoint",
		`<html>`:                          "is not what an OIDC issuer has",
		strings.Repeat(" ", maxDiscovery+10) + `{}`: "is not what an OIDC issuer has",
	} {
		answer = text
		_, err := discover(t.Context(), &p)
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%.60s: %v", text, err)
		}
	}
	p.Spec.CertificateAuthority = ""
	if _, err := discover(t.Context(), &p); err == nil {
		t.Error("an unknown authority is trusted")
	}
}
