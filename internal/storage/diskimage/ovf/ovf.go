// Package ovf reads and writes the descriptor of a virtual appliance: OVF 1.x and 2.x as VMware's and VirtualBox's
// tools write it (DMTF DSP0243).
//
// It takes what an image of a virtual machine needs, the hardware, disks, properties and product, and leaves
// everything else. It opens nothing: names of files are returned for the caller to look up in the archive. Callers
// are the library of images and the exporter. What can go wrong: the text is no OVF of one machine, or too large
// (ErrFormat).
package ovf

import (
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"math"
	"path"
	"regexp"
	"strconv"
	"strings"
)

// ErrFormat is wrapped for what is no OVF descriptor that can be used.
var ErrFormat = errors.New("not a sound OVF descriptor of one virtual machine")

// Bounds of a descriptor.
const (
	MaxBytes      = 4 << 20
	maxDisks      = 64
	maxProperties = 1000
	maxText       = 4 << 10
)

// Descriptor is what an OVF says.
type Descriptor struct {
	Name string
	// OSID is CIM's number of the system, OSType VMware's name of it (otherLinux64Guest).
	OSID, OSType, OSVersion string
	CPUs                    int
	Memory                  int64  // bytes
	Firmware                string // bios, efi, or ""
	SecureBoot              bool
	HardwareVersion         int // 19 of vmx-19, or 0
	NICs                    int
	Disks                   []Disk
	Product                 Product
	Properties              []Property
}

// Disk is a virtual disk.
type Disk struct {
	ID       string
	Capacity int64 // bytes
	// File is the name of its file in the archive; empty is a disk that is empty.
	File string
	// Gzip: the file is compressed.
	Gzip bool
	// Controller is SCSI, SATA, IDE, NVME or "", Bus the number of the controller and Unit the place at it.
	Controller string
	Bus, Unit  int
}

// Product is what the appliance is.
type Product struct {
	Product, Vendor, Version, FullVersion string
}

// Property can be set by who deploys the appliance, if it is UserConfigurable.
type Property struct {
	Key, Type, Default string
	HasDefault         bool
	UserConfigurable   bool
	Label, Description string
}

// The XML, as far as it is read. Names are matched in any name space.
type (
	envelope struct {
		XMLName    xml.Name    `xml:"Envelope"`
		References []reference `xml:"References>File"`
		Disks      []diskXML   `xml:"DiskSection>Disk"`
		System     []system    `xml:"VirtualSystem"`
		Collection *struct{}   `xml:"VirtualSystemCollection"`
	}
	reference struct {
		ID          string `xml:"id,attr"`
		Href        string `xml:"href,attr"`
		Compression string `xml:"compression,attr"`
		ChunkSize   string `xml:"chunkSize,attr"`
	}
	diskXML struct {
		ID        string `xml:"diskId,attr"`
		FileRef   string `xml:"fileRef,attr"`
		Capacity  string `xml:"capacity,attr"`
		Units     string `xml:"capacityAllocationUnits,attr"`
		ParentRef string `xml:"parentRef,attr"`
	}
	system struct {
		ID   string `xml:"id,attr"`
		Name string `xml:"Name"`
		OS   struct {
			ID      string `xml:"id,attr"`
			Version string `xml:"version,attr"`
			OSType  string `xml:"osType,attr"`
		} `xml:"OperatingSystemSection"`
		Hardware []hardware   `xml:"VirtualHardwareSection"`
		Products []productXML `xml:"ProductSection"`
	}
	hardware struct {
		SystemType string   `xml:"System>VirtualSystemType"`
		Items      []item   `xml:"Item"`
		Storage    []item   `xml:"StorageItem"`
		Network    []item   `xml:"EthernetPortItem"`
		Config     []config `xml:"Config"`
		Extra      []config `xml:"ExtraConfig"`
	}
	config struct {
		Key   string `xml:"key,attr"`
		Value string `xml:"value,attr"`
	}
	item struct {
		Address  string   `xml:"Address"`
		Place    string   `xml:"AddressOnParent"`
		Units    string   `xml:"AllocationUnits"`
		Host     []string `xml:"HostResource"`
		ID       string   `xml:"InstanceID"`
		Parent   string   `xml:"Parent"`
		SubType  string   `xml:"ResourceSubType"`
		Type     string   `xml:"ResourceType"`
		Quantity string   `xml:"VirtualQuantity"`
	}
	productXML struct {
		Class       string        `xml:"class,attr"`
		Instance    string        `xml:"instance,attr"`
		Product     string        `xml:"Product"`
		Vendor      string        `xml:"Vendor"`
		Version     string        `xml:"Version"`
		FullVersion string        `xml:"FullVersion"`
		Properties  []propertyXML `xml:"Property"`
	}
	propertyXML struct {
		Key          string  `xml:"key,attr"`
		Type         string  `xml:"type,attr"`
		Value        *string `xml:"value,attr"`
		Configurable string  `xml:"userConfigurable,attr"`
		Label        string  `xml:"Label"`
		Description  string  `xml:"Description"`
		Values       []struct {
			Value string `xml:"value,attr"`
		} `xml:"Value"`
	}
)

