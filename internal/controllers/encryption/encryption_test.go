package encryption

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	dynamicfake "k8s.io/client-go/dynamic/fake"
	metadatafake "k8s.io/client-go/metadata/fake"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"

	api "atoll.dev/atoll/api/encryption/v1alpha1"
)

func TestStatus(t *testing.T) {
	key := func(s State) State {
		s.Provider, s.KeyID, s.Fingerprint = "corp", "2026", "ab"
		return s
	}
	missing := errors.New(`there is no key provider "corp"`)
	class := &api.EncryptionClass{ObjectMeta: metav1.ObjectMeta{Generation: 2}}
	for _, c := range []struct {
		name           string
		other          *api.EncryptionClassHost
		state          State
		ready, current string // status/reason
		message        string
	}{
		{"nothing yet", nil, key(State{}), "True/KeyUsable", "True/AllCurrent", "0 of 0"},
		{"under way", nil, key(State{Volumes: 5, Current: 3}), "True/KeyUsable", "False/Rewrapping", "3 of 5"},
		{"done", nil, key(State{Volumes: 5, Current: 5}), "True/KeyUsable", "True/AllCurrent", "older keys are not needed"},
		{"no key", nil, State{Volumes: 5, KeyErr: missing}, "False/KeyNotUsable", "Unknown/Unknown", "cannot be used"},
		{
			"an old key is gone", nil, key(State{Volumes: 5, Current: 4, VolumeErr: errors.New("volume default/v: key \"2025\" is gone")}),
			"True/KeyUsable", "False/OldKeyNeeded", "volume default/v",
		},
		{
			"another host has not come to it", &api.EncryptionClassHost{Node: "a", Volumes: 1, Current: 1, ObservedGeneration: 1, Fingerprint: "ab", KeyProvider: "corp"},
			key(State{Volumes: 5, Current: 5}), "True/KeyUsable", "False/Rewrapping", "host a has not",
		},
		{
			"another host has another key", &api.EncryptionClassHost{Node: "a", Volumes: 1, Current: 1, ObservedGeneration: 2, Fingerprint: "cd", KeyProvider: "corp"},
			key(State{Volumes: 5, Current: 5}), "True/KeyUsable", "False/Rewrapping", "6 of 6",
		},
		{
			"another host is done", &api.EncryptionClassHost{Node: "a", Volumes: 1, Current: 1, ObservedGeneration: 2, Fingerprint: "ab", KeyProvider: "corp"},
			key(State{Volumes: 5, Current: 5}), "True/KeyUsable", "True/AllCurrent", "6 of 6",
		},
		{
			"a datastore is down", nil, key(State{Volumes: 0, Current: 0, Unseen: errors.New("datastore far is not open")}),
			"True/KeyUsable", "Unknown/NotAllSeen", "datastore far is not open",
		},
		{
			"a record is damaged and others are not done", nil, key(State{Volumes: 5, Current: 4, Unseen: errors.New("record of v")}),
			"True/KeyUsable", "Unknown/NotAllSeen", "4 of 5",
		},
		{
			"a datastore of another host is down", &api.EncryptionClassHost{Node: "z", ObservedGeneration: 2, Fingerprint: "ab", KeyProvider: "corp", Unseen: "datastore far"},
			key(State{Volumes: 5, Current: 5}), "True/KeyUsable", "Unknown/NotAllSeen", "host z could not look at all",
		},
		{
			"another host cannot", &api.EncryptionClassHost{Node: "a", ObservedGeneration: 2, KeyProblem: "it is locked"},
			key(State{}), "False/KeyNotUsable", "Unknown/Unknown", "",
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			from := class.DeepCopy()
			from.Status.Hosts = []api.EncryptionClassHost{{Node: "here", Volumes: 99}} // of an earlier look
			if c.other != nil {
				from.Status.Hosts = append(from.Status.Hosts, *c.other)
			}
			got := statusOf(from, "here", c.state)
			for kind, want := range map[string]string{api.ClassReady: c.ready, api.ClassKeysCurrent: c.current} {
				condition := meta.FindStatusCondition(got.Conditions, kind)
				if is := string(condition.Status) + "/" + condition.Reason; is != want || condition.ObservedGeneration != 2 {
					t.Errorf("%s: %+v, want %s", kind, condition, want)
				}
			}
			if m := meta.FindStatusCondition(got.Conditions, api.ClassKeysCurrent).Message; !strings.Contains(m, c.message) {
				t.Errorf("message %q", m)
			}
			if c.state.KeyErr != nil && meta.FindStatusCondition(got.Conditions, api.ClassReady).Message != missing.Error() {
				t.Errorf("%+v", got.Conditions)
			}
		})
	}
}

// blind is a Host that does not see everything.
type blind struct{ Host }

func (blind) Look(context.Context) ([]Volume, error) {
	return nil, errors.New("datastore far is not open")
}

func (blind) Rotate(context.Context, string, func(State)) State {
	return State{Provider: "corp", KeyID: "2026", Fingerprint: "ab"}
}

