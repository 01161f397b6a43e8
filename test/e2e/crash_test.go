//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// database is a PostgreSQL on an encrypted volume; %s is the StorageClass.
const database = `
apiVersion: v1
kind: Service
metadata: {name: db}
spec:
  selector: {app: db}
  ports: [{name: postgres, port: 5432}]
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: data}
spec: {storageClassName: %s, accessModes: [ReadWriteOnce], resources: {requests: {storage: 2Gi}}}
---
apiVersion: v1
kind: Pod
metadata: {name: db, labels: {app: db}}
spec:
  securityContext: {runAsNonRoot: true, fsGroup: 999}
  containers:
    - name: postgres
      image: postgres:15
      imagePullPolicy: IfNotPresent
      # Checkpoints as often as can be, for there to be more than the log to break.
      args: [-c, shared_buffers=32MB, -c, checkpoint_timeout=30s, -c, fsync=on, -c, synchronous_commit=on]
      env:
        - name: POSTGRES_PASSWORD_FILE
          value: /run/secrets/db/password
      readinessProbe: {exec: {command: [pg_isready, -q]}, periodSeconds: 3, timeoutSeconds: 5}
      volumeMounts:
        - {name: data, mountPath: /var/lib/postgresql/data}
        - {name: password, mountPath: /run/secrets/db}
  volumes:
    - {name: data, persistentVolumeClaim: {claimName: data}}
    - {name: password, secret: {secretName: db}}
`

// victims are what a round of TestCrash kills one of: services of the supervisor, and processes of the pod.
func victims() []string { return []string{"server", "agent", "containerd", "shim", "qemu"} }

// TestCrash lets clients outside of the cluster write to a database in a micro-VM, kills something at a random
// moment, waits until the clients can write again, and looks whether everything that was acknowledged is there.
// ATOLL_CRASH_ROUNDS says how often, ATOLL_CRASH_SEED repeats the order and the moments of a run.
func TestCrash(t *testing.T) {
	rounds, seed := setting(t, "ATOLL_CRASH_ROUNDS", 4), setting(t, "ATOLL_CRASH_SEED", time.Now().UnixNano())
	t.Logf("%d rounds, ATOLL_CRASH_SEED=%d", rounds, seed)
	random := rand.New(rand.NewPCG(uint64(seed), 0))
	n := newNamespace(t)
	load(t, "postgres")
	password := strconv.FormatUint(random.Uint64(), 36)
	feed(t, strings.NewReader(password), "-n", n.name, "create", "secret", "generic", "db", "--from-file=password=/dev/stdin")
	manifest := fmt.Sprintf(database, encryptedClass(t))
	n.apply(manifest)
	n.ready("db")
	l := openLedger(t, n.field("service/db", ".spec.clusterIP"), password)
	l.prepare()
	l.start()

	var deck []string
	for round := range rounds {
		if len(deck) == 0 { // every one has its turn before one comes again
			deck = victims()
			random.Shuffle(len(deck), func(i, j int) { deck[i], deck[j] = deck[j], deck[i] })
		}
		victim := deck[0]
		deck = deck[1:]
		l.progress(5)
		delay := time.Duration(random.Int64N(int64(3 * time.Second)))
		time.Sleep(delay) // the random moment
		before := l.count()
		began := time.Now()
		revived := kill(t, n, victim)
		eventually(t, "recovery from the death of "+victim, revived)
		n.ready("db")
		l.progress(20)
		took := time.Since(began)
		v := l.verify()
		n.amcheck("rows", "totals")
		t.Logf("round %2d: %-10s killed %4d ms after the last look, back in %5.1f s; acknowledged: %d before, %d now; rows: %d, of them %d whose acknowledgement was lost; none missing; last error of a client: %v",
			round+1, victim, delay.Milliseconds(), took.Seconds(), before, v.acknowledged, v.rows, v.unknown, v.lastErr)
		if victim == "shim" || victim == "qemu" {
			// A new pod: the kubelet waits longer with each restart of the same one.
			n.kubectl("delete", "pod", "db")
			n.apply(manifest)
			n.ready("db")
		}
	}
	l.stop()
	n.amcheck()
	n.kubectl("delete", "pod", "db")
	n.checksums()
}

func setting(t *testing.T, name string, otherwise int64) int64 {
	t.Helper()
	text := os.Getenv(name)
	if text == "" {
		return otherwise
	}
	value, err := strconv.ParseInt(text, 10, 64)
	if err != nil || value < 1 {
		t.Fatalf("%s=%q is not a positive number", name, text)
	}
	return value
}

// load makes an image known to the node that not all tests need.
func load(t *testing.T, image string) {
	t.Helper()
	if err := command("image", "load", filepath.Join(filepath.Dir(suite.atoll), "..", "build", "images", image+".tar")); err != nil {
		t.Fatal(err)
	}
}

