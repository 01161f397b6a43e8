package csi

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// TestAnOperationOutlivesItsCaller: the second caller waits for what the first one has begun, and then
// begins its own.
func TestAnOperationOutlivesItsCaller(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var c calls
		runs := 0
		slow := func(ctx context.Context) (int, error) {
			runs++
			select {
			case <-time.After(time.Minute):
				return runs, nil
			case <-ctx.Done():
				return 0, ctx.Err()
			}
		}
		short, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := do(short, &c, "v", slow); status.Code(err) != codes.Aborted {
			t.Fatalf("the impatient caller got %v", err)
		}
		begin := time.Now()
		if n, err := do(t.Context(), &c, "v", slow); err != nil || n != 2 {
			t.Fatalf("%d, %v", n, err)
		}
		if took := time.Since(begin); took != 119*time.Second { // 59 s are left of the first
			t.Errorf("the patient caller waited %v", took)
		}
		if _, err := do(t.Context(), &c, "other", func(context.Context) (int, error) { return 0, nil }); err != nil {
			t.Error(err)
		}
	})
}

// TestStopCancelsWhatRuns: nothing is left behind, and nothing new begins.
func TestStopCancelsWhatRuns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var c calls
		ended := false
		short, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, _ = do(short, &c, "v", func(ctx context.Context) (int, error) {
			<-ctx.Done()
			ended = true
			return 0, ctx.Err()
		})
		c.stop()
		if !ended {
			t.Error("the operation goes on")
		}
		if _, err := do(t.Context(), &c, "v", func(context.Context) (int, error) { return 0, nil }); status.Code(err) != codes.Unavailable {
			t.Errorf("a call after the end got %v", err)
		}
	})
}
