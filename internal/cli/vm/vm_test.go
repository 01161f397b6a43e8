package vm

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"
	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	imageregistry "atoll.dev/atoll/api/imageregistry/v1alpha1"
	"atoll.dev/atoll/internal/cli/cluster"
	"atoll.dev/atoll/internal/cli/command"
	"atoll.dev/atoll/internal/testkit/golden"
)

const (
	on  = vmopv1.VirtualMachinePowerStateOn
	off = vmopv1.VirtualMachinePowerStateOff
)

// world is a cluster without controllers and a person at its command line.
type world struct {
	*testing.T
	client.WithWatch
	c        *commands
	out, err bytes.Buffer
	in       string
	home     string
	// obey is called for each virtual machine that is read, and may make it what its spec says.
	obey func(*vmopv1.VirtualMachine)
	// publish answers requests to publish; exported is what was exported.
	publish  bool
	exported string
}

func newWorld(t *testing.T, objects ...client.Object) *world {
	t.Helper()
	scheme, err := cluster.Scheme(vmopv1.AddToScheme, imageregistry.AddToScheme)
	if err != nil {
		t.Fatal(err)
	}
	w := &world{T: t, home: t.TempDir()}
	w.WithWatch = fake.NewClientBuilder().WithScheme(scheme).WithObjects(objects...).
		WithStatusSubresource(&vmopv1.VirtualMachine{}, &vmopv1.VirtualMachineSnapshot{}, &vmopv1.VirtualMachinePublishRequest{}).
		WithInterceptorFuncs(interceptor.Funcs{Get: func(ctx context.Context, c client.WithWatch, key client.ObjectKey, o client.Object, opts ...client.GetOption) error {
			err := c.Get(ctx, key, o, opts...)
			if vm, ok := o.(*vmopv1.VirtualMachine); ok && err == nil && w.obey != nil {
				w.obey(vm)
			}
			if p, ok := o.(*vmopv1.VirtualMachinePublishRequest); ok && err == nil && w.publish {
				p.Status.Ready, p.Status.ImageName = true, "vmi-made"
			}
			return err
		}}).Build()
	return w
}

// run is one command line; it returns what was printed to both.
func (w *world) run(args ...string) (string, error) {
	w.Helper()
	w.out.Reset()
	w.err.Reset()
	w.c = &commands{now: time.Now, Config: Config{
		App:        command.App{In: strings.NewReader(w.in), Out: &w.out, ErrOut: &w.err},
		Getenv:     func(name string) string { return map[string]string{"HOME": w.home}[name] },
		Kubeconfig: func() string { return "" },
		Export: func(_ context.Context, kubeconfig, namespace, image, format, file string) error {
			w.exported = strings.Join([]string{kubeconfig, namespace, image, format, file}, " ")
			return nil
		},
	}}
	w.c.connect = func() (*session, error) {
		namespace := *w.c.flags.Namespace
		if namespace == "" {
			namespace = "team"
		}
		return &session{WithWatch: w.WithWatch, namespace: namespace}, nil
	}
	cmd := w.c.command()
	cmd.SilenceErrors, cmd.SilenceUsage = true, true
	cmd.SetArgs(args)
	cmd.SetOut(&w.out)
	cmd.SetErr(&w.err)
	err := cmd.ExecuteContext(w.Context())
	return w.out.String() + w.err.String(), err
}

