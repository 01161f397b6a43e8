package csi

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"

	"atoll.dev/atoll/internal/storage/datastore"
)

// Parameters of a storage policy (a StorageClass). docs/storage-policies.md describes them.
const (
	ParamDatastore    = "datastore"
	ParamSelector     = "datastoreSelector"
	ParamProvisioning = "provisioning"
	ParamFSType       = "fsType"
	ParamEncryption   = "encryption"
	// Limits; those below may change later (VolumeAttributesClass).
	ParamIOPS           = "iops"
	ParamReadIOPS       = "readIops"
	ParamWriteIOPS      = "writeIops"
	ParamBandwidth      = "bandwidth"
	ParamReadBandwidth  = "readBandwidth"
	ParamWriteBandwidth = "writeBandwidth"
)

// metadataPrefix is what external-provisioner adds about the claim; it is kept as labels of the volume.
const metadataPrefix = "csi.storage.k8s.io/"

// File systems a volume may have.
const (
	fsExt4 = "ext4"
	fsXFS  = "xfs"
)

// Limits are what a volume may do per second; zero is no limit. A total excludes the limits of reading and
// writing.
type Limits struct {
	IOPS, ReadIOPS, WriteIOPS                int64
	Bandwidth, ReadBandwidth, WriteBandwidth int64 // bytes
}

// Policy is what the parameters of a request say.
type Policy struct {
	Datastore    string
	Selector     map[string]string
	Provisioning datastore.Provisioning
	FSType       string
	Encryption   string
	Limits       Limits
	// Labels are about the claim.
	Labels map[string]string
}

// limitParams lists the parameters that are limits.
func limitParams() []string {
	return []string{ParamIOPS, ParamReadIOPS, ParamWriteIOPS, ParamBandwidth, ParamReadBandwidth, ParamWriteBandwidth}
}

// knownParams lists the parameters of a StorageClass.
func knownParams() []string {
	return append([]string{ParamDatastore, ParamSelector, ParamProvisioning, ParamFSType, ParamEncryption}, limitParams()...)
}

// ParsePolicy reads the parameters of a StorageClass. Errors name the parameter, and what would be right.
func ParsePolicy(params map[string]string) (Policy, error) {
	p := Policy{Provisioning: datastore.Thin, Labels: map[string]string{}}
	limits := map[string]string{}
	for _, name := range slices.Sorted(maps.Keys(params)) {
		value := params[name]
		var err error
		switch {
		case strings.HasPrefix(name, metadataPrefix):
			p.Labels[strings.TrimPrefix(name, metadataPrefix)] = value
		case name == ParamDatastore:
			p.Datastore, err = value, notEmpty(value)
		case name == ParamSelector:
			p.Selector, err = parseSelector(value)
		case name == ParamProvisioning:
			p.Provisioning, err = parseProvisioning(value)
		case strings.EqualFold(name, ParamFSType):
			p.FSType, err = value, checkFSType(value)
		case name == ParamEncryption:
			p.Encryption, err = value, notEmpty(value)
		case slices.Contains(limitParams(), name):
			limits[name] = value
		default:
			err = fmt.Errorf("there is no such parameter; remove it or use one of %s", strings.Join(knownParams(), ", "))
		}
		if err != nil {
			return Policy{}, fmt.Errorf("parameter %q: %w", name, err)
		}
	}
	if p.Datastore != "" && p.Selector != nil {
		return Policy{}, fmt.Errorf("parameters %q and %q exclude each other: name a datastore or select one by its labels", ParamDatastore, ParamSelector)
	}
	var err error
	p.Limits, err = ParseLimits(limits)
	return p, err
}

