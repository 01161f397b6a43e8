package rbd

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"

	"atoll.dev/atoll/internal/datadir/handover"
	"atoll.dev/atoll/internal/storage/datastore"
	"atoll.dev/atoll/internal/storage/datastore/chain"
)

const (
	// defaultConf is where Ceph has its configuration.
	defaultConf = "/etc/ceph/ceph.conf"
	// looks is how often images are looked at until whoever has them open is cut off: tools are done in between.
	looks     = 4
	lookEvery = 300 * time.Millisecond
	// gone is how long the cluster may take to notice who is cut off.
	gone = 15 * time.Second
	// cutOffFor is how long, in seconds, the cluster takes nothing from who is cut off: ten years. Its default is an
	// hour, which a host that was given up may well be gone for.
	cutOffFor = "315360000"
	// maxConf bounds a ceph.conf and a keyring.
	maxConf = 1 << 20
)

// Admit implements chain.Gate. The look at the image also tells that the cluster answers: QEMU stands still
// while it opens an image.
func (p *place) Admit(top handover.Layer, exclusive bool) (*handover.Ceph, error) {
	if top.RBD == nil {
		return nil, fmt.Errorf("%w: layer %s is not in Ceph", datastore.ErrCorrupt, top.ID)
	}
	if exclusive {
		if err := p.fence(top.RBD.Image); err != nil {
			return nil, err
		}
	}
	conf, err := readSmall(p.confPath())
	if err != nil {
		return nil, fmt.Errorf("%w: the configuration of Ceph: %w", datastore.ErrUnavailable, err)
	}
	key, err := p.cephxKey()
	if err != nil {
		return nil, err
	}
	return &handover.Ceph{Conf: portable(conf), Key: key}, nil
}

func (p *place) confPath() string {
	if p.Conf == "" {
		return defaultConf
	}
	return p.Conf
}

// readSmall reads a file that people write.
func readSmall(name string) ([]byte, error) {
	st, err := os.Stat(name)
	if err != nil {
		return nil, err
	}
	if st.Size() > maxConf {
		return nil, fmt.Errorf("%s is larger than %d bytes", name, maxConf)
	}
	return os.ReadFile(name)
}

// settings are those that hold for a process that opens volumes, whatever the host's ceph.conf says. The time
// limits are for connecting. A request that is under way is never given up: a guest waits for its disk.
func settings() [][2]string {
	return [][2]string{
		{"client_mount_timeout", "15"},
		{"rados_mon_op_timeout", "15"},
		{"keyring", ""},
		{"key", ""},
		{"keyfile", ""},
		{"log_file", ""},
		{"log_to_stderr", "false"},
		{"err_to_stderr", "false"},
		{"log_to_syslog", "false"},
		{"err_to_syslog", "false"},
		{"admin_socket", ""},
		{"pid_file", ""},
	}
}

// portable is a ceph.conf for a process that can open no file: without the names of keyrings and logs, and
// without keys.
func portable(conf []byte) []byte {
	var out bytes.Buffer
	ours := map[string]bool{}
	out.WriteString("[global]\n")
	for _, s := range settings() {
		ours[s[0]] = true
		if s[0] != "key" && s[0] != "keyfile" { // which may not be empty
			fmt.Fprintf(&out, "%s = %s\n", s[0], s[1])
		}
	}
	for line := range strings.SplitSeq(string(conf), "\n") {
		if name, _, ok := setting(line); !ok || !ours[name] {
			out.WriteString(line + "\n")
		}
	}
	return out.Bytes()
}

// setting reads a line of a ceph.conf or keyring. Ceph takes blanks, dashes and underscores in names for the same.
func setting(line string) (name, value string, ok bool) {
	name, value, ok = strings.Cut(line, "=")
	name = strings.Join(strings.FieldsFunc(strings.ToLower(name), func(r rune) bool { return strings.ContainsRune(" \t\r_-", r) }), "_")
	if !ok || strings.HasPrefix(name, "#") || strings.HasPrefix(name, ";") || strings.HasPrefix(name, "[") {
		return "", "", false
	}
	return name, strings.TrimSpace(value), true
}

// user is the name of the Ceph user in full.
func (p *place) user() string {
	if p.User == "" {
		return "client.admin"
	}
	return "client." + p.User
}