// encryptedClass makes a StorageClass and its key, which go with the test, and returns its name.
func encryptedClass(t *testing.T) string {
	t.Helper()
	const name = "crash"
	t.Cleanup(func() {
		for _, object := range [][]string{{"storageclass", name}, {"secret", name, "-n", "atoll-keys"}} {
			if out, err := kubectl(context.Background(), "", append([]string{"delete"}, object...)...); err != nil {
				t.Errorf("deleting %v: %s", object, out)
			}
		}
	})
	feed(t, bytes.NewReader(bytes.Repeat([]byte{7}, 32)), "create", "secret", "generic", name, "-n", "atoll-keys", "--from-file=key=/dev/stdin")
	run(t, `
apiVersion: storage.k8s.io/v1
kind: StorageClass
metadata: {name: `+name+`}
provisioner: csi.atoll.dev
volumeBindingMode: WaitForFirstConsumer
parameters: {encryption: `+name+`}
`, "apply", "-f", "-")
	return name
}

// kill ends a victim with SIGKILL and returns what tells whether the supervisor or the kubelet has replaced it.
func kill(t *testing.T, n *namespace, victim string) (revived func() error) {
	t.Helper()
	pattern := map[string]string{"shim": "shim-daemon", "qemu": "qemu-system"}[victim]
	restarts := func() (int, error) {
		out, err := n.try("get", "pod", "db", "-o", "jsonpath={.status.containerStatuses[0].restartCount}")
		if err != nil {
			return 0, err
		}
		return strconv.Atoi(out)
	}
	before, err := restarts()
	if err != nil {
		t.Fatal(err)
	}
	killed := 0
	if pattern == "" {
		killed = killService(t, victim)
	} else {
		killAll(t, pidsOfPod(t, n, "db", pattern))
	}
	return func() error {
		if now := servicePID(t, victim); pattern == "" && (now == 0 || now == killed) {
			return fmt.Errorf("the pid of %s is %d, was %d", victim, now, killed)
		}
		switch now, err := restarts(); {
		case err != nil:
			return err
		case pattern != "" && now <= before:
			return fmt.Errorf("the pod has been restarted %d times, as before", now)
		case pattern == "" && now != before:
			t.Fatalf("the pod was restarted when %s died", victim)
		}
		// A kubelet that has just begun does not know its pods yet.
		_, err := n.try("exec", "db", "--", "true")
		return err
	}
}

// amcheck compares tables with their indexes, page by page; without names all of the database.
func (n *namespace) amcheck(tables ...string) {
	n.t.Helper()
	args := []string{"pg_amcheck", "--heapallindexed", "--parent-check"}
	for _, table := range tables {
		args = append(args, "--table="+table)
	}
	if out := n.exec("db", append(args, "postgres")...); strings.TrimSpace(out) != "" {
		n.t.Fatalf("pg_amcheck says\n%s", out)
	}
}

// checksums verifies every page of the stopped database, and then the image that it is on.
func (n *namespace) checksums() {
	n.t.Helper()
	n.apply(`
apiVersion: v1
kind: Pod
metadata: {name: checksums}
spec:
  restartPolicy: Never
  securityContext: {fsGroup: 999}
  containers:
    - name: main
      image: postgres:15
      imagePullPolicy: IfNotPresent
      command: [sh, -ec, pg_checksums --check && cat /sys/fs/ext4/sd*/errors_count]
      volumeMounts: [{name: data, mountPath: /var/lib/postgresql/data}]
  volumes: [{name: data, persistentVolumeClaim: {claimName: data}}]
`)
	phase, logs := n.ended("checksums"), n.kubectl("logs", "checksums")
	if phase != "Succeeded" || !strings.Contains(logs, "Bad checksums:  0\n") || !strings.HasSuffix(logs, "\n0\n") {
		n.t.Fatalf("pg_checksums: %s\n%s", phase, logs)
	}
	n.kubectl("delete", "pod", "checksums")
	volume := n.field("pv/"+n.field("pvc/data", ".spec.volumeName"), ".spec.csi.volumeHandle")
	eventually(n.t, "a sound image", func() error {
		out, err := exec.CommandContext(n.t.Context(), suite.atoll, "volume", "check", volume, "--data-dir", suite.dataDir).CombinedOutput()
		if err == nil && strings.Contains(string(out), "in-use") {
			err = fmt.Errorf("it is in use: %s", out)
		}
		if err != nil {
			return fmt.Errorf("atoll volume check %s: %w: %s", volume, err, out)
		}
		n.t.Logf("atoll volume check %s\n%s", volume, out)
		return nil
	})
}
