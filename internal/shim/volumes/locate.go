package volumes

import (
	"fmt"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"atoll.dev/atoll/internal/guest/channel"
	"atoll.dev/atoll/internal/shim/spec"
)

// Kind says what a bind source is.
type Kind int

// The kinds of bind sources.
const (
	KindEmptyDir Kind = iota
	KindPushed
	KindImage          // volume that the image declares
	KindHosts          // the pod's /etc/hosts, written by the kubelet
	KindTerminationLog // file for a container's termination message
	KindDisk           // persistent volume
)

// Roots are the directories in which bind sources may be.
type Roots struct {
	Kubelet    string // the kubelet's root directory
	Containerd string // containerd's root directory
	Mountinfo  string // of this process, "" for /proc/self/mountinfo
}

// Location is what a bind source is.
type Location struct {
	Kind Kind
	ID   string // of the volume in the guest; of a persistent one its name
	Host string // the volume's directory, or the file
	Sub  string // below the volume's directory, "" for all of it
}

// pushedPlugins are the kubelet's volume plugins whose content is written by the kubelet only.
func pushed(plugin string) bool {
	switch plugin {
	case "kubernetes.io~configmap", "kubernetes.io~secret", "kubernetes.io~projected", "kubernetes.io~downward-api":
		return true
	}
	return false
}

// Locate finds out what a bind source is.
func (r Roots) Locate(source string) (Location, error) {
	if filepath.Clean(source) != source || !filepath.IsAbs(source) {
		return Location{}, fmt.Errorf("%w: source %q", spec.ErrUnsupported, source)
	}
	if rest, ok := below(r.Kubelet, source); ok {
		return r.kubelet(source, rest)
	}
	if rest, ok := below(r.Containerd, source); ok {
		return containerd(source, rest)
	}
	return Location{}, hostPath(source)
}

// below returns the elements of a path under root.
func below(root, p string) ([]string, bool) {
	rest, ok := strings.CutPrefix(p, strings.TrimSuffix(root, "/")+"/")
	if root == "" || !ok {
		return nil, false
	}
	return strings.Split(rest, "/"), true
}

func hostPath(source string) error {
	// The CRI plugin mounts an image that is a volume in a directory of this name.
	if strings.Contains(source, "/image-volumes/") {
		return fmt.Errorf("%w: an image as a volume; %s, or copy its files in an init container", spec.ErrUnsupported, spec.Instead)
	}
	return fmt.Errorf("%w: path %q of the host; %s, or an emptyDir, configMap, secret or projected volume",
		spec.ErrUnsupported, source, spec.Instead)
}

// kubelet knows the layout of the kubelet's directory of pods:
//
//	pods/<uid>/etc-hosts
//	pods/<uid>/containers/<name>/<file>            termination log
//	pods/<uid>/volumes/<plugin>/<name>
//	pods/<uid>/volumes/kubernetes.io~csi/<name>/mount
//	pods/<uid>/volume-subpaths/<name>/<container>/<index>
func (r Roots) kubelet(source string, rest []string) (Location, error) {
	if len(rest) < 3 || rest[0] != "pods" {
		return Location{}, hostPath(source)
	}
	switch what := rest[2:]; {
	case len(what) == 1 && what[0] == "etc-hosts":
		return Location{Kind: KindHosts, Host: source}, nil
	case len(what) == 3 && what[0] == "containers":
		return Location{Kind: KindTerminationLog, Host: source}, nil
	case len(what) >= 3 && what[0] == "volumes":
		return r.volume(rest)
	case len(what) == 4 && what[0] == "volume-subpaths":
		return r.subPath(source, filepath.Join(r.Kubelet, rest[0], rest[1], "volumes"))
	}
	return Location{}, hostPath(source)
}

// volume takes a path in the kubelet's directory of a pod's volumes apart.
func (r Roots) volume(rest []string) (Location, error) {
	plugin, name := rest[3], rest[4]
	loc := Location{
		ID:   "v-" + name,
		Host: filepath.Join(append([]string{r.Kubelet}, rest[:5]...)...),
		Sub:  filepath.Join(rest[5:]...),
	}
	switch {
	case plugin == "kubernetes.io~empty-dir":
		loc.Kind = KindEmptyDir
	case pushed(plugin):
		loc.Kind = KindPushed
	case plugin == "kubernetes.io~csi" && len(rest) >= 6 && rest[5] == "mount":
		return Location{Kind: KindDisk, ID: name, Host: filepath.Join(loc.Host, "mount"), Sub: filepath.Join(rest[6:]...)}, nil
	default:
		return Location{}, fmt.Errorf("%w: volume %q of kind %s; only emptyDir, configMap, secret, projected, downwardAPI and persistent volumes of Atoll are; else %s",
			spec.ErrUnsupported, name, strings.Replace(plugin, "~", "/", 1), spec.Instead)
	}
	if !channel.ValidID(loc.ID) {
		return Location{}, fmt.Errorf("volume name %q is not valid", name)
	}
	return loc, nil
}

// subPath finds the volume behind a bind mount that the kubelet made for a subPath, by what is mounted
// there: the mount's root, seen through another mount of the same file system, is a path in the
// volume.
func (r Roots) subPath(source, volumes string) (Location, error) {
	table, err := readMounts(r.Mountinfo)
	if err != nil {
		return Location{}, err
	}
	candidates, err := table.origins(source)
	if err != nil {
		return Location{}, fmt.Errorf("resolving subPath: %w", err)
	}
	for _, c := range candidates {
		if rest, ok := below(volumes, c); ok && len(rest) >= 2 {
			all, _ := below(r.Kubelet, c)
			return r.volume(all)
		}
	}
	return Location{}, fmt.Errorf("%w: subPath of a volume that is not in the pod's directory; %s", spec.ErrUnsupported, spec.Instead)
}

// containerd knows where volumes that an image declares are: <state of the CRI plugin>/containers/<id>/volumes/<volume id>.
func containerd(source string, rest []string) (Location, error) {
	n := len(rest)
	if n >= 5 && rest[n-4] == "containers" && rest[n-2] == "volumes" {
		loc := Location{Kind: KindImage, ID: "i-" + rest[n-1], Host: source}
		if channel.ValidID(loc.ID) {
			return loc, nil
		}
	}
	return Location{}, hostPath(source)
}

// medium is where an emptyDir is on the host.
type medium struct {
	memory bool
	size   uint64 // of a memory volume in bytes
}

// mediumOf looks at the file system of an emptyDir: the kubelet mounts a tmpfs for medium Memory.
func mediumOf(dir string) (medium, error) {
	var st, parent unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return medium{}, fmt.Errorf("reading file system of %s: %w", dir, err)
	}
	if st.Type == unix.HUGETLBFS_MAGIC {
		return medium{}, fmt.Errorf("%w: emptyDir of huge pages; %s", spec.ErrUnsupported, spec.Instead)
	}
	if st.Type != unix.TMPFS_MAGIC {
		return medium{}, nil
	}
	if err := unix.Statfs(filepath.Dir(dir), &parent); err != nil {
		return medium{}, fmt.Errorf("reading file system of %s: %w", dir, err)
	}
	if parent.Fsid == st.Fsid {
		return medium{}, nil // the kubelet's whole directory is on a tmpfs
	}
	return medium{memory: true, size: st.Blocks * uint64(st.Bsize)}, nil
}
