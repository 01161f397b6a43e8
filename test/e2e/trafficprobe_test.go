//go:build e2e

package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// answer is what came of one request for a page.
type answer struct {
	url  string
	code int // of wget; 0 is an answer
	text string
}

// ask asks for pages from inside a pod or machine, each of them twice, and all at once. Only an exec that got to its end
// says anything.
func (n *namespace) ask(from string, urls ...string) ([]answer, error) {
	const script = `exec 2>/dev/null; for u in "$@"; do for i in 1 2; do (out=$(timeout 4 wget -qO- "$u" 2>&1); echo "asked $? $u $out") & done; done; wait; echo all`
	out, err := n.try(append([]string{"exec", from, "--", "sh", "-c", script, "sh"}, urls...)...)
	if err != nil {
		return nil, err
	}
	var list []answer
	for line := range strings.Lines(out) {
		if f := strings.SplitN(strings.TrimSpace(line), " ", 4); len(f) >= 3 && f[0] == "asked" {
			a := answer{url: f[2], text: strings.Join(f[3:], "")}
			if a.code, err = strconv.Atoi(f[1]); err != nil {
				return nil, fmt.Errorf("%q: %w", line, err)
			}
			list = append(list, a)
		}
	}
	if len(list) != 2*len(urls) || !strings.HasSuffix(strings.TrimSpace(out), "all") {
		return nil, fmt.Errorf("%d requests came to an end, of %d: %s", len(list), 2*len(urls), out)
	}
	return list, nil
}

// answered asks for one page, which must be there.
func (n *namespace) answered(from, url string) error {
	list, err := n.ask(from, url)
	if err != nil {
		return err
	}
	for _, a := range list {
		if a.code != 0 {
			return fmt.Errorf("%s: wget ended with %d: %s", a.url, a.code, a.text)
		}
	}
	return nil
}

// noAnswer waits until policies let no request through, and looks twice. What is merely slow, or was never sent, is no
// proof: the namespaces given must have counted a packet as denied for each request.
func (n *namespace) noAnswer(what, from string, denying []string, urls ...string) {
	n.t.Helper()
	rounds := 0
	eventually(n.t, what, func() error {
		before := denied(n.t, denying...)
		list, err := n.ask(from, urls...)
		if err != nil {
			return err
		}
		for _, a := range list {
			switch {
			case a.code == 0 && rounds > 0:
				n.t.Fatalf("%s: once more %s answered %q", what, a.url, a.text)
			case a.code == 0:
				return fmt.Errorf("%s answered %q", a.url, a.text)
			case strings.Contains(a.text, "bad address"):
				return fmt.Errorf("%s: another error: %s", a.url, a.text)
			}
		}
		if grown := denied(n.t, denying...) - before; grown < len(list) {
			return fmt.Errorf("no answers, but of %d requests only %d packets were denied: %v", len(list), grown, list)
		}
		if rounds++; rounds < 2 {
			return errors.New("once so far")
		}
		return nil
	})
}

// denied is how many packets the policies of namespaces have denied, by the counters of this host.
func denied(t *testing.T, namespaces ...string) int {
	t.Helper()
	sum := 0
	different := map[string]bool{}
	for _, name := range namespaces {
		different[name] = true
	}
	for name := range maps.Keys(different) {
		var list []struct {
			What  string
			Count int
		}
		out := atollOK(t, "network", "counters", "-n", name, "-o", "json")
		if err := json.Unmarshal([]byte(out), &list); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		for _, c := range list {
			if c.What == "denied" {
				sum += c.Count
			}
		}
	}
	return sum
}

// summed is one of the sums of all namespaces, the number before some words.
func summed(t *testing.T, words string) int {
	t.Helper()
	out := atollOK(t, "network", "counters")
	before, _, found := strings.Cut(out, words)
	f := strings.Fields(before)
	if !found || len(f) == 0 {
		t.Fatalf("no %q in: %s", words, out)
	}
	count, err := strconv.Atoi(f[len(f)-1])
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return count
}

// linkLocal is how many packets pods have sent to link-local addresses.
func linkLocal(t *testing.T) int {
	t.Helper()
	return summed(t, " to link-local addresses")
}

// spoofed is how many packets pods have sent from addresses that are not theirs: those of the pod network, and others.
func spoofed(t *testing.T) int {
	t.Helper()
	count := summed(t, " packets with an address that is not the pod's")
	guard := output(t, "nft", "list", "chain", "ip", "atoll", "guard")
	for _, after := range strings.Split(guard, "counter packets ")[1:] {
		packets := 0
		if _, err := fmt.Sscanf(after, "%d", &packets); err != nil {
			t.Fatalf("%v: %s", err, guard)
		}
		count += packets
	}
	return count
}

// pages are the addresses of a map as URLs.
func pages(ways map[string]string) []string {
	var urls []string
	for _, address := range slices.Sorted(maps.Values(ways)) {
		urls = append(urls, "http://"+address+"/")
	}
	return urls
}
