// Package events starts what the controllers of a host record events with.
//
// It records none itself and keeps none: an event that the API server does not take is lost, as with Kubernetes' own. The
// controllers that run in the agent call it. What can go wrong: the configuration of the client is wrong.
package events

import (
	"errors"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/record"
)

// Start makes a recorder of events about objects of the kinds. Who calls it shuts down the broadcaster at the end.
func Start(config *rest.Config, source corev1.EventSource, kinds ...func(*runtime.Scheme) error) (record.EventRecorder, record.EventBroadcaster, error) {
	core, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, nil, fmt.Errorf("recording events: %w", err)
	}
	scheme := runtime.NewScheme()
	for _, add := range kinds {
		err = errors.Join(err, add(scheme))
	}
	if err != nil {
		return nil, nil, fmt.Errorf("recording events: %w", err)
	}
	sink := record.NewBroadcaster()
	recorder := sink.NewRecorder(scheme, source)
	sink.StartRecordingToSink(&typedcorev1.EventSinkImpl{Interface: core.CoreV1().Events("")})
	return recorder, sink, nil
}
