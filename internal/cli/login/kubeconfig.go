package login

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"

	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"atoll.dev/atoll/internal/datadir/atomicfile"
	"atoll.dev/atoll/internal/identity"
)

const (
	userPrefix    = "atoll:"
	cacheFlag     = "--cache"
	execVersion   = "client.authentication.k8s.io/v1"
	kubeconfigVar = "KUBECONFIG"
)

// entry is what a login writes into a kubeconfig.
type entry struct {
	login cached
	file  string // of the cache
	// apiServer is its URL, ca the PEM of its authority.
	apiServer, ca string
	namespaces    []identity.Access
	// executable is this program.
	executable string
}

// names of cluster, user and server context.
func (e entry) names() (cluster, user string) {
	host, _, err := net.SplitHostPort(e.login.Server)
	if err != nil {
		host = e.login.Server
	}
	return host, userPrefix + e.login.Server + ":" + e.login.User
}

// merge puts a login into a kubeconfig: a cluster, a user, a context of the server and one per namespace. Contexts of
// earlier logins of the same user there that are not right any more go; what is not ours stays. It returns the names
// of the contexts, that of the server first.
func merge(config *clientcmdapi.Config, e entry) []string {
	cluster, user := e.names()
	to := clientcmdapi.NewCluster()
	to.Server = e.apiServer
	if e.login.Trust.Insecure {
		to.InsecureSkipTLSVerify = true
	} else {
		to.CertificateAuthorityData = []byte(e.ca)
	}
	config.Clusters[cluster] = to
	who := clientcmdapi.NewAuthInfo()
	who.Exec = &clientcmdapi.ExecConfig{
		APIVersion: execVersion, Command: e.executable, Args: []string{"login", "credential", cacheFlag, e.file},
		InteractiveMode: clientcmdapi.NeverExecInteractiveMode,
		InstallHint:     "log in with: atoll login --server " + e.login.Server,
	}
	config.AuthInfos[user] = who
	for name, c := range config.Contexts {
		if c.Cluster == cluster && c.AuthInfo == user {
			delete(config.Contexts, name)
		}
	}
	add := func(name, namespace string) string {
		if have := config.Contexts[name]; have != nil && (have.Cluster != cluster || !isOurs(have.AuthInfo)) {
			name += "-" + cluster // somebody else's
		}
		c := clientcmdapi.NewContext()
		c.Cluster, c.AuthInfo, c.Namespace = cluster, user, namespace
		config.Contexts[name] = c
		return name
	}
	out := []string{add(cluster, "")}
	for _, n := range e.namespaces {
		out = append(out, add(n.Namespace, n.Namespace))
	}
	if config.CurrentContext = out[0]; len(out) == 2 {
		config.CurrentContext = out[1]
	}
	return out
}

func isOurs(user string) bool {
	return len(user) > len(userPrefix) && user[:len(userPrefix)] == userPrefix
}

// remove takes a login out of a kubeconfig.
func remove(config *clientcmdapi.Config, l cached) {
	cluster, user := entry{login: l}.names()
	for name, c := range config.Contexts {
		if c.AuthInfo == user {
			delete(config.Contexts, name)
			if config.CurrentContext == name {
				config.CurrentContext = ""
			}
		}
	}
	delete(config.AuthInfos, user)
	for _, c := range config.Contexts {
		if c.Cluster == cluster {
			return
		}
	}
	delete(config.Clusters, cluster)
}

// cacheOf is the file of the login that a user of a kubeconfig has, "" if it is none of ours.
func cacheOf(config *clientcmdapi.Config, context string) string {
	c := config.Contexts[context]
	if c == nil {
		return ""
	}
	who := config.AuthInfos[c.AuthInfo]
	if who == nil || who.Exec == nil || !isOurs(c.AuthInfo) {
		return ""
	}
	if i := slices.Index(who.Exec.Args, cacheFlag); i >= 0 && i+1 < len(who.Exec.Args) {
		return who.Exec.Args[i+1]
	}
	return ""
}

// kubeconfigFile is the one that is written: that of the flag, the first of KUBECONFIG, or ~/.kube/config.
func (c *commands) kubeconfigFile(flag string) (string, error) {
	file := flag
	if file == "" {
		if list := filepath.SplitList(c.Getenv(kubeconfigVar)); len(list) > 0 && list[0] != "" {
			file = list[0]
		}
	}
	if file == "" {
		if c.Home == "" {
			return "", errors.New("there is no home directory; say where the kubeconfig goes with --kubeconfig")
		}
		file = filepath.Join(c.Home, ".kube", "config")
	}
	if to, err := filepath.EvalSymlinks(file); err == nil {
		file = to // a link stays one
	}
	return filepath.Abs(file)
}

// readKubeconfig reads one, or makes an empty one.
func readKubeconfig(file string) (*clientcmdapi.Config, error) {
	config, err := clientcmd.LoadFromFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return clientcmdapi.NewConfig(), nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading the kubeconfig: %w; choose another one with --kubeconfig", err)
	}
	return config, nil
}

// changeKubeconfig changes one while nobody else does it, and writes it for its owner only.
func changeKubeconfig(file string, change func(*clientcmdapi.Config)) error {
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		return fmt.Errorf("writing the kubeconfig: %w", err)
	}
	unlock, err := lockKubeconfig(file)
	if err != nil {
		return err
	}
	defer unlock()
	config, err := readKubeconfig(file)
	if err != nil {
		return err
	}
	change(config)
	text, err := clientcmd.Write(*config)
	if err != nil {
		return fmt.Errorf("encoding the kubeconfig: %w", err)
	}
	if err := atomicfile.Write(file, text, 0o600); err != nil {
		return fmt.Errorf("writing the kubeconfig: %w", err)
	}
	return nil
}

// lockKubeconfig makes the lock file that kubectl makes, too.
func lockKubeconfig(file string) (unlock func(), err error) {
	lock, err := os.OpenFile(file+".lock", os.O_CREATE|os.O_EXCL, 0)
	if errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("%s.lock exists: another program changes the kubeconfig; try again, or remove the file when there is none", file)
	}
	if err != nil {
		return nil, fmt.Errorf("locking the kubeconfig: %w", err)
	}
	_ = lock.Close()
	return func() { _ = os.Remove(file + ".lock") }, nil
}
