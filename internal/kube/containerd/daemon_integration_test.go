//go:build integration

package containerd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	client "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	machinev1 "atoll.dev/atoll/api/machine/v1"
	"atoll.dev/atoll/internal/datadir/handover"
	"atoll.dev/atoll/internal/kube/containerd/images"
	"atoll.dev/atoll/internal/storage/layers"
)

// cniScript is a CNI plugin that makes a dummy of an interface: enough for a
// pod to get an address.
const cniScript = `#!/bin/sh
case "$CNI_COMMAND" in
ADD) echo '{"cniVersion":"1.0.0","interfaces":[{"name":"eth0","sandbox":"'$CNI_NETNS'"}],"ips":[{"address":"10.9.0.2/24","interface":0}]}' ;;
VERSION) echo '{"cniVersion":"1.0.0","supportedVersions":["0.4.0","1.0.0"]}' ;;
esac
`

const cniConf = `{"cniVersion":"1.0.0","name":"test","plugins":[{"type":"dummy-script"}]}`

// TestDaemon runs one containerd in this process, the only one it can run, and
// all that is to be checked against it. It needs root, runc and busybox.
func TestDaemon(t *testing.T) {
	dir, err := os.MkdirTemp("/tmp", "atoll-ctd") //nolint:usetesting // sockets live below it: their paths must stay short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	c := Config{
		ConfigFile: dir + "/containerd/config.toml", Root: dir + "/containerd", State: dir + "/run/containerd",
		Address: dir + "/run/containerd.sock", SocketDir: dir + "/run/s", BinDir: dir + "/bin",
		CNIBinDir: dir + "/bin/cni", CNIConfDir: dir + "/cni", RegistryDir: dir + "/registries",
		PauseArchive: dir + "/pause.tar", RestrictOOMScore: true,
	}
	write := func(path, text string, mode os.FileMode) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
	}
	write(c.CNIBinDir+"/dummy-script", cniScript, 0o755)
	write(c.CNIConfDir+"/10-test.conflist", cniConf, 0o644)
	build := exec.Command("go", "build", "-o", c.BinDir+"/"+shimRunc, "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("building the runc shim: %v\n%s", err, out)
	}
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Fatal(err)
	}
	base := layerTar(t, map[string]string{"bin/busybox": string(busybox)}, map[string]string{"bin/sh": "busybox", "bin/sleep": "busybox"})
	writeArchive(t, c.PauseArchive, testImage{Names: []string{PauseImage}, Layers: [][]byte{base}, Entrypoint: []string{"/bin/sleep", "1000000"}})

	var logs syncBuffer
	logger := slog.New(slog.NewTextHandler(&logs, nil))
	d, err := New(c, logger)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- d.Run(ctx) }()
	defer func() {
		if t.Failed() {
			t.Log(logs.String())
		}
	}()
	select {
	case <-d.Ready():
	case err := <-done:
		t.Fatalf("daemon ended: %v", err)
	case <-time.After(5 * time.Minute):
		t.Fatal("daemon is not ready")
	}
	b := &daemonBench{dir: dir, config: c, base: base}
	b.connect(t)

	t.Run("sockets", func(t *testing.T) {
		for _, s := range []string{c.Address, c.ttrpcAddress()} {
			st, err := os.Stat(s)
			if err != nil || st.Mode().Perm() != 0o600 {
				t.Errorf("%s: %v %v, want mode 0600", s, st.Mode(), err)
			}
		}
	})
	t.Run("pause image", func(t *testing.T) {
		i, err := b.images.Status(t.Context(), PauseImage)
		if err != nil || !i.Pinned {
			t.Errorf("got %+v, %v; want a pinned image", i, err)
		}
	})
	t.Run("image of virtual machines", func(t *testing.T) { b.owned(t, machinev1.Image, true) })
	t.Run("load", b.testLoad)
	t.Run("bad archives", b.testBadArchives)
	t.Run("pull", b.testPull)
	t.Run("runc pod", b.testRuncPod)
	t.Run("atoll snapshot", b.testAtollSnapshot)

	stop()
	if err := <-done; err != nil {
		t.Errorf("Run returned %v", err)
	}
}

// A daemonBench holds what the subtests share.
type daemonBench struct {
	dir    string
	config Config
	base   []byte // a layer with busybox
	images *images.Client
	client *client.Client
	cri    cri.RuntimeServiceClient
}

func (b *daemonBench) connect(t *testing.T) {
	var err error
	if b.images, err = images.New(images.Config{Address: b.config.Address}); err != nil {
		t.Fatal(err)
	}
	if b.client, err = client.New(b.config.Address); err != nil {
		t.Fatal(err)
	}
	b.cri = cri.NewRuntimeServiceClient(b.client.Conn().(*grpc.ClientConn))
	t.Cleanup(func() { b.images.Close(); b.client.Close() })
}

