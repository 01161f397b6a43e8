// Package resourcepolicy is the controller of VirtualMachineSetResourcePolicies.
//
// There are no resource pools, folders and cluster modules here, so it only writes what clients of VMware's API wait
// for: ids that stay the same. Machines of one cluster module group prefer different nodes, which the controller of
// VirtualMachines sees to. What can go wrong: nothing but the API server.
package resourcepolicy

import (
	"context"
	"crypto/sha256"
	"fmt"

	"github.com/google/uuid"
	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	"k8s.io/apimachinery/pkg/api/equality"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// cluster is the id of the only cluster there is.
const cluster = "domain-c1"

// Reconciler writes the status.
type Reconciler struct{ client.Client }

// Setup adds the controller to a manager.
func Setup(mgr ctrl.Manager) error {
	err := ctrl.NewControllerManagedBy(mgr).
		Named("virtualmachinesetresourcepolicy").
		For(&vmopv1.VirtualMachineSetResourcePolicy{}).
		Complete(&Reconciler{Client: mgr.GetClient()})
	if err != nil {
		return fmt.Errorf("setting up the controller of VirtualMachineSetResourcePolicies: %w", err)
	}
	return nil
}

// Reconcile writes the status of one policy.
func (r *Reconciler) Reconcile(ctx context.Context, req ctrl.Request) (ctrl.Result, error) {
	p := &vmopv1.VirtualMachineSetResourcePolicy{}
	if err := r.Get(ctx, req.NamespacedName, p); err != nil {
		return ctrl.Result{}, client.IgnoreNotFound(err)
	}
	before := p.DeepCopy()
	p.Status = Status(p)
	if p.DeletionTimestamp != nil || equality.Semantic.DeepEqual(before.Status, p.Status) {
		return ctrl.Result{}, nil
	}
	return ctrl.Result{}, client.IgnoreNotFound(r.Status().Patch(ctx, p, client.MergeFrom(before)))
}

// Status is what a policy's status is to be.
func Status(p *vmopv1.VirtualMachineSetResourcePolicy) vmopv1.VirtualMachineSetResourcePolicyStatus {
	var s vmopv1.VirtualMachineSetResourcePolicyStatus
	if p.Spec.ResourcePool.Name != "" {
		sum := sha256.Sum256([]byte(string(p.UID) + "/" + p.Spec.ResourcePool.Name))
		s.ResourcePools = []vmopv1.ResourcePoolStatus{{ClusterMoID: cluster, ChildResourcePoolMoID: fmt.Sprintf("resgroup-%x", sum[:4])}}
	}
	for _, group := range p.Spec.ClusterModuleGroups {
		id := uuid.NewSHA1(uuid.NameSpaceOID, []byte("atoll.dev/module/"+string(p.UID)+"/"+group)).String()
		s.ClusterModules = append(s.ClusterModules, vmopv1.VSphereClusterModuleStatus{GroupName: group, ModuleUuid: id, ClusterMoID: cluster})
	}
	return s
}

// WithoutEffect names fields of a policy that are set and change nothing.
func WithoutEffect(p *vmopv1.VirtualMachineSetResourcePolicy) []string {
	var out []string
	say := func(field, why string) {
		out = append(out, fmt.Sprintf("%s of VirtualMachineSetResourcePolicy %s (%s)", field, p.Name, why))
	}
	if p.Spec.Folder != "" {
		say("spec.folder", "there are no folders")
	}
	pool := p.Spec.ResourcePool
	for name, amounts := range map[string]vmopv1.VirtualMachineResourceSpec{"reservations": pool.Reservations, "limits": pool.Limits} {
		if !amounts.Cpu.IsZero() || !amounts.Memory.IsZero() {
			say("spec.resourcePool."+name, "use the namespace's ResourceQuota")
		}
	}
	return out
}