// cephxKey finds the user's key, "" where the cluster may want none.
func (p *place) cephxKey() (string, error) {
	out, err := p.run(nil, "ceph-conf", "--show-config")
	if err != nil {
		return "", err
	}
	values := map[string]string{}
	for line := range strings.Lines(string(out)) {
		if name, value, ok := setting(line); ok {
			values[name] = value
		}
	}
	if key := values["key"]; key != "" {
		return key, nil
	}
	if file := values["keyfile"]; file != "" {
		b, err := readSmall(file)
		if err != nil {
			return "", fmt.Errorf("%w: the key of %s: %w", datastore.ErrUnavailable, p.user(), err)
		}
		return strings.TrimSpace(string(b)), nil
	}
	for _, file := range strings.FieldsFunc(values["keyring"], func(r rune) bool { return strings.ContainsRune(", ;", r) }) {
		b, err := readSmall(file)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return "", fmt.Errorf("%w: the keyring of %s: %w", datastore.ErrUnavailable, p.user(), err)
		}
		if key := keyOf(b, p.user()); key != "" {
			return key, nil
		}
	}
	if strings.Contains(values["auth_client_required"], "none") {
		return "", nil
	}
	return "", fmt.Errorf("%w: there is no key of %s in %s", datastore.ErrUnavailable, p.user(), values["keyring"])
}

// keyOf finds the key of a user in a keyring.
func keyOf(keyring []byte, user string) string {
	section := ""
	lines := bufio.NewScanner(bytes.NewReader(keyring))
	for lines.Scan() {
		line := strings.TrimSpace(lines.Text())
		if strings.HasPrefix(line, "[") {
			section = strings.Trim(line, "[] \t")
		} else if name, value, ok := setting(line); ok && name == "key" && section == user {
			return value
		}
	}
	return ""
}

// watchers are the addresses of those who have an image open.
func (p *place) watchers(name string) ([]string, error) {
	out, err := p.run(nil, "rbd", "status", "--format", "json", p.spec(name))
	if err != nil {
		return nil, err
	}
	var status struct {
		Watchers []peer `json:"watchers"`
	}
	if err := json.Unmarshal(out, &status); err != nil {
		return nil, chain.Unavailable(err)
	}
	return addresses(status.Watchers), nil
}

// owners are the addresses of those who have locked an image, as librbd does before it writes. Who is cut off from
// the cluster stays an owner after it is no watcher any more.
func (p *place) owners(name string) ([]peer, error) {
	out, err := p.run(nil, "rbd", "lock", "ls", "--format", "json", p.spec(name))
	if err != nil {
		return nil, err
	}
	return ownersIn(out)
}

// ownersIn reads the answer, which is empty or a list.
func ownersIn(out []byte) ([]peer, error) {
	if len(bytes.TrimSpace(out)) == 0 {
		return nil, nil
	}
	var owners []peer
	if err := json.Unmarshal(out, &owners); err != nil {
		return nil, chain.Unavailable(err)
	}
	return owners, nil
}

// peer is a client of the cluster that watches an image, or owns its lock, which has an ID then.
type peer struct {
	Address string `json:"address"`
	ID      string `json:"id"`
	Locker  string `json:"locker"`
}

func addresses(peers []peer) []string {
	var all []string
	for _, p := range peers {
		all = append(all, p.Address)
	}
	return all
}

// fence makes sure that nobody has an image open for writing. By the records nobody has, so that whoever does has
// crashed, and Ceph has not noticed yet, or runs on a host that was given up. The cluster takes nothing from it any
// more.
func (p *place) fence(name string) error {
	cut := map[string]bool{}
	for begun, i := time.Now(), 1; ; i++ {
		watchers, err := p.watchers(name)
		if err != nil {
			return err
		}
		if len(watchers) == 0 || i >= looks {
			// Who owns it may come back, also if it is no watcher.
			owners, err := p.owners(name)
			if err != nil {
				return err
			}
			if err := p.cutOff(name, append(addresses(owners), watchers...), cut); err != nil {
				return err
			}
			if err := p.unlock(name, owners); err != nil {
				return err
			}
		}
		if len(watchers) == 0 {
			return nil
		}
		if time.Since(begun) > gone {
			return fmt.Errorf("%w: image %s is open at %s, which the cluster does not cut off", datastore.ErrBusy, name, strings.Join(watchers, ", "))
		}
		<-time.After(lookEvery)
	}
}

// cutOff has the cluster take nothing from some clients any more, unless that was done.
func (p *place) cutOff(name string, clients []string, done map[string]bool) error {
	for _, client := range clients {
		if done[client] {
			continue
		}
		if _, err := p.run(nil, "ceph", "osd", "blocklist", "add", client, cutOffFor); err != nil {
			return fmt.Errorf("cutting off %s, which has image %s open (this takes the capability mon 'profile rbd'): %w", client, name, err)
		}
		done[client] = true
	}
	return nil
}

// unlock takes the lock from owners that were cut off. The next who writes would do it as well, but also cut them off
// once more, for Ceph's own hour from then on.
func (p *place) unlock(name string, owners []peer) error {
	for _, o := range owners {
		if _, err := p.run(nil, "rbd", "--rbd_blocklist_on_break_lock=false", "lock", "rm", p.spec(name), o.ID, o.Locker); err != nil {
			left, again := p.owners(name)
			if again == nil && !slices.Contains(left, o) {
				continue // it was just given up
			}
			return fmt.Errorf("taking the lock of image %s from %s, which was cut off: %w", name, o.Address, err)
		}
	}
	return nil
}