// ParseLimits reads the parameters of a VolumeAttributesClass.
func ParseLimits(params map[string]string) (Limits, error) {
	var l Limits
	for _, name := range slices.Sorted(maps.Keys(params)) {
		var err error
		switch value := params[name]; name {
		case ParamIOPS:
			l.IOPS, err = parseCount(value)
		case ParamReadIOPS:
			l.ReadIOPS, err = parseCount(value)
		case ParamWriteIOPS:
			l.WriteIOPS, err = parseCount(value)
		case ParamBandwidth:
			l.Bandwidth, err = parseBytes(value)
		case ParamReadBandwidth:
			l.ReadBandwidth, err = parseBytes(value)
		case ParamWriteBandwidth:
			l.WriteBandwidth, err = parseBytes(value)
		default:
			err = fmt.Errorf("there is no such parameter, or it cannot change once a volume exists; use %s", strings.Join(limitParams(), ", "))
		}
		if err != nil {
			return Limits{}, fmt.Errorf("parameter %q: %w", name, err)
		}
	}
	switch {
	case l.IOPS != 0 && (l.ReadIOPS != 0 || l.WriteIOPS != 0):
		return Limits{}, fmt.Errorf("parameter %q excludes %q and %q: it is the limit of both together", ParamIOPS, ParamReadIOPS, ParamWriteIOPS)
	case l.Bandwidth != 0 && (l.ReadBandwidth != 0 || l.WriteBandwidth != 0):
		return Limits{}, fmt.Errorf("parameter %q excludes %q and %q: it is the limit of both together", ParamBandwidth, ParamReadBandwidth, ParamWriteBandwidth)
	}
	return l, nil
}

// Params is the reverse of ParseLimits, without the limits that are zero.
func (l Limits) Params() map[string]string {
	out := map[string]string{}
	for name, value := range map[string]int64{
		ParamIOPS: l.IOPS, ParamReadIOPS: l.ReadIOPS, ParamWriteIOPS: l.WriteIOPS,
		ParamBandwidth: l.Bandwidth, ParamReadBandwidth: l.ReadBandwidth, ParamWriteBandwidth: l.WriteBandwidth,
	} {
		if value != 0 {
			out[name] = strconv.FormatInt(value, 10)
		}
	}
	return out
}

var errEmpty = errors.New("the value is empty; give one or remove the parameter")

func notEmpty(value string) error {
	if value == "" {
		return errEmpty
	}
	return nil
}

// parseSelector reads key=value pairs, which must all be labels of the datastore.
func parseSelector(value string) (map[string]string, error) {
	out := map[string]string{}
	for pair := range strings.SplitSeq(value, ",") {
		k, v, ok := strings.Cut(strings.TrimSpace(pair), "=")
		if !ok || k == "" {
			return nil, fmt.Errorf("%q is not a selector; write label=value[,label=value...]", value)
		}
		out[k] = v
	}
	return out, nil
}

func parseProvisioning(value string) (datastore.Provisioning, error) {
	switch p := datastore.Provisioning(value); p {
	case datastore.Thin, datastore.Thick, datastore.EagerZeroed:
		return p, nil
	}
	return "", fmt.Errorf("%q is not known; use %s, %s or %s", value, datastore.Thin, datastore.Thick, datastore.EagerZeroed)
}

func checkFSType(value string) error {
	switch value {
	case "", fsExt4, fsXFS:
		return nil
	}
	return fmt.Errorf("%q is not supported; use %s or %s", value, fsExt4, fsXFS)
}

func parseCount(value string) (int64, error) {
	n, err := strconv.ParseInt(value, 10, 64)
	if err != nil || n <= 0 {
		return 0, fmt.Errorf("%q is not a positive number; write for example 500", value)
	}
	return n, nil
}

// parseBytes reads a number of bytes as Kubernetes writes quantities.
func parseBytes(value string) (int64, error) {
	digits := strings.TrimRight(value, "KMGTikmgt")
	unit, ok := map[string]float64{
		"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12,
		"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40,
	}[value[len(digits):]]
	n, err := strconv.ParseFloat(digits, 64)
	if err != nil || !ok || n <= 0 || n*unit >= math.MaxInt64 || n*unit < 1 {
		return 0, fmt.Errorf("%q is not a number of bytes; write for example 100Mi", value)
	}
	return int64(n * unit), nil
}
