package restarts

import (
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/types"
)

// PauseSuspend is how long a machine whose memory could not be saved is left alone before that is tried again.
const PauseSuspend = 30 * time.Second

// Suspends remembers why memory could not be saved, as long as that is tried again. The zero value is ready.
type Suspends struct {
	mu    sync.Mutex
	known map[types.UID]failure // by uid of the pod
}

type failure struct {
	text  string
	until time.Time // zero once it is tried again
}

// Failed notes why an attempt has failed. It returns how long to leave the machine alone, and whether that is news.
func (s *Suspends) Failed(pod types.UID, text string, now time.Time) (left time.Duration, news bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.known == nil || len(s.known) > 4096 {
		s.known = map[types.UID]failure{}
	}
	f := s.known[pod]
	if news = f.until.IsZero() || f.text != text; news {
		f = failure{text: text, until: now.Add(PauseSuspend)}
		s.known[pod] = f
	}
	return max(0, f.until.Sub(now)), news
}

// Again says that it is tried again. The reason of the last failure stays.
func (s *Suspends) Again(pod types.UID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if f, ok := s.known[pod]; ok {
		f.until = time.Time{}
		s.known[pod] = f
	}
}

// Why the last attempt failed, empty when none has.
func (s *Suspends) Why(pod types.UID) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.known[pod].text
}

// Forget is for machines that are not to be suspended any more.
func (s *Suspends) Forget(pod types.UID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.known, pod)
}
