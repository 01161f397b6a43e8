package providers

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apiserver/pkg/apis/apiserver"
	"k8s.io/apiserver/pkg/apis/apiserver/install"
	apiserverv1 "k8s.io/apiserver/pkg/apis/apiserver/v1"
	"k8s.io/apiserver/pkg/apis/apiserver/validation"
	authenticationcel "k8s.io/apiserver/pkg/authentication/cel"
	"sigs.k8s.io/yaml"

	api "atoll.dev/atoll/api/atoll/v1alpha1"
	"atoll.dev/atoll/internal/identity/token"
)

// part is what the names of people and groups of an issuer may be: no @ and no :, which have a meaning in the names
// that Kubernetes gets, no / and nothing that cannot be seen.
const part = `[^@:/\s\pC]{1,200}`

// authenticator is how the API server reads the tokens of an issuer.
func authenticator(p *api.IdentityProvider) apiserverv1.JWTAuthenticator {
	suffix := "@" + p.Spec.Domain
	name := "string(claims." + orDefault(p.Spec.UsernameClaim, "preferred_username") + ")"
	groups := "dyn(claims.?" + strings.ReplaceAll(orDefault(p.Spec.GroupsClaim, "groups"), ".", ".?") + ".orValue([]))"
	groups = fmt.Sprintf("(type(%[1]s) == list ? %[1]s : [%[1]s])", groups) // some issuers write one group, or null for none
	out := apiserverv1.JWTAuthenticator{
		Issuer: apiserverv1.Issuer{
			URL: p.Spec.IssuerURL, Audiences: []string{p.Spec.ClientID}, CertificateAuthority: p.Spec.CertificateAuthority,
		},
		ClaimMappings: apiserverv1.ClaimMappings{
			Username: apiserverv1.PrefixedClaimOrExpression{Expression: fmt.Sprintf(
				`%[1]q + (%[2]s.endsWith(%[3]q) ? %[2]s.substring(0, size(%[2]s) - %[4]d) : %[2]s) + %[3]q`, api.SubjectPrefix, name, suffix, len(suffix))},
			Groups: apiserverv1.PrefixedClaimOrExpression{Expression: fmt.Sprintf(
				`%s.filter(g, type(g) == string && g.matches(r"^%s$")).map(g, %q + string(g) + %q)`, groups, part, api.SubjectPrefix, suffix)},
			UID: apiserverv1.ClaimOrExpression{Claim: "sub"},
		},
		UserValidationRules: []apiserverv1.UserValidationRule{{
			Expression: fmt.Sprintf(`user.username.matches(r"^%s%s%s$")`, api.SubjectPrefix, part, strings.ReplaceAll(suffix, ".", `\.`)),
			Message:    "the name of the user has an @ of another domain, a :, a / or a character that cannot be seen",
		}},
	}
	if p.Spec.UsernameClaim == "email" {
		out.ClaimValidationRules = []apiserverv1.ClaimValidationRule{{
			Expression: "claims.?email_verified.orValue(true) == true",
			Message:    "the e-mail address is not verified by the issuer",
		}}
	}
	return out
}

func orDefault(text, otherwise string) string {
	if text == "" {
		return otherwise
	}
	return text
}

// render is the configuration of the API server: base, which has no issuers, and those of the providers.
func render(base string, list []*api.IdentityProvider) ([]byte, error) {
	text := []byte(base)
	if len(list) == 0 {
		return text, nil
	}
	var all struct {
		JWT []apiserverv1.JWTAuthenticator `json:"jwt"`
	}
	for _, p := range list {
		all.JWT = append(all.JWT, authenticator(p))
	}
	more, err := yaml.Marshal(all)
	if err != nil {
		return nil, fmt.Errorf("encoding the issuers: %w", err)
	}
	return append(text, more...), nil
}

// validate has upstream's own code look at a configuration, expressions included. What it takes, the API server takes.
func validate(text []byte) error {
	scheme := runtime.NewScheme()
	install.Install(scheme)
	decoded, err := runtime.Decode(serializer.NewCodecFactory(scheme, serializer.EnableStrict).UniversalDecoder(), text)
	if err != nil {
		return fmt.Errorf("reading the configuration of the API server: %w", err)
	}
	config, ok := decoded.(*apiserver.AuthenticationConfiguration)
	if !ok {
		return fmt.Errorf("the configuration of the API server is a %T", decoded)
	}
	if err := validation.ValidateAuthenticationConfiguration(authenticationcel.NewDefaultCompiler(), config, []string{token.Issuer}).ToAggregate(); err != nil {
		return err
	}
	return nil
}

// check says what is wrong with one provider by itself.
func check(base string, p *api.IdentityProvider) error {
	if p.Spec.Domain == api.LocalDomain || strings.HasSuffix(p.Spec.Domain, "."+api.LocalDomain) {
		return fmt.Errorf("spec.domain: %s is the domain of local users; choose another", api.LocalDomain)
	}
	if strings.TrimSuffix(p.Spec.IssuerURL, "/") == token.Issuer {
		return errors.New("spec.issuerURL: that is the issuer of local sessions; name the one of your identity provider")
	}
	if ca := p.Spec.CertificateAuthority; ca != "" {
		if err := checkPEM(ca); err != nil {
			return fmt.Errorf("spec.certificateAuthority: %w", err)
		}
	}
	text, err := render(base, []*api.IdentityProvider{p})
	if err != nil {
		return err
	}
	return validate(text)
}

func checkPEM(text string) error {
	rest, found := []byte(text), false
	for {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		if _, err := x509.ParseCertificate(block.Bytes); err != nil {
			return fmt.Errorf("not a certificate: %w", err)
		}
		found = true
	}
	if !found {
		return errors.New("there is no PEM certificate in it; paste the text that begins with -----BEGIN CERTIFICATE-----")
	}
	return nil
}
