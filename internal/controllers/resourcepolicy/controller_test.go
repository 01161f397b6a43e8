package resourcepolicy

import (
	"strings"
	"testing"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// TestStatus: ids stay the same for the same policy, and are others for another.
func TestStatus(t *testing.T) {
	of := func(uid types.UID) vmopv1.VirtualMachineSetResourcePolicyStatus {
		p := &vmopv1.VirtualMachineSetResourcePolicy{}
		p.UID, p.Spec.ResourcePool.Name, p.Spec.ClusterModuleGroups = uid, "pool", []string{"control", "workers"}
		return Status(p)
	}
	got, other := of("a"), of("b")
	if len(got.ResourcePools) != 1 || len(got.ClusterModules) != 2 || got.ClusterModules[0].GroupName != "control" ||
		got.ClusterModules[0].ModuleUuid == got.ClusterModules[1].ModuleUuid {
		t.Errorf("%+v", got)
	}
	if !equality.Semantic.DeepEqual(got, of("a")) {
		t.Error("ids change")
	}
	if got.ResourcePools[0].ChildResourcePoolMoID == other.ResourcePools[0].ChildResourcePoolMoID || got.ClusterModules[0].ModuleUuid == other.ClusterModules[0].ModuleUuid {
		t.Error("another policy has the same ids")
	}
	if none := Status(&vmopv1.VirtualMachineSetResourcePolicy{}); none.ResourcePools != nil || none.ClusterModules != nil {
		t.Errorf("%+v", none)
	}
}

func TestWithoutEffect(t *testing.T) {
	p := &vmopv1.VirtualMachineSetResourcePolicy{ObjectMeta: metav1.ObjectMeta{Name: "web"}}
	p.Spec.ResourcePool.Name, p.Spec.ClusterModuleGroups = "pool", []string{"workers"}
	if got := WithoutEffect(p); got != nil {
		t.Errorf("%q", got)
	}
	p.Spec.Folder, p.Spec.ResourcePool.Limits.Cpu = "folder", resource.MustParse("2")
	want := "spec.folder of VirtualMachineSetResourcePolicy web (there are no folders), " +
		"spec.resourcePool.limits of VirtualMachineSetResourcePolicy web (use the namespace's ResourceQuota)"
	if got := strings.Join(WithoutEffect(p), ", "); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}