// TestUnseen: what Look could not see is in the status.
func TestUnseen(t *testing.T) {
	class := &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": api.GroupVersion().String(), "kind": "EncryptionClass",
		"metadata": map[string]any{"namespace": "team", "name": "gold"}, "spec": map[string]any{"keyProvider": "corp"},
	}}
	kinds := map[schema.GroupVersionResource]string{api.Classes(): "EncryptionClassList"}
	client := dynamicfake.NewSimpleDynamicClientWithCustomListKinds(runtime.NewScheme(), kinds, class)
	informer := cache.NewSharedIndexInformer(&cache.ListWatch{}, &unstructured.Unstructured{}, 0, cache.Indexers{})
	if err := informer.GetStore().Add(class); err != nil {
		t.Fatal(err)
	}
	c := &Controller{
		cfg: Config{Host: blind{}, Node: "here", Logger: slog.New(slog.DiscardHandler)}, client: client.Resource(api.Classes()),
		classes: informer, events: record.NewFakeRecorder(10), complained: map[string]string{},
	}
	c.pass(t.Context())
	after, err := c.client.Namespace("team").Get(t.Context(), "gold", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var got api.EncryptionClass
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(after.Object, &got); err != nil {
		t.Fatal(err)
	}
	if condition := meta.FindStatusCondition(got.Status.Conditions, api.ClassKeysCurrent); condition == nil || condition.Status != metav1.ConditionUnknown ||
		!strings.Contains(condition.Message, "datastore far") {
		t.Errorf("%+v", condition)
	}
}

// TestGone: a host whose Node is gone is waited for no more, but one whose Node is new is.
func TestGone(t *testing.T) {
	scheme := metadatafake.NewTestScheme()
	if err := metav1.AddMetaToScheme(scheme); err != nil {
		t.Fatal(err)
	}
	node := func(name string) *metav1.PartialObjectMetadata {
		return &metav1.PartialObjectMetadata{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Node"}, ObjectMeta: metav1.ObjectMeta{Name: name}}
	}
	nodes := cache.NewSharedIndexInformer(&cache.ListWatch{}, &metav1.PartialObjectMetadata{}, 0, cache.Indexers{})
	if err := nodes.GetStore().Add(node("seen")); err != nil {
		t.Fatal(err)
	}
	client := metadatafake.NewSimpleMetadataClient(scheme, node("new"))
	c := &Controller{cfg: Config{Node: "here"}, nodes: nodes, node: client.Resource(schema.GroupVersionResource{Version: "v1", Resource: "nodes"})}
	class := &api.EncryptionClass{ObjectMeta: metav1.ObjectMeta{Generation: 2}}
	for _, name := range []string{"gone", "here", "new", "seen"} {
		class.Status.Hosts = append(class.Status.Hosts, api.EncryptionClassHost{Node: name, ObservedGeneration: 2, Fingerprint: "ab", KeyProvider: "corp"})
	}
	class.Status.Hosts[0] = api.EncryptionClassHost{Node: "gone", ObservedGeneration: 1, Volumes: 3, KeyProblem: "it is locked"}
	got := statusOf(c.withoutGone(t.Context(), class), "here", State{Provider: "corp", KeyID: "2026", Fingerprint: "ab"})
	var names []string
	for _, h := range got.Hosts {
		names = append(names, h.Node)
	}
	if strings.Join(names, " ") != "here new seen" || got.Volumes != 0 || len(class.Status.Hosts) != 4 {
		t.Errorf("hosts %v, %d volumes", names, got.Volumes)
	}
	for _, condition := range got.Conditions {
		if condition.Status != metav1.ConditionTrue {
			t.Errorf("%+v", condition)
		}
	}
}

// mover is a Host that moves volumes.
type mover struct {
	Host
	moved map[string]string
	err   error
}

func (m *mover) Move(_ context.Context, v Volume, class string) error {
	if m.err == nil {
		m.moved[v.Name] = class
	}
	return m.err
}

func TestFollow(t *testing.T) {
	claims := cache.NewSharedIndexInformer(&cache.ListWatch{}, &metav1.PartialObjectMetadata{}, 0, cache.Indexers{})
	host := &mover{moved: map[string]string{}}
	events := record.NewFakeRecorder(10)
	c := &Controller{cfg: Config{Host: host, Logger: slog.New(slog.DiscardHandler)}, claims: claims, events: events, complained: map[string]string{}}
	for _, claim := range []metav1.ObjectMeta{
		{Name: "same", UID: "1", Annotations: map[string]string{api.ClaimAnnotation: "gold"}},
		{Name: "other", UID: "2", Annotations: map[string]string{api.ClaimAnnotation: "silver"}},
		{Name: "newer", UID: "3", Annotations: map[string]string{api.ClaimAnnotation: "silver"}},
		{Name: "none", UID: "4"},
		{Name: "bad", UID: "5", Annotations: map[string]string{api.ClaimAnnotation: "else/where"}},
	} {
		claim.Namespace = "team"
		if err := claims.GetStore().Add(&metav1.PartialObjectMetadata{ObjectMeta: claim}); err != nil {
			t.Fatal(err)
		}
	}
	for name, uid := range map[string]string{"same": "1", "other": "2", "newer": "of before", "none": "4", "bad": "5", "gone": "6"} {
		v := Volume{Name: name, Class: "team/gold", Claim: "team/" + name, ClaimUID: uid}
		c.follow(t.Context(), &v)
		if want := map[bool]string{true: "team/silver", false: "team/gold"}[name == "other"]; v.Class != want {
			t.Errorf("%s: class %s", name, v.Class)
		}
	}
	if len(host.moved) != 1 || host.moved["other"] != "team/silver" {
		t.Errorf("moved %v", host.moved)
	}
	var said string
	for range 2 {
		said += <-events.Events
	}
	if !strings.Contains(said, "EncryptionClassChanged") || !strings.Contains(said, "must be the name of an EncryptionClass") {
		t.Error(said)
	}
	host.err = errors.New("no such class")
	for range 2 { // said once
		c.follow(t.Context(), &Volume{Name: "other", Class: "team/gold", Claim: "team/other", ClaimUID: "2"})
	}
	if e := <-events.Events; !strings.Contains(e, "no such class") || len(events.Events) != 0 {
		t.Error(e, len(events.Events))
	}
}
