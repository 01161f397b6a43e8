package fields

import (
	"reflect"
	"slices"
	"strings"
	"testing"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"

	registry "atoll.dev/atoll/api/imageregistry/v1alpha1"
	netop "atoll.dev/atoll/api/netoperator/v1alpha1"
)

// leaves lists the fields of a type that the table must have, down to where a path of the table ends.
func leaves(t reflect.Type, path string, known func(string) bool, missing func(string), found map[string]bool) {
	if known(path) {
		found[path] = true
		return
	}
	for t.Kind() == reflect.Pointer || t.Kind() == reflect.Slice {
		if t.Kind() == reflect.Slice {
			path += "[]"
		}
		t = t.Elem()
	}
	if t.Kind() != reflect.Struct || !strings.Contains(t.PkgPath(), "vm-operator") && !strings.Contains(t.PkgPath(), "k8s.io/api/core") && !strings.Contains(t.PkgPath(), "netoperator") && !strings.Contains(t.PkgPath(), "imageregistry") {
		missing(path)
		return
	}
	for f := range t.Fields() {
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		if name == "" {
			leaves(f.Type, path, func(p string) bool { return p != path && known(p) }, missing, found)
			continue
		}
		leaves(f.Type, path+"."+name, known, missing, found)
	}
}

// table is that of a kind.
func table(t *testing.T, name string) []Field {
	t.Helper()
	for _, k := range Kinds() {
		if k.Name == name {
			return k.Fields
		}
	}
	t.Fatalf("there is no table of %s", name)
	return nil
}

func TestTableIsComplete(t *testing.T) {
	for _, c := range []struct {
		spec  any
		table []Field
	}{
		{vmopv1.VirtualMachineSpec{}, VirtualMachine()},
		{vmopv1.VirtualMachineClassSpec{}, VirtualMachineClass()},
		{vmopv1.VirtualMachineSetResourcePolicySpec{}, VirtualMachineSetResourcePolicy()},
		{vmopv1.VirtualMachineClassInstanceSpec{}, VirtualMachineClass()},
		{vmopv1.VirtualMachineImageSpec{}, table(t, "VirtualMachineImage, ClusterVirtualMachineImage")},
		{vmopv1.VirtualMachineServiceSpec{}, VirtualMachineService()},
		{vmopv1.VirtualMachineReplicaSetSpec{}, VirtualMachineReplicaSet()},
		{vmopv1.VirtualMachineGroupSpec{}, VirtualMachineGroup()},
		{vmopv1.VirtualMachineSnapshotSpec{}, table(t, "VirtualMachineSnapshot")},
		{vmopv1.VirtualMachineWebConsoleRequestSpec{}, table(t, "VirtualMachineWebConsoleRequest")},
		{vmopv1.VirtualMachinePublishRequestSpec{}, VirtualMachinePublishRequest()},
		{vmopv1.VirtualMachineGroupPublishRequestSpec{}, table(t, "VirtualMachineGroupPublishRequest")},
		{vmopv1.VirtualMachineImageCacheSpec{}, table(t, "VirtualMachineImageCache")},
		{registry.ContentLibrarySpec{}, table(t, "ContentLibrary, ClusterContentLibrary (imageregistry.vmware.com)")},
		{registry.ContentLibraryItemSpec{}, table(t, "ContentLibraryItem, ClusterContentLibraryItem (imageregistry.vmware.com)")},
		{registry.ContentLibraryItemImportRequestSpec{}, table(t, "ContentLibraryItemImportRequest (imageregistry.vmware.com)")},
		{netop.NetworkSpec{}, Network()},
		{netop.NetworkInterfaceSpec{}, NetworkInterface()},
	} {
		paths := map[string]bool{}
		for _, f := range c.table {
			if paths[f.Path] {
				t.Errorf("%s is twice in the table", f.Path)
			}
			paths[f.Path] = true
			if f.Effect != Honoured && f.Note == "" {
				t.Errorf("%s is %s, without a note", f.Path, f.Effect)
			}
		}
		found := map[string]bool{}
		leaves(reflect.TypeOf(c.spec), "spec", func(p string) bool { return paths[p] }, func(p string) { t.Errorf("%s is not in the table", p) }, found)
		for p := range paths {
			if !found[p] {
				t.Errorf("%s is in the table, but not in the API", p)
			}
		}
	}
}

func TestWithoutEffect(t *testing.T) {
	vm := &vmopv1.VirtualMachine{}
	if got := WithoutEffect(vm); len(got) != 0 {
		t.Fatalf("of nothing: %v", got)
	}
	vm.Spec.Advanced = &vmopv1.VirtualMachineAdvancedSpec{ChangeBlockTracking: new(true)}
	if got := WithoutEffect(vm); len(got) != 1 || !strings.HasPrefix(got[0], "spec.advanced.changeBlockTracking (") {
		t.Fatal(got)
	}
}

func TestWithoutEffectOfNetworks(t *testing.T) {
	network := netop.NetworkSpec{Type: netop.NetworkTypeBridge, Bridge: &netop.Bridge{Name: "br0"}, DNS: []string{"192.0.2.1"}}
	if got := OfNetwork(&network); len(got) != 0 {
		t.Errorf("of what has an effect: %v", got)
	}
	network.NTP, network.ProviderRef, network.IPPools = []string{"192.0.2.1"}, &netop.NetworkProviderReference{}, []netop.IPPoolReference{{Name: "a"}}
	nic := netop.NetworkInterfaceSpec{NetworkName: "a", ExternalID: "x"}
	// All that the tables say have no effect.
	for name, c := range map[string]struct {
		got   []string
		table []Field
	}{"Network": {OfNetwork(&network), Network()}, "NetworkInterface": {OfNetworkInterface(&nic), NetworkInterface()}} {
		var want []string
		for _, f := range c.table {
			if f.Effect == None {
				want = append(want, f.Path+" ("+f.Note+")")
			}
		}
		if !slices.Equal(c.got, want) {
			t.Errorf("%s: %q, want %q", name, c.got, want)
		}
	}
}
