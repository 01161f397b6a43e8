package nat

import (
	"bytes"
	"errors"
	"fmt"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"
)

// AllowForward lets pod traffic through a foreign "filter FORWARD" chain whose
// policy is drop, as Docker and some firewalls leave it: an accept in a table
// of ours would not overrule it. Two rules for interfaces whose name begins
// with prefix are put at the chain's head and marked. A host without such a chain is left alone.
//
// It sees chains made through nftables (iptables-nft included), not those of
// the old iptables kernel interface.
func AllowForward(prefix string) error {
	conn, err := nftables.New(nftables.AsLasting())
	if err != nil {
		return fmt.Errorf("opening nftables: %w", err)
	}
	defer conn.CloseLasting()
	chains, err := conn.ListChainsOfTableFamily(nftables.TableFamilyIPv4)
	if err != nil {
		return fmt.Errorf("listing nftables chains: %w", err)
	}
	for _, c := range chains {
		if !foreignForward(c) || c.Policy == nil || *c.Policy != nftables.ChainPolicyDrop {
			continue
		}
		found, err := marked(conn, c, prefix)
		if err != nil {
			return err
		}
		if len(found) == 2 {
			continue
		}
		for _, r := range found {
			if err := conn.DelRule(r); err != nil {
				return fmt.Errorf("replacing forward rules: %w", err)
			}
		}
		for _, key := range []expr.MetaKey{expr.MetaKeyIIFNAME, expr.MetaKeyOIFNAME} {
			conn.InsertRule(&nftables.Rule{
				Table: c.Table, Chain: c, UserData: mark(prefix),
				Exprs: join(ifacePrefix(key, prefix), accept()),
			})
		}
		if err := conn.Flush(); err != nil {
			return fmt.Errorf("accepting pod traffic in chain %s: %w", c.Name, err)
		}
	}
	return nil
}

// ForgetForward removes the rules AllowForward added.
func ForgetForward(prefix string) error {
	conn, err := nftables.New(nftables.AsLasting())
	if err != nil {
		return fmt.Errorf("opening nftables: %w", err)
	}
	defer conn.CloseLasting()
	chains, err := conn.ListChainsOfTableFamily(nftables.TableFamilyIPv4)
	if err != nil {
		return fmt.Errorf("listing nftables chains: %w", err)
	}
	for _, c := range chains {
		if !foreignForward(c) {
			continue
		}
		found, err := marked(conn, c, prefix)
		if err != nil {
			return err
		}
		for _, r := range found {
			if err := conn.DelRule(r); err != nil {
				return fmt.Errorf("removing forward rule: %w", err)
			}
		}
	}
	if err := conn.Flush(); err != nil {
		return fmt.Errorf("removing forward rules: %w", err)
	}
	return nil
}

// InputDropped reports whether a foreign chain drops what is not accepted
// explicitly on its way to the host itself: DNS of pods and their way to the
// API server are then the administrator's to accept.
func InputDropped() (bool, error) {
	conn, err := nftables.New()
	if err != nil {
		return false, fmt.Errorf("opening nftables: %w", err)
	}
	chains, err := conn.ListChains()
	if err != nil {
		return false, fmt.Errorf("listing nftables chains: %w", err)
	}
	for _, c := range chains {
		ip := c.Table.Family == nftables.TableFamilyIPv4 || c.Table.Family == nftables.TableFamilyINet
		if ip && c.Hooknum != nil && *c.Hooknum == *nftables.ChainHookInput && c.Policy != nil && *c.Policy == nftables.ChainPolicyDrop {
			return true, nil
		}
	}
	return false, nil
}

func foreignForward(c *nftables.Chain) bool {
	return c.Table.Name == "filter" && c.Name == "FORWARD"
}

func mark(prefix string) []byte {
	return userdata.AppendString(nil, userdata.TypeComment, "atoll "+prefix)
}

func marked(conn *nftables.Conn, c *nftables.Chain, prefix string) ([]*nftables.Rule, error) {
	rules, err := conn.GetRules(c.Table, c)
	if errors.Is(err, unix.ENOENT) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("listing chain %s: %w", c.Name, err)
	}
	var out []*nftables.Rule
	for _, r := range rules {
		if bytes.Equal(r.UserData, mark(prefix)) {
			out = append(out, r)
		}
	}
	return out, nil
}
