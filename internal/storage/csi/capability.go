package csi

import (
	"maps"
	"slices"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"atoll.dev/atoll/internal/storage/datastore"
)

// hasMode tells whether one of the capabilities has the mode.
func hasMode(caps []*csi.VolumeCapability, mode csi.VolumeCapability_AccessMode_Mode) bool {
	return slices.ContainsFunc(caps, func(c *csi.VolumeCapability) bool { return c.GetAccessMode().GetMode() == mode })
}

// checkCapabilities refuses what no volume of this driver can do.
func checkCapabilities(caps []*csi.VolumeCapability) error {
	if len(caps) == 0 {
		return invalid("the volume capabilities are missing")
	}
	for _, c := range caps {
		if err := checkCapability(c); err != nil {
			return err
		}
	}
	return nil
}

func checkCapability(c *csi.VolumeCapability) error {
	if c == nil {
		return invalid("the volume capability is missing")
	}
	if c.GetBlock() == nil && c.GetMount() == nil {
		return invalid("a volume capability says neither block nor mount")
	}
	switch mode := c.GetAccessMode().GetMode(); mode {
	case csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER,
		csi.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY,
		csi.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER,
		csi.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER,
		csi.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY:
		return nil
	case csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER:
		if c.GetBlock() == nil {
			return invalid("access mode ReadWriteMany is not possible with a file system, which one machine at a time can mount; " +
				"use volumeMode: Block on a shared datastore, or ReadWriteOnce")
		}
		return nil
	default:
		return invalid("access mode %s is not supported; use ReadWriteOnce, ReadWriteOncePod, ReadOnlyMany or, for block volumes, ReadWriteMany", mode)
	}
}

// fileSystem settles the file system of a new volume: "" when all capabilities are block.
func fileSystem(caps []*csi.VolumeCapability, param string) (string, error) {
	mount, wanted := false, param
	for _, c := range caps {
		if c.GetMount() == nil {
			continue
		}
		mount = true
		fs := c.GetMount().GetFsType()
		if err := checkFSType(fs); err != nil {
			return "", invalid("parameter %q: %v", ParamFSType, err)
		}
		switch {
		case fs == "":
		case wanted == "":
			wanted = fs
		case fs != wanted:
			return "", invalid("parameter %q: %q and %q are asked for at once", ParamFSType, wanted, fs)
		}
	}
	switch {
	case !mount:
		return "", nil
	case wanted == "":
		return fsExt4, nil
	}
	return wanted, nil
}

// Mode is how the engine has to attach a volume that is published with this capability.
func Mode(c *csi.VolumeCapability, readOnly bool) datastore.Mode {
	switch c.GetAccessMode().GetMode() {
	case csi.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY, csi.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY:
		return datastore.ReadOnly
	case csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER:
		if !readOnly {
			return datastore.ReadWriteMany
		}
	}
	if readOnly {
		return datastore.ReadOnly
	}
	return datastore.ReadWrite
}

// limitLabel precedes the labels of a volume that keep its limits.
const limitLabel = "limit/"

// setLimitLabels replaces the limits in the labels of a volume.
func setLimitLabels(labels map[string]string, limits Limits) {
	maps.DeleteFunc(labels, func(name, _ string) bool { return strings.HasPrefix(name, limitLabel) })
	for name, value := range limits.Params() {
		labels[limitLabel+name] = value
	}
}

// LimitsOf reads the limits in the labels of a volume.
func LimitsOf(v datastore.Volume) (Limits, error) {
	params := map[string]string{}
	for name, value := range v.Labels {
		if param, ok := strings.CutPrefix(name, limitLabel); ok {
			params[param] = value
		}
	}
	return ParseLimits(params)
}