// Read reads a descriptor.
func Read(r io.Reader) (Descriptor, error) {
	limited := &io.LimitedReader{R: r, N: MaxBytes + 1}
	decoder := xml.NewDecoder(limited)
	var e envelope
	if err := decoder.Decode(&e); err != nil {
		if limited.N <= 0 {
			err = fmt.Errorf("it has more than %d bytes", MaxBytes)
		}
		return Descriptor{}, fmt.Errorf("%w: %w", ErrFormat, err)
	}
	switch {
	case e.Collection != nil || len(e.System) > 1:
		return Descriptor{}, fmt.Errorf("%w: it has several machines (a vApp); export them one by one", ErrFormat)
	case len(e.System) == 0:
		return Descriptor{}, fmt.Errorf("%w: it has no VirtualSystem", ErrFormat)
	case len(e.System[0].Hardware) == 0:
		return Descriptor{}, fmt.Errorf("%w: it has no VirtualHardwareSection", ErrFormat)
	case len(e.Disks) > maxDisks:
		return Descriptor{}, fmt.Errorf("%w: it has %d disks, more than %d", ErrFormat, len(e.Disks), maxDisks)
	}
	s := e.System[0]
	d := Descriptor{Name: clean(or(s.Name, s.ID)), OSID: clean(s.OS.ID), OSType: clean(s.OS.OSType), OSVersion: clean(s.OS.Version)}
	d.hardware(s.Hardware[0])
	if err := d.disks(e, s.Hardware[0]); err != nil {
		return Descriptor{}, err
	}
	for i, p := range s.Products {
		if i == 0 {
			d.Product = Product{Product: clean(p.Product), Vendor: clean(p.Vendor), Version: clean(p.Version), FullVersion: clean(p.FullVersion)}
		}
		d.properties(p)
	}
	if len(d.Properties) > maxProperties {
		return Descriptor{}, fmt.Errorf("%w: it has %d properties, more than %d", ErrFormat, len(d.Properties), maxProperties)
	}
	return d, nil
}

// Types of CIM resources.
const (
	typeCPU    = "3"
	typeMemory = "4"
	typeIDE    = "5"
	typeSCSI   = "6"
	typeNIC    = "10"
	typeDisk   = "17"
	typeOther  = "20" // SATA and NVMe
)

func (d *Descriptor) hardware(h hardware) {
	for _, version := range regexp.MustCompile(`vmx-0*(\d{1,3})\b`).FindAllStringSubmatch(h.SystemType, 20) {
		n, _ := strconv.Atoi(version[1]) // digits
		d.HardwareVersion = max(d.HardwareVersion, n)
	}
	for _, i := range append(h.Items, h.Network...) {
		n, err := strconv.ParseInt(strings.TrimSpace(i.Quantity), 10, 64)
		switch strings.TrimSpace(i.Type) {
		case typeCPU:
			if err == nil && n > 0 && n <= 4096 {
				d.CPUs = int(n)
			}
		case typeMemory:
			if unit := units(i.Units, 1<<20); err == nil && n > 0 && n <= (64<<40)/unit {
				d.Memory = n * unit
			}
		case typeNIC:
			d.NICs++
		}
	}
	for _, c := range append(h.Config, h.Extra...) {
		switch strings.ToLower(c.Key) {
		case "firmware":
			if f := strings.ToLower(c.Value); f == "efi" || f == "bios" {
				d.Firmware = f
			}
		case "bootoptions.efisecurebootenabled", "uefi.secureboot.enabled":
			d.SecureBoot = strings.EqualFold(c.Value, "true")
		}
	}
}

