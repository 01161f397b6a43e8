package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
)

// netplan is the part of network configuration version 2 that is understood.
// The file may have it at the top or below "network".
type netplan struct {
	Version   int                 `yaml:"version"`
	Ethernets map[string]ethernet `yaml:"ethernets"`
	Network   *netplan            `yaml:"network"`
}

type ethernet struct {
	Match struct {
		MAC  string `yaml:"macaddress"`
		Name string `yaml:"name"`
	} `yaml:"match"`
	SetName     string   `yaml:"set-name"`
	DHCP4       yesNo    `yaml:"dhcp4"`
	Addresses   []string `yaml:"addresses"`
	Gateway4    string   `yaml:"gateway4"`
	Gateway6    string   `yaml:"gateway6"`
	MTU         int      `yaml:"mtu"`
	Nameservers struct {
		Addresses []string `yaml:"addresses"`
		Search    []string `yaml:"search"`
	} `yaml:"nameservers"`
	Routes []struct {
		To     string `yaml:"to"`
		Via    string `yaml:"via"`
		OnLink bool   `yaml:"on-link"`
		Scope  string `yaml:"scope"`
		Metric int    `yaml:"metric"`
	} `yaml:"routes"`
}

// yesNo is a truth value in the old and the new words of YAML.
type yesNo bool

func (y *yesNo) UnmarshalYAML(node *yaml.Node) error {
	switch strings.ToLower(node.Value) {
	case "true", "yes", "on":
		*y = true
	case "false", "no", "off":
		*y = false
	default:
		return fmt.Errorf("line %d: %q is neither true nor false", node.Line, node.Value)
	}
	return nil
}

func parseNetplan(data []byte) (netplan, error) {
	var plan netplan
	if err := yaml.Unmarshal(data, &plan); err != nil {
		return netplan{}, fmt.Errorf("network-config: %w", err)
	}
	if plan.Network != nil {
		plan = *plan.Network
	}
	if plan.Version != 2 {
		return netplan{}, fmt.Errorf("network-config: version %d is not 2", plan.Version)
	}
	return plan, nil
}

// applyNetwork configures the interfaces as the seed says; those it does not
// name ask DHCP, in the background.
func (s *system) applyNetwork(seed *seed) {
	if seed != nil && len(seed.network) > 0 {
		plan, err := parseNetplan(seed.network)
		if err != nil {
			s.failCloud(err)
		}
		for key, config := range plan.Ethernets {
			name, err := interfaceFor(key, config)
			if err != nil {
				s.failCloud(fmt.Errorf("network-config: ethernets.%s: %w", key, err))
				continue
			}
			s.mu.Lock()
			s.static[name] = true
			s.mu.Unlock()
			if err := s.configure(name, config); err != nil {
				s.failCloud(fmt.Errorf("network-config: ethernets.%s: %w", key, err))
			}
		}
	}
	interfaces, err := net.Interfaces()
	if err != nil {
		s.say("listing interfaces: %v", err)
	}
	for _, i := range interfaces {
		go s.plugged(i.Name)
	}
}

// interfaceFor finds the interface by its address or name, and renames it.
func interfaceFor(key string, config ethernet) (string, error) {
	interfaces, err := net.Interfaces()
	if err != nil {
		return "", err
	}
	for _, i := range interfaces {
		byMAC := config.Match.MAC != "" && strings.EqualFold(i.HardwareAddr.String(), config.Match.MAC)
		byName := config.Match.MAC == "" && (i.Name == config.Match.Name || config.Match.Name == "" && i.Name == key)
		if !byMAC && !byName {
			continue
		}
		if config.SetName == "" || config.SetName == i.Name {
			return i.Name, nil
		}
		// A name that another interface has is freed first.
		_ = ip("link", "set", config.SetName, "down")
		_ = ip("link", "set", config.SetName, "name", "old"+strconv.Itoa(i.Index))
		_ = ip("link", "set", i.Name, "down")
		return config.SetName, ip("link", "set", i.Name, "name", config.SetName)
	}
	return "", fmt.Errorf("no interface has address %q or name %q", config.Match.MAC, config.Match.Name)
}

