package main

import (
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"go.yaml.in/yaml/v3"
	"golang.org/x/sys/unix"
)

// maxSeedFile bounds what is read of one file of a seed.
const maxSeedFile = 16 << 20

// seed is what a NoCloud disk holds.
type seed struct {
	device   string
	meta     metaData
	network  []byte
	userData []byte
}

type metaData struct {
	InstanceID    string `yaml:"instance-id"`
	LocalHostname string `yaml:"local-hostname"`
	Hostname      string `yaml:"hostname"`
}

// findSeed reads the seed, or returns nil when there is none.
func (s *system) findSeed() *seed {
	for _, kind := range []string{"iso9660", "vfat"} {
		device, ok := findBlock(kind, "cidata")
		if !ok {
			continue
		}
		found, err := readSeed(device, kind)
		if err != nil {
			s.failCloud(fmt.Errorf("reading the seed on %s: %w", device, err))
			return nil
		}
		return found
	}
	return nil
}

func readSeed(device, kind string) (*seed, error) {
	const dir = "/run/seed"
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	if err := unix.Mount(device, dir, kind, unix.MS_RDONLY, ""); err != nil {
		return nil, fmt.Errorf("mounting: %w", err)
	}
	defer func() { _ = unix.Unmount(dir, unix.MNT_DETACH) }()
	out := &seed{device: device}
	meta, err := readSeedFile(filepath.Join(dir, "meta-data"))
	if err != nil {
		return nil, err
	}
	if err := yaml.Unmarshal(meta, &out.meta); err != nil {
		return nil, fmt.Errorf("meta-data: %w", err)
	}
	if out.network, err = readSeedFile(filepath.Join(dir, "network-config")); err != nil {
		return nil, err
	}
	if out.userData, err = readSeedFile(filepath.Join(dir, "user-data")); err != nil {
		return nil, err
	}
	return out, nil
}

// readSeedFile reads a file, which need not be there and may be compressed.
func readSeedFile(name string) ([]byte, error) {
	data, err := os.ReadFile(name)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil || !bytes.HasPrefix(data, []byte{0x1f, 0x8b}) {
		return data, err
	}
	reader, err := gzip.NewReader(bytes.NewReader(data))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Base(name), err)
	}
	plain, err := io.ReadAll(io.LimitReader(reader, maxSeedFile))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Base(name), err)
	}
	return plain, nil
}

// applyIdentity sets the host name.
func (s *system) applyIdentity(seed *seed) {
	if seed == nil {
		return
	}
	name := seed.meta.LocalHostname
	if name == "" {
		name = seed.meta.Hostname
	}
	if config, err := parseUserData(fillIn(seed.userData, seed.meta)); err == nil {
		if config.FQDN != "" {
			name = config.FQDN
		}
		if config.Hostname != "" {
			name = config.Hostname
		}
	}
	s.setHostname(name)
}

func (s *system) describe(seed *seed) string {
	if seed == nil {
		return "no seed"
	}
	return "instance " + seed.meta.InstanceID
}

// firstBoot tells whether this instance has not been seen on this disk, and
// notes it.
func (s *system) firstBoot(seed *seed) bool {
	const file = "/data/instance-id"
	known, err := os.ReadFile(file)
	if err == nil && string(known) == seed.meta.InstanceID+"\n" {
		return false
	}
	if err := writeFileSync(file, []byte(seed.meta.InstanceID+"\n")); err != nil {
		s.say("noting the instance: %v", err)
	}
	return true
}

// applyUserData does the work of cloud-init's later stages, and says how it went.
func (s *system) applyUserData(seed *seed) {
	if seed == nil {
		s.finishCloud("DataSourceNone")
		return
	}
	config, err := parseUserData(fillIn(seed.userData, seed.meta))
	if err != nil {
		s.failCloud(err)
	}
	source := "DataSourceNoCloud [seed=" + seed.device + "]"
	for i, command := range config.BootCmd {
		if err := command.run(); err != nil {
			s.failCloud(fmt.Errorf("user-data: bootcmd[%d]: %w", i, err))
		}
	}
	if s.firstBoot(seed) {
		for i, file := range config.WriteFiles {
			if err := file.write(); err != nil {
				s.failCloud(fmt.Errorf("user-data: write_files[%d]: %w", i, err))
			}
		}
		for i, command := range config.RunCmd {
			if err := command.run(); err != nil {
				s.failCloud(fmt.Errorf("user-data: runcmd[%d]: %w", i, err))
			}
		}
	}
	s.finishCloud(source)
	s.say("cloud-init is done after %s", uptime().Round(10*time.Millisecond))
}
