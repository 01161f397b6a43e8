//go:build integration

package policy_test

import (
	"encoding/binary"
	"hash/crc32"
	"testing"

	"golang.org/x/sys/unix"
	"sigs.k8s.io/knftables"

	policyv1 "atoll.dev/atoll/api/policy/v1"
	"atoll.dev/atoll/internal/linux/netns"
	"atoll.dev/atoll/internal/network/networktest"
	"atoll.dev/atoll/internal/network/policy"
)

// cutHost has a db that nobody may send to from the call of forbid until that of permit. It may send to others.
func cutHost(t *testing.T) (h *host, forbid, permit func()) {
	t.Helper()
	h = newHost(t, "db", "client")
	h.know("client")
	h.policy("test/p", owner, anything(), nil)
	h.know("db", "test/p")
	h.apply(t)
	set := func(rules []policyv1.Rule) func() {
		return func() {
			t.Helper()
			h.policy("test/p", owner, rules, nil)
			h.apply(t)
		}
	}
	return h, set(nothing()), set(anything())
}

// restart makes the table anew, as another process of the agent does.
func (h *host) restart(t testing.TB) {
	t.Helper()
	h.engine = newEngine(t, h.Lab)
	h.apply(t)
}

// wire sends packets of one protocol from a pod, and sees them at another.
type wire struct {
	from, to *labPod
	protocol byte
}

func (w wire) sender(payload []byte) func() error {
	return func() error {
		return netns.Do(w.from.netns, func() error {
			return raw(packet(w.protocol, w.from.address, w.to.address, payload), w.to.address)
		})
	}
}

// datagram of UDP without a checksum.
func datagram(from, to uint16) []byte {
	b := binary.BigEndian.AppendUint16(nil, from)
	b = binary.BigEndian.AppendUint16(b, to)
	return append(b, 0, 9, 0, 0, 'x')
}

// chunk is a packet of SCTP: INIT (1) or its answer (2) with the tag of the one that it answers.
func chunk(from, to uint16, kind byte, tag uint32) []byte {
	b := binary.BigEndian.AppendUint16(nil, from)
	b = binary.BigEndian.AppendUint16(b, to)
	b = binary.BigEndian.AppendUint32(b, tag)
	b = append(b, 0, 0, 0, 0, kind, 0, 0, 20, 0, 0, 0, 7, 0, 0, 0x10, 0, 0, 1, 0, 1, 0, 0, 0, 1)
	binary.LittleEndian.PutUint32(b[8:], crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)))
	return b
}

// TestCutIsNotUndoneByThePeer forbids what a client sends. The db's packets of the same conversation are allowed, and
// begin an entry of their own in the kernel's table, to which the client's would be answers.
func TestCutIsNotUndoneByThePeer(t *testing.T) {
	const other = 253 // for experiments
	for _, tc := range []struct {
		name      string
		protocol  byte
		ask, back []byte // of the client, of the db
		answer    []byte // of the client to what the db sends
	}{
		{"UDP", unix.IPPROTO_UDP, datagram(1000, 2000), datagram(2000, 1000), datagram(1000, 2000)},
		{"SCTP", unix.IPPROTO_SCTP, chunk(1000, 2000, 1, 0), chunk(2000, 1000, 1, 0), chunk(1000, 2000, 2, 7)},
		{"another protocol", other, []byte("x"), []byte("y"), []byte("z")},
	} {
		t.Run(tc.name, func(t *testing.T) {
			h, forbid, permit := cutHost(t)
			db, client := h.pods["db"], h.pods["client"]
			there, back := wire{client, db, tc.protocol}, wire{db, client, tc.protocol}
			if !arrives(t, db, int(tc.protocol), client.address, patience, there.sender(tc.ask)) {
				t.Fatal("the conversation does not begin")
			}
			forbid()
			closed := func(when string) {
				t.Helper()
				if !arrives(t, client, int(tc.protocol), db.address, patience, back.sender(tc.back)) {
					t.Fatalf("what the db sends does not arrive %s", when)
				}
				if arrives(t, db, int(tc.protocol), client.address, soon, there.sender(tc.answer)) {
					t.Errorf("the client goes on %s", when)
				}
			}
			closed("after the cut")
			h.restart(t)
			closed("after a restart")
			permit()
			if !arrives(t, db, int(tc.protocol), client.address, patience, there.sender(tc.answer)) {
				t.Error("the client cannot go on when it is allowed again")
			}
		})
	}
}

