package bootstrap

import (
	"net/netip"
	"strings"
	"testing"

	"atoll.dev/atoll/internal/testkit/golden"
)

func TestGoldenManifests(t *testing.T) {
	cfg := Config{
		DNSServiceIP: netip.MustParseAddr("10.96.0.10"),
		DNSEndpoint:  netip.MustParseAddr("10.244.0.1"),
		DNSPort:      53,
		NodeName:     "host-1",
		NodeIP:       netip.MustParseAddr("192.0.2.1"),
		Portal:       443,
		Version:      "v0.1.0",
		WebhookPort:  9443,
		WebhookCA:    []byte("an authority"),

		DatastorePath: "/var/lib/atoll/datastores/default",
	}
	var text strings.Builder
	for _, m := range manifests(cfg) {
		if m.resource.Resource == "customresourcedefinitions" {
			continue // generated, and a file of its own
		}
		text.WriteString("---" + m.text)
	}
	golden.Compare(t, "manifests.yaml", text.String())
	list, err := objects(cfg)
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range list {
		if o.content.GetKind() == "" || o.content.GetName() == "" {
			t.Errorf("incomplete object %v", o.content.Object)
		}
	}
}
