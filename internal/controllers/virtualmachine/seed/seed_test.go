package seed

import (
	"strings"
	"testing"

	vmopv1 "github.com/vmware-tanzu/vm-operator/api/v1alpha5"
	"github.com/vmware-tanzu/vm-operator/api/v1alpha5/common"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"

	"atoll.dev/atoll/internal/controllers/virtualmachine"
)

func TestRender(t *testing.T) {
	meta := func(name string) metav1.ObjectMeta { return metav1.ObjectMeta{Namespace: "ns", Name: name} }
	renderer := Renderer{Reader: fake.NewClientBuilder().WithObjects(
		&corev1.Secret{ObjectMeta: meta("secret"), Data: map[string][]byte{"user-data": []byte("#!/bin/sh\necho secret\n")}},
		&corev1.ConfigMap{ObjectMeta: meta("config"), Data: map[string]string{"user-data": "#!/bin/sh\necho config\n"}},
	).Build()}
	render := func(name string) (*virtualmachine.Seed, error) {
		vm := &vmopv1.VirtualMachine{ObjectMeta: meta("vm")}
		vm.Spec.Bootstrap = &vmopv1.VirtualMachineBootstrapSpec{CloudInit: &vmopv1.VirtualMachineBootstrapCloudInitSpec{
			RawCloudConfig: &common.SecretKeySelector{Name: name, Key: "user-data"},
		}}
		return renderer.Render(t.Context(), virtualmachine.BootstrapInput{VM: vm, Hostname: "vm"})
	}
	for _, name := range []string{"secret", "config"} {
		seed, err := render(name)
		if err != nil {
			t.Fatal(err)
		}
		if seed.Label != "cidata" || !strings.Contains(string(seed.Files["user-data"]), "echo "+name) {
			t.Errorf("%s: got label %q, user data %q", name, seed.Label, seed.Files["user-data"])
		}
	}
	_, err := render("absent")
	if !apierrors.IsNotFound(err) || !strings.Contains(err.Error(), `spec.bootstrap.cloudInit.rawCloudConfig.name: there is no Secret and no ConfigMap "absent"`) {
		t.Errorf("got %v", err)
	}
}