func (s *system) configure(name string, config ethernet) error {
	if config.MTU > 0 {
		if err := ip("link", "set", name, "mtu", strconv.Itoa(config.MTU)); err != nil {
			return err
		}
	}
	s.up(name)
	for _, address := range config.Addresses {
		if err := ip("addr", "replace", address, "dev", name); err != nil {
			return err
		}
	}
	for _, gateway := range []string{config.Gateway4, config.Gateway6} {
		if gateway == "" {
			continue
		}
		if err := ip("route", "replace", "default", "via", gateway, "dev", name, "onlink"); err != nil {
			return err
		}
	}
	for _, route := range config.Routes {
		args := []string{"route", "replace", route.To}
		if route.To == "0.0.0.0/0" || route.To == "::/0" {
			args[2] = "default"
		}
		if route.Via != "" {
			args = append(args, "via", route.Via)
		}
		args = append(args, "dev", name)
		if route.OnLink {
			args = append(args, "onlink")
		}
		if route.Scope == "link" {
			args = append(args, "scope", "link")
		}
		if route.Metric > 0 {
			args = append(args, "metric", strconv.Itoa(route.Metric))
		}
		if err := ip(args...); err != nil {
			return err
		}
	}
	if len(config.Nameservers.Addresses) > 0 {
		if err := os.WriteFile("/etc/resolv.conf", resolvConf(config), 0o644); err != nil {
			return err
		}
	}
	if config.DHCP4 {
		s.dhcp(name)
	}
	return nil
}

func resolvConf(config ethernet) []byte {
	var text strings.Builder
	for _, address := range config.Nameservers.Addresses {
		fmt.Fprintf(&text, "nameserver %s\n", address)
	}
	if len(config.Nameservers.Search) > 0 {
		fmt.Fprintf(&text, "search %s\noptions ndots:5\n", strings.Join(config.Nameservers.Search, " "))
	}
	return []byte(text.String())
}

// plugged asks DHCP for an interface that no seed has configured.
func (s *system) plugged(name string) {
	s.mu.Lock()
	known := s.static[name] || name == "lo" || strings.HasPrefix(name, "old")
	s.static[name] = true
	s.mu.Unlock()
	if known {
		return
	}
	s.up(name)
	s.dhcp(name)
}

func (s *system) up(name string) {
	if err := ip("link", "set", name, "up"); err != nil {
		s.say("%v", err)
	}
}

// dhcp starts a client that stays and renews.
func (s *system) dhcp(name string) {
	cmd := exec.Command("udhcpc", "-f", "-S", "-i", name, "-s", "/etc/udhcpc.sh", "-t", "5", "-T", "1", "-A", "2", "-x", "hostname:"+hostname())
	if err := cmd.Start(); err != nil {
		s.say("asking DHCP for %s: %v", name, err)
		return
	}
	go func() { _ = cmd.Wait() }()
}

func (s *system) setHostname(name string) {
	if name == "" {
		return
	}
	if err := os.WriteFile("/proc/sys/kernel/hostname", []byte(name), 0); err != nil {
		s.say("setting the host name: %v", err)
		return
	}
	_ = os.WriteFile("/etc/hostname", []byte(name+"\n"), 0o644)
	short, _, _ := strings.Cut(name, ".")
	names := name
	if short != name {
		names += " " + short
	}
	_ = os.WriteFile("/etc/hosts", []byte("127.0.0.1 localhost\n127.0.1.1 "+names+"\n"), 0o644)
}

func hostname() string {
	name, err := os.Hostname()
	if err != nil {
		return "tiny"
	}
	return name
}

// addresses lists what the interfaces have, with prefix lengths.
func addresses() []string {
	var out []string
	interfaces, _ := net.Interfaces()
	for _, i := range interfaces {
		list, _ := i.Addrs()
		for _, address := range list {
			if i.Flags&net.FlagLoopback == 0 {
				out = append(out, i.Name+" "+address.String())
			}
		}
	}
	return out
}

// ip runs the command of that name. A busy host may let the machine stand still for a minute.
func ip(args ...string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, "ip", args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("ip %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}