// TestCutIsNotUndoneByTheHost forbids what a pod sends to the host, which always may answer.
func TestCutIsNotUndoneByTheHost(t *testing.T) {
	h, _, _ := cutHost(t)
	client := h.pods["client"]
	at := &labPod{netns: h.Host, address: h.Network.Gateway}
	c := talk(t, client.netns, at, 1000)
	if err := goesOn(c.client, c.server, patience); err != nil {
		t.Fatal(err)
	}
	h.policy("test/q", owner, nil, nothing())
	h.know("client", "test/q")
	h.apply(t)
	for _, when := range []string{"after the cut", "after a restart"} {
		if err := goesOn(c.server, c.client, 2*soon); err == nil {
			t.Errorf("the connection goes on %s", when)
		}
		h.restart(t)
	}
}

// TestManyCutsAreHeldByFew forbids what a client sends from many ports and then to many.
func TestManyCutsAreHeldByFew(t *testing.T) {
	h, forbid, permit := cutHost(t)
	db, client := h.pods["db"], h.pods["client"]
	there, back := wire{client, db, unix.IPPROTO_UDP}, wire{db, client, unix.IPPROTO_UDP}
	many := func(ports func(i uint16) (from, to uint16)) {
		t.Helper()
		networktest.Do(t, client.netns, func() error {
			for i := range uint16(3000) {
				if err := raw(packet(unix.IPPROTO_UDP, client.address, db.address, datagram(ports(i))), db.address); err != nil {
					return err
				}
			}
			return nil
		})
		forbid()
	}
	held := func(want map[string]int) {
		t.Helper()
		networktest.Do(t, h.Host, func() error {
			nft, err := knftables.New(knftables.InetFamily, policy.CutTableName(h.Network))
			if err != nil {
				return err
			}
			for set, n := range want {
				if list, err := nft.ListElements(t.Context(), "set", set); err != nil || len(list) != n {
					t.Errorf("%d elements of %s, want %d: %v", len(list), set, n, err)
				}
			}
			return nil
		})
	}
	silent := func() {
		t.Helper()
		if !arrives(t, client, unix.IPPROTO_UDP, db.address, patience, back.sender(datagram(2000, 4000))) {
			t.Fatal("what the db sends does not arrive")
		}
		if arrives(t, db, unix.IPPROTO_UDP, client.address, soon, there.sender(datagram(4000, 2000))) {
			t.Error("the client goes on")
		}
	}
	many(func(i uint16) (uint16, uint16) { return 3000 + i, 2000 })
	held(map[string]int{"flows": 0, "ports": 1, "peers": 0})
	silent()
	can(t, "the db to the client", db.netns, "udp4", client.at(80))
	permit()
	held(map[string]int{"ports": 0})
	many(func(i uint16) (uint16, uint16) { return 4000, 2000 + i })
	held(map[string]int{"flows": 0, "ports": 0, "peers": 1})
	silent()
	can(t, "the db to the client", db.netns, "tcp4", client.at(80))
	permit()
	held(map[string]int{"peers": 0})
	can(t, "the db to the client", db.netns, "udp4", client.at(80))
	if !arrives(t, db, unix.IPPROTO_UDP, client.address, patience, there.sender(datagram(4000, 2000))) {
		t.Error("the client cannot go on when it is allowed again")
	}
}

// TestCutOutlivesRestart has the db send again and again what is not acknowledged, in the middle of a connection.
func TestCutOutlivesRestart(t *testing.T) {
	h, forbid, _ := cutHost(t)
	db, client := h.pods["db"], h.pods["client"]
	c := talk(t, client.netns, db, 1000)
	if err := goesOn(c.client, c.server, patience); err != nil {
		t.Fatal(err)
	}
	forbid()
	for range 3 {
		h.restart(t)
		if err := goesOn(c.server, c.client, 2*soon); err == nil {
			t.Error("the connection goes on after a restart")
		}
	}
	networktest.Do(t, h.Host, func() error { return networktest.Run("nft", "delete table inet atoll-cut") })
	networktest.Do(t, h.Host, func() error {
		if !h.engine.Damaged() {
			t.Error("the table of connections that were cut is gone and nobody has noticed")
		}
		return nil
	})
	// A new connection between the same pods is not the one that was cut.
	can(t, "the db to the client", db.netns, "tcp4", client.at(80))
}
