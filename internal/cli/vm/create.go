package vm

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	"github.com/vmware-tanzu/vm-operator/api/v1alpha5/cloudinit"
	"github.com/vmware-tanzu/vm-operator/api/v1alpha5/common"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"

	"atoll.dev/atoll/internal/cli/command"
	"atoll.dev/atoll/internal/cli/text"
)

// defaultClass is the class of a virtual machine that names none.
const defaultClass = "best-effort-small"

// newMachine is what `atoll vm create` was told.
type newMachine struct {
	image, class, storageClass string
	userData, sshKey, group    string
	noBootstrap, off, tpm      bool
	firmware                   string
	volumes, networks, labels  []string
	wait                       waiting
	output                     string
	dryRun                     bool
}

func (c *commands) createCommand() *cobra.Command {
	var n newMachine
	cmd := &cobra.Command{
		Use:   "create <name> --image <image>",
		Short: "Make a virtual machine of an image and wait for its address",
		Long: `Makes a virtual machine of an image. Nothing else is needed: it gets the class best-effort-small, the default storage
class, an address of the pod network, and in it a user "atoll" who may become root and has your ssh key. The key is
--ssh-key, or the first of ~/.ssh, or one that is made in ~/.atoll. With --user-data the file is cloud-init's
configuration, and neither user nor key is added.`,
		Example: `  atoll vm create box --image debian-12
  atoll vm create db --image debian-12 --class guaranteed-large --volume data=db-data --user-data db.yaml
  atoll vm create box --image debian-12 --dry-run -o yaml`,
		Args: command.ExactArgs("name"),
		RunE: c.with(func(s *session, cmd *cobra.Command, args []string) error {
			return c.create(cmd.Context(), s, args[0], n)
		}),
	}
	f := cmd.Flags()
	f.StringVar(&n.image, "image", "", "name of a VirtualMachineImage or ClusterVirtualMachineImage, or its display name")
	f.StringVar(&n.class, "class", defaultClass, "size of the machine: a VirtualMachineClass")
	f.StringVar(&n.storageClass, "storage-class", "", "where its disk is (default: the default storage class)")
	f.StringVar(&n.userData, "user-data", "", "file with cloud-init user data")
	f.StringVar(&n.sshKey, "ssh-key", "", "file with the public key that may log in")
	f.BoolVar(&n.noBootstrap, "no-bootstrap", false, "configure nothing in the guest")
	f.StringSliceVar(&n.volumes, "volume", nil, "attach a claim: NAME=CLAIM or CLAIM; may be repeated")
	f.StringSliceVar(&n.networks, "network", nil, "one more network interface on this Network; may be repeated")
	f.StringSliceVarP(&n.labels, "label", "l", nil, "label of the machine: app=web; may be repeated")
	f.StringVar(&n.firmware, "firmware", "", "bios or efi (default: what the image says)")
	f.BoolVar(&n.tpm, "tpm", false, "with a virtual TPM")
	f.StringVar(&n.group, "group", "", "VirtualMachineGroup it belongs to")
	f.BoolVar(&n.off, "off", false, "do not power it on")
	f.BoolVar(&n.dryRun, "dry-run", false, "make nothing, print what would be made")
	n.wait.add(cmd, "it has an address")
	command.OutputFlag(cmd, &n.output, "text", "json", "yaml", "name")
	c.complete(cmd, "image", imageNames)
	c.complete(cmd, "class", named(classes))
	c.complete(cmd, "storage-class", named(func() client.ObjectList { return &storagev1.StorageClassList{} }))
	c.complete(cmd, "volume", named(func() client.ObjectList { return &corev1.PersistentVolumeClaimList{} }))
	return cmd
}

// made is what create is about to make.
type made struct {
	vm     *vmopv1.VirtualMachine
	secret *corev1.Secret // of the user data
	key    key
}

func (c *commands) create(ctx context.Context, s *session, name string, n newMachine) error {
	m, err := c.plan(ctx, s, name, n)
	if err != nil {
		return err
	}
	if n.dryRun {
		if m.secret != nil {
			m.secret.SetGroupVersionKind(corev1.SchemeGroupVersion.WithKind("Secret"))
			if err := c.Structured(cmp.Or(strings.TrimPrefix(n.output, "text"), "yaml"), m.secret); err != nil {
				return err
			}
			c.Printf("---\n")
		}
		_, err := c.structured(cmp.Or(strings.TrimPrefix(n.output, "text"), "yaml"), m.vm)
		return err
	}
	if err := c.make(ctx, s, m); err != nil {
		return err
	}
	if m.key.made {
		c.Tell("made an ssh key for you: %s\n", m.key.private)
	}
	if !n.wait.no && !n.off {
		if err := c.awaitMachine(ctx, s, name, n.wait, hasAddress); err != nil {
			return err
		}
	}
	vm, err := s.machine(ctx, name)
	if err != nil {
		return err
	}
	if done, err := c.structured(n.output, vm); done {
		return err
	}
	c.howToGoOn(vm, n)
	return nil
}