func (b *daemonBench) load(t *testing.T, img testImage) []string {
	t.Helper()
	path := b.dir + "/image.tar"
	writeArchive(t, path, img)
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	stages := map[string]bool{}
	names, err := b.images.Load(t.Context(), f, images.LoadOptions{Source: path, Progress: func(p images.Progress) { stages[p.Stage] = true }})
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []string{"reading", "unpacking", "merging", "done"} {
		if !stages[s] {
			t.Errorf("no progress report of stage %q", s)
		}
	}
	return names
}

func (b *daemonBench) testImage(t *testing.T, name string) testImage {
	return testImage{Names: []string{name}, Layers: [][]byte{
		b.base,
		layerTar(t, map[string]string{
			"etc/passwd": "root:x:0:0:root:/root:/bin/sh\nweb:x:1234:4321:web:/srv:/bin/sh\n",
			"etc/group":  "root:x:0:\nweb:x:4321:\nextra:x:99:web\n", "file": "old",
		}, nil),
		layerTar(t, map[string]string{"file": "new", ".wh.gone": ""}, nil),
	}, Entrypoint: []string{"/bin/sh", "-c", "cat /file; id; sleep 1000000"}}
}

func (b *daemonBench) testLoad(t *testing.T) {
	names := b.load(t, b.testImage(t, "example.com/team/app:v1"))
	if len(names) != 2 {
		t.Errorf("got names %q, want a tag and a digest", names)
	}
	for _, n := range append(names, "example.com/team/app:v1") {
		if _, err := b.images.Status(t.Context(), n); err != nil {
			t.Errorf("image by name %s: %v", n, err)
		}
	}
	b.owned(t, "example.com/team/app:v1", true)
	b.owned(t, names[1], true)
	list, err := b.images.List(t.Context())
	if err != nil || len(list) != 3 { // two come with Atoll
		t.Fatalf("got %v, %v; want three images", list, err)
	}
	if err := b.images.Remove(t.Context(), names[1]); err != nil {
		t.Fatal(err)
	}
	if _, err := b.images.Status(t.Context(), names[0]); err == nil {
		t.Error("the image is there after its removal")
	}
}

// owned checks whose image a name is, the administrator's or not.
func (b *daemonBench) owned(t *testing.T, name string, want bool) {
	t.Helper()
	i, err := b.images.Status(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	ref, err := b.images.Owned(t.Context(), name, i.ID)
	if err != nil || want != (ref != "") || want && !slices.Contains(i.Names, ref) {
		t.Errorf("the administrator's name for %s, which has the names %q, is %q, %v; want one: %v", name, i.Names, ref, err, want)
	}
	ids, err := b.images.OwnedIDs(t.Context())
	if err != nil || want && !ids[i.ID] {
		t.Errorf("the administrator's images are %v, %v, without %s, %s", ids, err, name, i.ID)
	}
}

func (b *daemonBench) testBadArchives(t *testing.T) {
	arm := b.testImage(t, "example.com/arm:1")
	arm.Architecture = "arm64"
	writeArchive(t, b.dir+"/arm.tar", arm)
	corrupt := b.testImage(t, "example.com/corrupt:1")
	corrupt.Layers[1] = bytes.Repeat([]byte("this is no tar "), 1000)
	writeArchive(t, b.dir+"/corrupt.tar", corrupt)
	writeArchive(t, b.dir+"/noname.tar", testImage{Names: []string{""}, Layers: [][]byte{b.base}})
	whole, err := os.ReadFile(b.dir + "/arm.tar")
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ name, file, want string }{
		{"another architecture", b.dir + "/arm.tar", "linux/arm64"},
		{"corrupt layer", b.dir + "/corrupt.tar", "invalid layer"},
		{"no name", b.dir + "/noname.tar", "has no name"},
		{"no archive", "/etc/passwd", ""},
		{"cut short", "", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.file == "" {
				tt.file = b.dir + "/short.tar"
				if err := os.WriteFile(tt.file, whole[:len(whole)/2], 0o644); err != nil {
					t.Fatal(err)
				}
			}
			f, err := os.Open(tt.file)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			_, err = b.images.Load(t.Context(), f, images.LoadOptions{Source: tt.file})
			if err == nil || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), tt.file) {
				t.Errorf("got %v, want an error that names the file and %q", err, tt.want)
			}
			t.Log(err)
		})
	}
}

