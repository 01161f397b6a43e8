package kubelet

import (
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	logsapi "k8s.io/component-base/logs/api/v1"
	kubeletv1beta1 "k8s.io/kubelet/config/v1beta1"

	"atoll.dev/atoll/internal/datadir/pki"
)

// cgroups is what must be known about the host's control groups.
type cgroups struct {
	// unified says that version 2 is mounted at /sys/fs/cgroup.
	unified bool
	// systemd says that systemd runs the host and manages groups.
	systemd bool
}

// driver is the cgroup driver to use when the runtime does not say. The runtime
// wins when it does.
func (c cgroups) driver() string {
	if c.unified && c.systemd {
		return "systemd"
	}
	return "cgroupfs"
}

func detectCgroups() cgroups {
	var c cgroups
	var fs unix.Statfs_t
	if err := unix.Statfs("/sys/fs/cgroup", &fs); err == nil {
		c.unified = fs.Type == unix.CGROUP2_SUPER_MAGIC
	}
	if comm, err := os.ReadFile("/proc/1/comm"); err == nil {
		c.systemd = strings.TrimSpace(string(comm)) == "systemd"
	}
	return c
}

// configuration is the kubelet's configuration; what is not set has upstream's
// default.
func configuration(cfg Config, groups cgroups, limits hostLimits) *kubeletv1beta1.KubeletConfiguration {
	no, yes := false, true
	f := cfg.Files
	healthPort := int32(cfg.HealthPort)
	eventQPS, apiQPS := int32(100), int32(200)
	resolvConf := cfg.ResolvConf
	kc := &kubeletv1beta1.KubeletConfiguration{
		TypeMeta:                 metav1.TypeMeta{APIVersion: kubeletv1beta1.SchemeGroupVersion.String(), Kind: "KubeletConfiguration"},
		ContainerRuntimeEndpoint: "unix://" + cfg.Socket,
		ImageServiceEndpoint:     "unix://" + cfg.ImageSocket,
		PodLogsDir:               cfg.PodLogsDir,
		// An event when a pod stands still since the datastore of its volume is full.
		FeatureGates: map[string]bool{"CSIVolumeHealth": true},

		// Who may talk to the kubelet, and as whom it talks.
		Address:                 "0.0.0.0",
		Port:                    int32(cfg.Port),
		ReadOnlyPort:            0,
		HealthzBindAddress:      "127.0.0.1",
		HealthzPort:             &healthPort,
		TLSCertFile:             f.Cert(pki.KubeletServing),
		TLSPrivateKeyFile:       f.Key(pki.KubeletServing),
		TLSMinVersion:           "VersionTLS12",
		RotateCertificates:      true,
		EnableServer:            &yes,
		EnableSystemLogHandler:  &no,
		EnableProfilingHandler:  &no,
		EnableDebugFlagsHandler: &no,
		Authentication: kubeletv1beta1.KubeletAuthentication{
			X509:      kubeletv1beta1.KubeletX509Authentication{ClientCAFile: f.CACert(pki.ClusterCA)},
			Webhook:   kubeletv1beta1.KubeletWebhookAuthentication{Enabled: &yes},
			Anonymous: kubeletv1beta1.KubeletAnonymousAuthentication{Enabled: &no},
		},
		Authorization: kubeletv1beta1.KubeletAuthorization{Mode: kubeletv1beta1.KubeletAuthorizationModeWebhook},

		// Control groups. Version 1 is deprecated upstream but works.
		CgroupDriver: groups.driver(),
		CgroupRoot:   cfg.CgroupRoot,
		FailCgroupV1: &no,
		FailSwapOn:   &no,
		MaxPods:      int32(cfg.MaxPods),
		PodPidsLimit: new(int64(-1)),
		// What the control plane, the agent and containerd need.
		KubeReserved: map[string]string{"cpu": "100m", "memory": "700Mi"},

		// Names.
		ClusterDNS:     []string{cfg.DNSServiceIP.String()},
		ClusterDomain:  cfg.Domain,
		ResolverConfig: &resolvConf,
		// The proxy uses nftables; these chains would only be left behind.
		MakeIPTablesUtilChains: &no,

		// Pods start and stop in bursts of hundreds.
		KubeAPIQPS:                &apiQPS,
		KubeAPIBurst:              2 * apiQPS,
		EventRecordQPS:            &eventQPS,
		EventBurst:                2 * eventQPS,
		RegisterNode:              &yes,
		NodeStatusUpdateFrequency: metav1.Duration{Duration: 10 * time.Second},
		// A container that waits for its restart shows CrashLoopBackOff only once its
		// pod is synced a second time, which upstream's minute may put off to the
		// fifth crash.
		SyncFrequency: metav1.Duration{Duration: 30 * time.Second},
		Logging:       logsapi.LoggingConfiguration{Format: "text"},
	}
	keepImages(kc)
	if limits.openFiles < upstreamOpenFiles {
		kc.MaxOpenFiles = int64(limits.openFiles)
	}
	return kc
}

// keepImages sets when images are removed: they may have been loaded by hand and be nowhere to pull from, so only
// when the disk is nearly full.
func keepImages(kc *kubeletv1beta1.KubeletConfiguration) {
	high, low, pulls, serialize := int32(95), int32(90), int32(4), false
	kc.ImageGCHighThresholdPercent, kc.ImageGCLowThresholdPercent = &high, &low
	kc.SerializeImagePulls, kc.MaxParallelImagePulls = &serialize, &pulls
	kc.EvictionHard = map[string]string{
		"memory.available":   "100Mi",
		"nodefs.available":   "3%",
		"nodefs.inodesFree":  "3%",
		"imagefs.available":  "3%",
		"imagefs.inodesFree": "3%",
	}
}

// upstreamOpenFiles is how many open files the kubelet asks for by default.
const upstreamOpenFiles = 1000000

// hostLimits is what the process may not exceed.
type hostLimits struct {
	openFiles uint64
}

// detectLimits reads the limit that can only be raised with CAP_SYS_RESOURCE.
func detectLimits() hostLimits {
	var r unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &r); err != nil {
		return hostLimits{openFiles: upstreamOpenFiles}
	}
	return hostLimits{openFiles: r.Max}
}