// hasAddress tells whether a virtual machine runs and can be reached.
func hasAddress(vm *vmopv1.VirtualMachine) (bool, string, error) {
	if vm.Spec.Network != nil && vm.Spec.Network.Disabled {
		return vm.Status.PowerState == vmopv1.VirtualMachinePowerStateOn, "", nil
	}
	if vm.Status.PowerState == vmopv1.VirtualMachinePowerStateOn && address(vm) == "" && problem(vm) == "" {
		return false, "Running, has no address yet", nil
	}
	return vm.Status.PowerState == vmopv1.VirtualMachinePowerStateOn && address(vm) != "", "", nil
}

// plan makes the objects, without the API server's help as far as that is possible.
func (c *commands) plan(ctx context.Context, s *session, name string, n newMachine) (*made, error) {
	if n.image == "" {
		return nil, command.UsageError{Err: errors.New("--image is missing: what is the virtual machine made of? `kubectl get vmi,cvmi` lists images")}
	}
	if problems := validation.IsDNS1123Label(name); len(problems) > 0 {
		return nil, command.UsageError{Err: fmt.Errorf("name %q: %s", name, strings.Join(problems, "; "))}
	}
	from, err := s.image(ctx, n.image)
	if err != nil {
		return nil, err
	}
	if is(from.ready, metav1.ConditionFalse) {
		c.Tell("image %s is not ready yet, the machine waits for it: %s\n", from.display, say(from.ready))
	}
	vm := &vmopv1.VirtualMachine{
		ObjectMeta: metav1.ObjectMeta{Namespace: s.namespace, Name: name},
		Spec: vmopv1.VirtualMachineSpec{
			ImageName: n.image, ClassName: n.class, StorageClass: n.storageClass, GroupName: n.group, PowerState: vmopv1.VirtualMachinePowerStateOn,
		},
	}
	if from.kind != "" {
		vm.Spec.Image = &vmopv1.VirtualMachineImageRef{Kind: from.kind, Name: from.name}
	}
	if n.off {
		vm.Spec.PowerState = vmopv1.VirtualMachinePowerStateOff
	}
	if vm.Spec.StorageClass == "" {
		if vm.Spec.StorageClass, err = s.defaultStorageClass(ctx); err != nil {
			return nil, err
		}
	}
	if err := c.hardware(vm, n); err != nil {
		return nil, err
	}
	m := &made{vm: vm}
	return m, c.bootstrap(m, n, from)
}

// hardware adds what the flags about devices say.
func (c *commands) hardware(vm *vmopv1.VirtualMachine, n newMachine) error {
	for _, l := range n.labels {
		k, v, ok := strings.Cut(l, "=")
		if !ok {
			return command.UsageError{Err: fmt.Errorf("--label %q: write KEY=VALUE", l)}
		}
		metav1.SetMetaDataLabel(&vm.ObjectMeta, k, v)
	}
	for _, v := range n.volumes {
		as, claim, ok := strings.Cut(v, "=")
		if !ok {
			claim = as
		}
		if as == "" || claim == "" {
			return command.UsageError{Err: fmt.Errorf("--volume %q: write NAME=CLAIM", v)}
		}
		volume := vmopv1.VirtualMachineVolume{Name: as}
		volume.PersistentVolumeClaim = &vmopv1.PersistentVolumeClaimVolumeSource{
			PersistentVolumeClaimVolumeSource: corev1.PersistentVolumeClaimVolumeSource{ClaimName: claim},
		}
		vm.Spec.Volumes = append(vm.Spec.Volumes, volume)
	}
	if len(n.networks) > 0 {
		vm.Spec.Network = &vmopv1.VirtualMachineNetworkSpec{Interfaces: []vmopv1.VirtualMachineNetworkInterfaceSpec{{Name: "eth0"}}}
		for i, network := range n.networks {
			vm.Spec.Network.Interfaces = append(vm.Spec.Network.Interfaces, vmopv1.VirtualMachineNetworkInterfaceSpec{
				Name: fmt.Sprintf("eth%d", i+1),
				Network: &common.PartialObjectRef{
					TypeMeta: metav1.TypeMeta{APIVersion: "netoperator.vmware.com/v1alpha1", Kind: "Network"}, Name: network,
				},
			})
		}
	}
	switch n.firmware {
	case "":
	case "bios", "efi":
		vm.Spec.BootOptions = &vmopv1.VirtualMachineBootOptions{Firmware: vmopv1.VirtualMachineBootOptionsFirmwareType(n.firmware)}
	default:
		return command.UsageError{Err: fmt.Errorf("--firmware %q: use bios or efi", n.firmware)}
	}
	if n.tpm {
		vm.Spec.Crypto = &vmopv1.VirtualMachineCryptoSpec{VTPMMode: vmopv1.VirtualMachineCryptoVTPMModeNew}
	}
	return nil
}