// disks finds the file and place of each disk.
func (d *Descriptor) disks(e envelope, h hardware) error {
	files := map[string]reference{}
	for _, f := range e.References {
		files[f.ID] = f
	}
	items := map[string]item{}
	all := append(append([]item{}, h.Items...), h.Storage...)
	for _, i := range all {
		items[strings.TrimSpace(i.ID)] = i
	}
	for _, x := range e.Disks {
		out := Disk{ID: clean(x.ID)}
		capacity, err := strconv.ParseInt(strings.TrimSpace(x.Capacity), 10, 64)
		unit := units(x.Units, 1)
		switch {
		case err != nil || capacity < 0 || capacity > math.MaxInt64/unit:
			return fmt.Errorf("%w: disk %.40q has the capacity %.40q", ErrFormat, x.ID, x.Capacity)
		case x.ParentRef != "":
			return fmt.Errorf("%w: disk %.40q is a delta of another one", ErrFormat, x.ID)
		}
		out.Capacity = capacity * unit
		if x.FileRef != "" {
			f, ok := files[x.FileRef]
			switch {
			case !ok:
				return fmt.Errorf("%w: disk %.40q is in the file %.40q, which it does not name", ErrFormat, x.ID, x.FileRef)
			case f.ChunkSize != "":
				return fmt.Errorf("%w: file %.100q is in several parts", ErrFormat, f.Href)
			case f.Compression != "" && f.Compression != "identity" && f.Compression != "gzip":
				return fmt.Errorf("%w: file %.100q is compressed by %.40q", ErrFormat, f.Href, f.Compression)
			case !plainName(f.Href):
				return fmt.Errorf("%w: file %.100q is not a plain name in the archive", ErrFormat, f.Href)
			}
			out.File, out.Gzip = f.Href, f.Compression == "gzip"
		}
		out.place(all, items)
		d.Disks = append(d.Disks, out)
	}
	return nil
}

// place finds the controller of a disk.
func (d *Disk) place(all []item, items map[string]item) {
	for _, i := range all {
		if len(i.Host) == 0 || path.Base(strings.TrimSpace(i.Host[0])) != d.ID || strings.TrimSpace(i.Type) != typeDisk {
			continue
		}
		d.Unit = number(i.Place)
		parent, ok := items[strings.TrimSpace(i.Parent)]
		if !ok {
			return
		}
		d.Bus = number(parent.Address)
		subType := strings.ToLower(parent.SubType)
		switch t := strings.TrimSpace(parent.Type); {
		case t == typeIDE:
			d.Controller = "IDE"
		case t == typeSCSI:
			d.Controller = "SCSI"
		case t == typeOther && strings.Contains(subType, "nvme"):
			d.Controller = "NVME"
		case t == typeOther && (strings.Contains(subType, "sata") || strings.Contains(subType, "ahci")):
			d.Controller = "SATA"
		}
		return
	}
}

func (d *Descriptor) properties(p productXML) {
	for _, x := range p.Properties {
		key := x.Key
		if p.Class != "" {
			key = p.Class + "." + key
		}
		if p.Instance != "" {
			key += "." + p.Instance
		}
		out := Property{
			Key: clean(key), Type: clean(x.Type), UserConfigurable: strings.EqualFold(x.Configurable, "true"),
			Label: clean(x.Label), Description: clean(x.Description),
		}
		switch {
		case x.Value != nil:
			out.Default, out.HasDefault = clean(*x.Value), true
		case len(x.Values) > 0:
			out.Default, out.HasDefault = clean(x.Values[0].Value), true
		}
		if out.Key != "" {
			d.Properties = append(d.Properties, out)
		}
	}
}

// units reads "byte * 2^20" and what older tools write.
func units(text string, otherwise int64) int64 {
	text = strings.ToLower(strings.ReplaceAll(text, " ", ""))
	switch text {
	case "":
		return otherwise
	case "byte", "bytes":
		return 1
	case "kilobytes", "kb":
		return 1 << 10
	case "megabytes", "mb":
		return 1 << 20
	case "gigabytes", "gb":
		return 1 << 30
	}
	if power, ok := strings.CutPrefix(text, "byte*2^"); ok {
		if n, err := strconv.Atoi(power); err == nil && n >= 0 && n <= 40 {
			return 1 << n
		}
	}
	return otherwise
}

func number(text string) int {
	n, err := strconv.Atoi(strings.TrimSpace(text))
	if err != nil || n < 0 || n > 255 {
		return 0
	}
	return n
}

// plainName tells whether a file is beside the descriptor.
func plainName(name string) bool {
	return name != "" && len(name) <= 255 && name != "." && name != ".." && !strings.ContainsAny(name, "/\\\x00")
}

// clean makes a text one to show.
func clean(text string) string {
	text = strings.Map(func(r rune) rune {
		if r < ' ' && r != '\n' && r != '\t' || r == 0x7f {
			return -1
		}
		return r
	}, strings.ToValidUTF8(strings.TrimSpace(text), ""))
	if len(text) > maxText {
		text = strings.ToValidUTF8(text[:maxText], "")
	}
	return text
}

func or(text, otherwise string) string {
	if strings.TrimSpace(text) == "" {
		return otherwise
	}
	return text
}