func (w *world) must(args ...string) string {
	w.Helper()
	out, err := w.run(args...)
	if err != nil {
		w.Fatalf("atoll vm %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

func (w *world) machine(name string) *vmopv1.VirtualMachine {
	w.Helper()
	vm := &vmopv1.VirtualMachine{}
	if err := w.Get(w.Context(), client.ObjectKey{Namespace: "team", Name: name}, vm); err != nil {
		w.Fatal(err)
	}
	return vm
}

func ago(d time.Duration) metav1.Time { return metav1.NewTime(time.Now().Add(-d)) }

// ages replaces times, which differ from run to run, and how much room they take.
func ages(text string) string {
	text = regexp.MustCompile(`\b\d+[smh](\d+[smhd])?\b`).ReplaceAllString(text, "AGE")
	return regexp.MustCompile(`(AGE|SINCE) +`).ReplaceAllString(text, "$1 ")
}

func machineOf(name string, want, have vmopv1.VirtualMachinePowerState, change ...func(*vmopv1.VirtualMachine)) *vmopv1.VirtualMachine {
	vm := &vmopv1.VirtualMachine{
		ObjectMeta: metav1.ObjectMeta{Namespace: "team", Name: name, CreationTimestamp: ago(5 * time.Minute)},
		Spec: vmopv1.VirtualMachineSpec{
			ClassName: "best-effort-small", ImageName: "debian-12", PowerState: want, StorageClass: "atoll",
		},
		Status: vmopv1.VirtualMachineStatus{PowerState: have},
	}
	if have == on {
		vm.Status.NodeName, vm.Status.Network = "host-1", &vmopv1.VirtualMachineNetworkStatus{PrimaryIP4: "10.244.0.5", HostName: name}
	}
	for _, c := range change {
		c(vm)
	}
	return vm
}

func with(kind string, status metav1.ConditionStatus, reason, message string) func(*vmopv1.VirtualMachine) {
	return func(vm *vmopv1.VirtualMachine) {
		vm.Status.Conditions = append(vm.Status.Conditions, metav1.Condition{Type: kind, Status: status, Reason: reason, Message: message, LastTransitionTime: ago(time.Minute)})
	}
}

func objects() []client.Object {
	return []client.Object{
		machineOf("db", on, on, func(vm *vmopv1.VirtualMachine) {
			vm.Labels = map[string]string{"app": "db"}
			vm.Status.Guest = &vmopv1.VirtualMachineGuestStatus{GuestFullName: "Debian GNU/Linux 12"}
			vm.Status.BiosUUID = "4c4c4544-0000-2010-8020-80c04f202020"
			vm.Status.CurrentSnapshot = &vmopv1.VirtualMachineSnapshotReference{Name: "second"}
			vm.Status.Volumes = []vmopv1.VirtualMachineVolumeStatus{
				{Name: "boot", Attached: true, DiskUUID: "6000c298-1111", Limit: new(resource.MustParse("10Gi")), ControllerType: "SCSI", ControllerBusNumber: new(int32(0)), UnitNumber: new(int32(0))},
				{Name: "data", Error: "no such\x1b[31m claim"},
			}
		}, with("VirtualMachineCreated", "True", "True", "")),
		machineOf("lost", on, "", with("VirtualMachineImageReady", "False", "NotFound", `no image "debain-12"`)),
		machineOf("new", on, ""),
		machineOf("old", off, off),
		machineOf("slow", on, on, with("Ready", "False", "NotReady", "probe failed")),
		machineOf("going", off, on),
		&vmopv1.VirtualMachineClass{ObjectMeta: metav1.ObjectMeta{Namespace: "team", Name: "best-effort-small"}, Spec: vmopv1.VirtualMachineClassSpec{
			Hardware: vmopv1.VirtualMachineClassHardware{Cpus: 2, Memory: resource.MustParse("4Gi")},
		}},
		&vmopv1.VirtualMachineImage{ObjectMeta: metav1.ObjectMeta{Namespace: "team", Name: "vmi-1"}, Status: vmopv1.VirtualMachineImageStatus{Name: "debian-12"}},
		&vmopv1.ClusterVirtualMachineImage{ObjectMeta: metav1.ObjectMeta{Name: "vmi-2"}, Status: vmopv1.VirtualMachineImageStatus{Name: "tiny"}},
		&storagev1.StorageClass{ObjectMeta: metav1.ObjectMeta{Name: "atoll", Annotations: map[string]string{"storageclass.kubernetes.io/is-default-class": "true"}}},
		snapshotOf("first", "db", true, "second"), snapshotOf("second", "db", false), snapshotOf("broken", "db", false),
		&corev1.Event{
			ObjectMeta: metav1.ObjectMeta{Namespace: "team", Name: "e1"}, InvolvedObject: corev1.ObjectReference{Kind: "VirtualMachine", Name: "db"},
			Type: "Normal", Reason: "PoweringOn", Message: "pod db was made", Count: 3, LastTimestamp: ago(time.Minute),
		},
		&corev1.Event{
			ObjectMeta: metav1.ObjectMeta{Namespace: "team", Name: "e2"}, InvolvedObject: corev1.ObjectReference{Kind: "Pod", Name: "other"}, Message: "nothing of ours",
		},
	}
}

func snapshotOf(name, vm string, memory bool, children ...string) *vmopv1.VirtualMachineSnapshot {
	s := &vmopv1.VirtualMachineSnapshot{
		ObjectMeta: metav1.ObjectMeta{Namespace: "team", Name: name, CreationTimestamp: ago(10 * time.Minute)},
		Spec:       vmopv1.VirtualMachineSnapshotSpec{VMName: vm, Memory: memory},
	}
	ready := metav1.Condition{Type: vmopv1.VirtualMachineSnapshotReadyCondition, Status: metav1.ConditionTrue, Reason: "True"}
	if name == "broken" {
		ready.Status, ready.Reason = metav1.ConditionFalse, vmopv1.VirtualMachineSnapshotWaitingForCreationReason
		s.Status.Conditions = append(s.Status.Conditions, metav1.Condition{
			Type: vmopv1.VirtualMachineSnapshotCreatedCondition, Status: metav1.ConditionFalse, Reason: vmopv1.VirtualMachineSnapshotCreationFailedReason, Message: "the datastore is full",
		})
	}
	s.Status.Conditions = append(s.Status.Conditions, ready)
	s.Status.PowerState = map[bool]vmopv1.VirtualMachinePowerState{true: on, false: off}[memory]
	for _, c := range children {
		s.Status.Children = append(s.Status.Children, vmopv1.VirtualMachineSnapshotReference{Name: c})
	}
	return s
}

func TestGoldenOutputs(t *testing.T) {
	for file, args := range map[string]string{
		"ls.txt": "ls", "ls-wide.txt": "ls -o wide", "ls-name.txt": "ls -l app=db -o name", "ls-all.txt": "ls -A db old", "describe.txt": "describe db",
		"events.txt": "events db", "snapshots.txt": "snapshots", "help.txt": "--help", "create-help.txt": "create --help",
	} {
		w := newWorld(t, objects()...)
		golden.Compare(t, file, ages(w.must(strings.Fields(args)...)))
	}
}

func TestCreatePlan(t *testing.T) {
	w := newWorld(t, objects()...)
	key := filepath.Join(w.home, ".ssh", "id_ed25519.pub")
	line := "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGWGHn3iFfHDSyhYVeeJUWCG1tHkBc0GnLMTNVHGPBVE me@here\n"
	if err := os.MkdirAll(filepath.Dir(key), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(key, []byte(line), 0o600); err != nil {
		t.Fatal(err)
	}
	golden.Compare(t, "create.yaml", w.must("create", "box", "--image", "debian-12", "--dry-run"))
	user := filepath.Join(t.TempDir(), "user.yaml")
	if err := os.WriteFile(user, []byte("#cloud-config\npackages: [nginx]\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	golden.Compare(t, "create-all.yaml", w.must("create", "box", "--image", "tiny", "--user-data", user, "--volume", "data=db-data", "--network", "lan",
		"-l", "app=web", "--firmware", "efi", "--tpm", "--off", "--class", "guaranteed-large", "--group", "g", "--dry-run"))
}

func TestCreate(t *testing.T) {
	w := newWorld(t, objects()...)
	w.obey = func(vm *vmopv1.VirtualMachine) {
		vm.Status.PowerState = vm.Spec.PowerState
		vm.Status.Network = &vmopv1.VirtualMachineNetworkStatus{PrimaryIP4: "10.244.0.9"}
	}
	out := w.must("create", "box", "--image", "debian-12")
	for _, want := range []string{"box is running at 10.244.0.9", "atoll vm ssh box", "made an ssh key for you"} {
		if !strings.Contains(out, want) {
			t.Errorf("%q is not in:\n%s", want, out)
		}
	}
	private := filepath.Join(w.home, ".atoll", "id_ed25519")
	if st, err := os.Stat(private); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", st, err)
	}
	vm := w.machine("box")
	if k, err := publicKey(private + ".pub"); err != nil || vm.Spec.Bootstrap.CloudInit.SSHAuthorizedKeys[0] != k {
		t.Errorf("%q, %v, %+v", k, err, vm.Spec.Bootstrap.CloudInit)
	}
	// The key is kept, and user data become a Secret of the machine.
	user := filepath.Join(t.TempDir(), "u")
	if err := os.WriteFile(user, []byte("#cloud-config\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if out = w.must("create", "two", "--image", "debian-12", "--user-data", user, "--no-wait"); strings.Contains(out, "ssh key") {
		t.Error(out)
	}
	secret := &corev1.Secret{}
	if err := w.Get(t.Context(), client.ObjectKey{Namespace: "team", Name: "two-user-data"}, secret); err != nil || len(secret.OwnerReferences) != 1 {
		t.Errorf("%+v, %v", secret, err)
	}
}

func TestMistakes(t *testing.T) {
	tests := []struct {
		args, say string
		usage     bool
	}{
		{"", "", false},
		{"crate box", "did you mean create", true},
		{"create", "wants <name>", true},
		{"create box", "--image is missing", true},
		{"create Box --image tiny", `name "Box"`, true},
		{"create box --image debian", "there is no image \"debian\"; there are: debian-12, tiny", false},
		{"create box --image tiny --firmware uefi", "use bios or efi", true},
		{"create box --image tiny --label x", "write KEY=VALUE", true},
		{"create box --image tiny --user-data /nonexistent", "--user-data", false},
		{"create box --image tiny --ssh-key /nonexistent", "--ssh-key", false},
		{"create db --image tiny --no-wait", "already exists", false},
		{"ls -o xml", "use table, wide", true},
		{"ls -l a=b=c", "--selector", true},
		{"start", "wants <name...>", true},
		{"start none", "atoll vm ls -A", false},
		{"stop db --hard --soft", "exclude each other", true},
		{"suspend old", "only a running one", false},
		{"restart old", "atoll vm start old", false},
		{"console old", "atoll vm start old", false},
		{"ssh old", "atoll vm start old", false},
		{"ssh old uptime", "only after --", true},
		{"revert db none", `no snapshot "none"`, false},
		{"revert old first", "is of virtual machine db", false},
		{"resize db", "--class CLASS", true},
		{"resize db --class huge", `no class "huge"`, false},
		{"resize db --disk boot", "NAME=SIZE", true},
		{"resize db --disk other=5Gi", "it has boot", false},
	}
	for _, tt := range tests {
		w := newWorld(t, objects()...)
		out, err := w.run(strings.Fields(tt.args)...)
		if tt.say == "" {
			if err != nil {
				t.Errorf("%q: %v", tt.args, err)
			}
			continue
		}
		_, isUsage := errors.AsType[command.UsageError](err)
		if err == nil || !strings.Contains(err.Error(), tt.say) || isUsage != tt.usage {
			t.Errorf("%q: %v (usage %v) does not say %q\n%s", tt.args, err, isUsage, tt.say, out)
		}
	}
}

func TestPower(t *testing.T) {
	w := newWorld(t, objects()...)
	w.obey = func(vm *vmopv1.VirtualMachine) {
		vm.Status.PowerState = vm.Spec.PowerState
		if vm.Spec.NextRestartTime != "" {
			vm.Status.LastRestartTime = new(metav1.Now())
		}
	}
	for _, step := range []struct {
		args, say string
		power     vmopv1.VirtualMachinePowerState
	}{
		{"stop db --hard", "db is stopped", off},
		{"start db", "db is running", on},
		{"restart db", "db was restarted", on},
		{"suspend db", "db is suspended", vmopv1.VirtualMachinePowerStateSuspended},
		{"start db --no-wait", "is asked to start", on},
	} {
		if out := w.must(strings.Fields(step.args)...); !strings.Contains(out, step.say) || w.machine("db").Spec.PowerState != step.power {
			t.Errorf("%s: %s, %s", step.args, out, w.machine("db").Spec.PowerState)
		}
	}
	if vm := w.machine("db"); vm.Spec.PowerOffMode != "Hard" || vm.Spec.SuspendMode != "TrySoft" || vm.Spec.RestartMode != "TrySoft" {
		t.Errorf("%+v", vm.Spec)
	}
	w.must("delete", "db", "--no-wait")
}

// TestRestartFailed: a guest that was asked in vain is no success, and the next try may be one.
func TestRestartFailed(t *testing.T) {
	w := newWorld(t, objects()...)
	failing := true
	w.obey = func(vm *vmopv1.VirtualMachine) {
		vm.Status.PowerState = vm.Spec.PowerState
		if vm.Spec.NextRestartTime != "" {
			vm.Status.LastRestartTime = new(metav1.Now())
		}
		if vm.Spec.NextRestartTime != "" && failing {
			meta.SetStatusCondition(&vm.Status.Conditions, metav1.Condition{Type: restarted, Status: metav1.ConditionFalse, Reason: "RestartFailed", Message: "no guest agent\nanswers"})
		}
	}
	out, err := w.run("restart", "db", "--soft")
	if err == nil || !strings.Contains(err.Error(), "db was not restarted: no guest agent answers; ") || !strings.Contains(err.Error(), "`atoll vm restart db --hard`") || strings.Contains(out, "was restarted") {
		t.Errorf("%v, %s", err, out)
	}
	failing = false
	if out := w.must("restart", "db", "--hard"); !strings.Contains(out, "db was restarted") {
		t.Error(out)
	}
}

// TestStall: what is waited for in vain is named with its reason.
func TestStall(t *testing.T) {
	w := newWorld(t, objects()...)
	out, err := w.run("start", "lost", "--timeout", "600ms")
	if err == nil || !strings.Contains(err.Error(), `no image "debain-12"`) || !strings.Contains(err.Error(), "atoll vm events lost") {
		t.Errorf("%v", err)
	}
	if strings.Count(out, "lost: Waiting: VirtualMachineImageReady") != 1 {
		t.Errorf("said %q", out)
	}
}

func TestRevert(t *testing.T) {
	w := newWorld(t, objects()...)
	looks := 0
	w.obey = func(vm *vmopv1.VirtualMachine) {
		if vm.Spec.CurrentSnapshotName == "" {
			return
		}
		if looks++; looks > 1 {
			vm.Spec.CurrentSnapshotName = ""
			vm.Spec.PowerState, vm.Status.PowerState = off, off
			return
		}
		with(vmopv1.VirtualMachineSnapshotRevertSucceeded, "False", vmopv1.VirtualMachineSnapshotRevertInProgressReason, "rolling volumes back: boot")(vm)
	}
	if out := w.must("revert", "db", "first"); !strings.Contains(out, "db is as it was in first") || !strings.Contains(out, "rolling volumes back") {
		t.Error(out)
	}
}

// TestCopyHasItsOwnIdentity: what must be unique is not copied.
func TestCopyHasItsOwnIdentity(t *testing.T) {
	vm := machineOf("db", on, on)
	vm.Spec.BiosUUID, vm.Spec.InstanceUUID, vm.Spec.CurrentSnapshotName, vm.Spec.GroupName = "a", "b", "c", "d"
	vm.Spec.Network = &vmopv1.VirtualMachineNetworkSpec{HostName: "db", Interfaces: []vmopv1.VirtualMachineNetworkInterfaceSpec{{Name: "eth0", MACAddr: "02:00:00:00:00:01", Addresses: []string{"10.0.0.1/24"}}}}
	next := copyOf(vm, "two")
	if s := next.Spec; s.BiosUUID+s.InstanceUUID+s.CurrentSnapshotName+s.GroupName+s.Network.HostName+s.Network.Interfaces[0].MACAddr != "" || s.Network.Interfaces[0].Addresses != nil ||
		s.ClassName != vm.Spec.ClassName || vm.Spec.Network.HostName != "db" {
		t.Errorf("%+v", s)
	}
}

// TestExport: the image that is made for it goes again.
func TestExport(t *testing.T) {
	w := newWorld(t, objects()...)
	w.publish = true
	out := w.must("export", "db", "-f", "db.ova", "--kubeconfig", "/x")
	if !strings.Contains(w.exported, "/x team vmi-made  db.ova") {
		t.Errorf("%q, %s", w.exported, out)
	}
	if out, err := w.run("clone", "db", "old"); err == nil || !strings.Contains(err.Error(), "already") {
		t.Errorf("%v, %s", err, out)
	}
}

func TestEscape(t *testing.T) {
	var to bytes.Buffer
	over, err := copyInput(&to, strings.NewReader("ls\n\x1drest"), true)
	if !over || err != nil || to.String() != "ls\n" {
		t.Errorf("%v, %v, %q", over, err, to.String())
	}
	to.Reset()
	if over, err = copyInput(&to, strings.NewReader("a\x1db"), false); over || err != nil || to.String() != "a\x1db" {
		t.Errorf("%v, %v, %q", over, err, to.String())
	}
}

// TestEveryCommandHasHelp: a short text, an example, and names that complete.
func TestEveryCommandHasHelp(t *testing.T) {
	w := newWorld(t, objects()...)
	w.must("--help")
	for _, cmd := range w.c.command().Commands() {
		if cmd.Short == "" || !strings.Contains(cmd.Example, "atoll vm ") {
			t.Errorf("%q has no description or no example", cmd.CommandPath())
		}
		if cmd.ValidArgsFunction == nil && cmd.Name() != "create" {
			t.Errorf("%q does not complete names", cmd.CommandPath())
		}
	}
	for args, want := range map[string]string{
		"__complete stop db ": "going,lost,new,old,slow", "__complete revert db ": "broken,first,second", "__complete create x --image ": "debian-12,tiny",
		"__complete console db ": "", "__complete resize db --class ": "best-effort-small", "__complete ls -o ": "table,wide,json,yaml,name",
	} {
		w.out.Reset()
		root := &cobra.Command{Use: "atoll"}
		root.AddCommand(w.c.command())
		root.SetOut(&w.out)
		root.SetErr(&w.err)
		before, _, _ := strings.Cut(args, " ")
		root.SetArgs(append([]string{before, "vm"}, strings.Split(strings.TrimPrefix(args, before+" "), " ")...))
		if err := root.ExecuteContext(t.Context()); err != nil {
			t.Fatal(err)
		}
		got, _, _ := strings.Cut(w.out.String(), ":")
		if strings.Join(strings.Fields(got), ",") != want {
			t.Errorf("%s proposes %q, not %q", args, got, want)
		}
	}
}

// TestInRegistry: --to names the project of the machine's namespace and a tag.
func TestInRegistry(t *testing.T) {
	for to, want := range map[string]string{
		"registry.atoll.local/shop/web": "web", "registry.atoll.local/shop/a/web:1.0": "a/web:1.0",
		"registry.atoll.local/bank/web": "", "docker.io/shop/web": "", "registry.atoll.local/shop": "", "registry.atoll.local/shop/": "", "web": "",
		"registry.atoll.local/shop/web@sha256:0": "",
	} {
		if got, err := inRegistry(to, "shop", "", ""); got != want || (err == nil) != (want != "") {
			t.Errorf("%s: %q, %v", to, got, err)
		}
	}
	if _, err := inRegistry("registry.atoll.local/shop/web", "shop", "x", ""); err == nil {
		t.Error("--to and --item together")
	}
}