// bootstrap says how the guest is configured.
func (c *commands) bootstrap(m *made, n newMachine, from imageEntry) error {
	switch {
	case n.noBootstrap || from.iso && n.userData == "" && n.sshKey == "":
		return nil
	case n.userData != "":
		const most = 512 << 10 // a Secret takes 1 MiB, and it is encoded
		data, err := os.ReadFile(n.userData)
		if err != nil {
			return fmt.Errorf("--user-data: %w", err)
		}
		if len(data) > most {
			return fmt.Errorf("--user-data: %s has %s, %s are possible", n.userData, text.Size(int64(len(data))), text.Size(most))
		}
		m.secret = &corev1.Secret{
			ObjectMeta: metav1.ObjectMeta{Namespace: m.vm.Namespace, Name: m.vm.Name + "-user-data"},
			StringData: map[string]string{"user-data": string(data)},
		}
		m.vm.Spec.Bootstrap = &vmopv1.VirtualMachineBootstrapSpec{CloudInit: &vmopv1.VirtualMachineBootstrapCloudInitSpec{
			RawCloudConfig: &common.SecretKeySelector{Name: m.secret.Name, Key: "user-data"},
		}}
		return nil
	}
	k, err := c.sshKey(n.sshKey)
	if err != nil {
		return err
	}
	m.key = k
	metav1.SetMetaDataAnnotation(&m.vm.ObjectMeta, userAnnotation, sshUser)
	m.vm.Spec.Bootstrap = &vmopv1.VirtualMachineBootstrapSpec{CloudInit: &vmopv1.VirtualMachineBootstrapCloudInitSpec{
		SSHAuthorizedKeys: []string{k.public},
		CloudConfig: &cloudinit.CloudConfig{
			DefaultUserEnabled: true,
			Users: []cloudinit.User{{
				Name: sshUser, Shell: new("/bin/bash"), Sudo: new("ALL=(ALL) NOPASSWD:ALL"), LockPasswd: new(true), SSHAuthorizedKeys: []string{k.public},
			}},
		},
	}}
	return nil
}

// make creates the objects. When the machine is refused the secret goes again.
func (c *commands) make(ctx context.Context, s *session, m *made) error {
	if m.secret != nil {
		if err := s.Create(ctx, m.secret); err != nil {
			if apierrors.IsAlreadyExists(err) {
				return fmt.Errorf("there is a Secret %s already, perhaps of an earlier machine of the name: delete it (`kubectl -n %s delete secret %s`): %w",
					m.secret.Name, s.namespace, m.secret.Name, err)
			}
			return fmt.Errorf("making Secret %s: %w", m.secret.Name, err)
		}
	}
	if err := s.Create(ctx, m.vm); err != nil {
		if m.secret != nil {
			undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
			defer cancel()
			err = errors.Join(err, client.IgnoreNotFound(s.Delete(undo, m.secret)))
		}
		return fmt.Errorf("making virtual machine %s: %w", m.vm.Name, err)
	}
	if m.secret == nil {
		return nil
	}
	// The secret goes with the machine.
	base := m.secret.DeepCopy()
	m.vm.SetGroupVersionKind(vmopv1.GroupVersion.WithKind("VirtualMachine"))
	if err := controllerutil.SetOwnerReference(m.vm, m.secret, s.Scheme()); err != nil {
		return err
	}
	if err := s.Patch(ctx, m.secret, client.MergeFrom(base)); err != nil {
		c.Tell("Secret %s will not be deleted together with the machine: %v\n", m.secret.Name, err)
	}
	return nil
}

// howToGoOn says what there is and what can be done with it.
func (c *commands) howToGoOn(vm *vmopv1.VirtualMachine, n newMachine) {
	at := ""
	if vm.Namespace != "default" {
		at = " -n " + vm.Namespace
	}
	switch {
	case n.off:
		c.Printf("%s is made; `atoll vm start %s%s` powers it on\n", vm.Name, vm.Name, at)
		return
	case n.wait.no:
		c.Printf("%s is being made; `atoll vm ls%s` shows how it is\n", vm.Name, at)
		return
	case address(vm) == "":
		c.Printf("%s is running\n", vm.Name)
	default:
		c.Printf("%s is running at %s\n", vm.Name, address(vm))
	}
	if vm.Annotations[userAnnotation] != "" {
		c.Printf("  atoll vm ssh %s%s       log in (once its sshd is up)\n", vm.Name, at)
	}
	c.Printf("  atoll vm console %s%s   serial console\n", vm.Name, at)
	c.Printf("  atoll vm vnc %s%s       screen\n", vm.Name, at)
	c.Printf("  atoll vm stop %s%s      power it off\n", vm.Name, at)
}
