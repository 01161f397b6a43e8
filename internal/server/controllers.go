package server

import (
	"context"
	"net"
	"net/netip"
	"strconv"

	ctrl "sigs.k8s.io/controller-runtime"

	"atoll.dev/atoll/internal/controllers/contentlibrary"
	"atoll.dev/atoll/internal/controllers/image"
	"atoll.dev/atoll/internal/controllers/importrequest"
	"atoll.dev/atoll/internal/controllers/manager"
	"atoll.dev/atoll/internal/controllers/projectlibrary"
	"atoll.dev/atoll/internal/controllers/registryaccess"
	"atoll.dev/atoll/internal/controllers/resourcepolicy"
	"atoll.dev/atoll/internal/controllers/robotaccount"
	"atoll.dev/atoll/internal/controllers/supervisornamespace"
	"atoll.dev/atoll/internal/controllers/supervisornamespace/expand"
	"atoll.dev/atoll/internal/controllers/virtualmachine"
	"atoll.dev/atoll/internal/controllers/virtualmachine/admission"
	"atoll.dev/atoll/internal/controllers/virtualmachine/seed"
	"atoll.dev/atoll/internal/controllers/virtualmachineclass"
	"atoll.dev/atoll/internal/controllers/vmconsole"
	"atoll.dev/atoll/internal/controllers/vmgroup"
	"atoll.dev/atoll/internal/controllers/vmgrouppublish"
	"atoll.dev/atoll/internal/controllers/vmnetwork"
	"atoll.dev/atoll/internal/controllers/vmpublish"
	"atoll.dev/atoll/internal/controllers/vmreplicaset"
	"atoll.dev/atoll/internal/controllers/vmservice"
	"atoll.dev/atoll/internal/controllers/vmsnapshot"
	"atoll.dev/atoll/internal/datadir/pki"
)

// registryHost is the portable name of the registry.
const registryHost = "registry.atoll.local"

// controllers are all that run in the manager. Each adds itself.
func (s *Server) controllers() []manager.Setup {
	return []manager.Setup{
		admission.Setup,
		s.virtualMachines,
		virtualmachineclass.Setup(virtualmachine.ClassInstancesInUse),
		resourcepolicy.Setup,
		vmservice.Setup(s.cfg.Ports.Portal, s.cfg.Network.LoadBalancers),
		vmreplicaset.Setup,
		vmnetwork.Setup,
		vmgroup.Setup,
		vmgrouppublish.Setup,
		vmpublish.Setup(s.images.Tagged),
		vmsnapshot.Setup,
		vmconsole.Setup(net.JoinHostPort(s.cfg.NodeIP.String(), strconv.Itoa(s.cfg.Ports.API))),
		image.Setup, contentlibrary.Setup, importrequest.Setup,
		projectlibrary.Setup(projects{s.images.Registry}, &s.images.changes),
		supervisornamespace.Setup(s.namespaces()),
		robotaccount.Setup(registryHost, s.registryAddress()), registryaccess.Setup,
	}
}

// namespaces is the configuration of the controller of SupervisorNamespaces.
func (s *Server) namespaces() supervisornamespace.Config {
	n := s.cfg.Network
	return supervisornamespace.Config{
		Kubeconfig: s.files.Kubeconfig(pki.NamespaceController),
		User:       pki.NamespaceControllerUser,
		Network: expand.Network{
			PodCIDR: n.PodCIDR, ServiceCIDR: n.ServiceCIDR,
			DNS: []netip.Addr{n.DNSServiceIP, n.DNSEndpoint}, DNSPort: n.DNSPort,
		},
		EndpointURL:  apiURL(s.cfg.NodeIP.String(), s.cfg.Ports.API),
		RegistryHost: registryHost,
		Registry:     s.images,
	}
}

// virtualMachines adds the controller of VirtualMachines with what other controllers do for it.
func (s *Server) virtualMachines(mgr ctrl.Manager) error {
	return seed.Setup(virtualmachine.Hooks{Snapshots: vmsnapshot.NewReverter(mgr)})(mgr)
}

// controllersRunner runs the controllers and webhooks of virtual machines. It closes ready when they answer.
func (s *Server) controllersRunner(ready chan<- struct{}) func(context.Context) error {
	return func(ctx context.Context) error {
		return s.runControllers(ctx, func() { close(ready) })
	}
}

func (s *Server) runControllers(ctx context.Context, ready func()) error {
	return manager.Run(ctx, manager.Config{
		Kubeconfig:  s.files.Kubeconfig(pki.VMController),
		WebhookPort: s.cfg.Ports.Webhook,
		CertFile:    s.files.Cert(pki.VMWebhook),
		KeyFile:     s.files.Key(pki.VMWebhook),
		Setups:      s.controllers(),
		Ready:       ready,
		Logger:      s.cfg.Logger,
	})
}