func (b *daemonBench) testRuncPod(t *testing.T) {
	ctx := t.Context()
	b.load(t, b.testImage(t, "example.com/app:run"))
	t.Cleanup(func() { // what the kubelet does for a pod's cgroup
		for _, pattern := range []string{"/sys/fs/cgroup/atoll-test", "/sys/fs/cgroup/*/atoll-test"} {
			dirs, _ := filepath.Glob(pattern)
			for _, dir := range dirs {
				err := os.Remove(dir)
				for end := time.Now().Add(5 * time.Minute); errors.Is(err, unix.EBUSY) && time.Now().Before(end); err = os.Remove(dir) {
					time.Sleep(100 * time.Millisecond) // what was killed is on its way out
				}
				if err != nil {
					t.Errorf("the pod left something in its cgroup: %v", err)
				}
			}
		}
	})
	sandbox := &cri.PodSandboxConfig{
		Metadata: &cri.PodSandboxMetadata{Name: "p", Namespace: "default", Uid: "u", Attempt: 0}, LogDirectory: b.dir + "/logs",
		Linux: &cri.LinuxPodSandboxConfig{CgroupParent: "/atoll-test"},
	}
	pod, err := b.cri.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: sandbox, RuntimeHandler: RuntimeRunc})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		ctx := context.WithoutCancel(ctx)
		if _, err := b.cri.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: pod.PodSandboxId}); err != nil {
			t.Error(err)
		}
		if _, err := b.cri.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: pod.PodSandboxId}); err != nil {
			t.Error(err)
		}
	}()
	ctr, err := b.cri.CreateContainer(ctx, &cri.CreateContainerRequest{PodSandboxId: pod.PodSandboxId, SandboxConfig: sandbox, Config: &cri.ContainerConfig{
		Metadata: &cri.ContainerMetadata{Name: "c"}, Image: &cri.ImageSpec{Image: "example.com/app:run"}, LogPath: "c.log",
		Linux: &cri.LinuxContainerConfig{SecurityContext: &cri.LinuxContainerSecurityContext{RunAsUsername: "web"}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.cri.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: ctr.ContainerId}); err != nil {
		t.Fatal(err)
	}
	for start := time.Now(); ; {
		out, _ := os.ReadFile(b.dir + "/logs/c.log")
		if strings.Contains(string(out), "new") && strings.Contains(string(out), "uid=1234(web) gid=4321(web) groups=99(extra)") {
			break
		}
		if time.Since(start) > 5*time.Minute {
			t.Fatalf("log is %q", out)
		}
		time.Sleep(20 * time.Millisecond)
	}
	r, err := b.cri.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: ctr.ContainerId, Cmd: []string{"/bin/sh", "-c", "echo hi; exit 3"}, Timeout: 120})
	if err != nil || string(r.Stdout) != "hi\n" || r.ExitCode != 3 {
		t.Errorf("exec: %v %v", r, err)
	}
}

// testAtollSnapshot makes the snapshot of a container as CreateContainer does
// and looks up a user in it as it does.
func (b *daemonBench) testAtollSnapshot(t *testing.T) {
	ctx, done, err := b.client.WithLease(namespaces.WithNamespace(t.Context(), Namespace)) // or the collector takes the snapshot
	if err != nil {
		t.Fatal(err)
	}
	defer done(context.WithoutCancel(ctx))
	b.load(t, b.testImage(t, "example.com/app:snap"))
	img, err := b.client.GetImage(ctx, "example.com/app:snap")
	if err != nil {
		t.Fatal(err)
	}
	spec, c, err := createAsCRI(ctx, b.client, img, "web")
	if err != nil {
		t.Fatal(err)
	}
	defer b.client.ContainerService().Delete(ctx, c.ID)
	if got := fmt.Sprint(spec.Process.User.UID, spec.Process.User.GID, spec.Process.User.AdditionalGids); got != "1234 4321 [4321 99]" {
		t.Errorf("user web is %s", got)
	}
	sn := b.client.SnapshotService(layers.Name)
	mounts, err := sn.Mounts(ctx, c.SnapshotKey)
	if err != nil {
		t.Fatal(err)
	}
	image := handover.ImagePath(mounts[0].Options)
	if len(mounts) != 1 || mounts[0].Type != "bind" || !strings.HasSuffix(image, "/image.erofs") {
		t.Errorf("got mounts %v", mounts)
	}
	usage := handover.LayerUsage(mounts[0].Source)
	if err := os.WriteFile(usage, []byte(`{"bytes":4096,"inodes":3}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if u, err := sn.Usage(ctx, c.SnapshotKey); err != nil || u.Size != 4096 || u.Inodes != 3 {
		t.Errorf("got usage %v, %v", u, err)
	}
	if err := sn.Remove(ctx, c.SnapshotKey); err != nil {
		t.Error(err)
	}
}
