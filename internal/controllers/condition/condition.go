// Package condition sets status conditions the way VM Operator's are: a condition that is True has the reason
// "True", every other one has a reason of its own, and the time changes only with the status.
//
// It is used by the controllers of vmoperator.vmware.com and does no I/O.
package condition

import (
	"fmt"
	"slices"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// ReasonTrue is the reason of conditions that are True.
const ReasonTrue = "True"

// maxMessage is what the API server takes of a message.
const maxMessage = 32768

// True sets a condition to True.
func True(list *[]metav1.Condition, kind string) {
	set(list, kind, metav1.ConditionTrue, ReasonTrue, "")
}

// False sets a condition to False and says why.
func False(list *[]metav1.Condition, kind, reason, format string, args ...any) {
	set(list, kind, metav1.ConditionFalse, reason, fmt.Sprintf(format, args...))
}

// Unknown sets a condition to Unknown and says why.
func Unknown(list *[]metav1.Condition, kind, reason, format string, args ...any) {
	set(list, kind, metav1.ConditionUnknown, reason, fmt.Sprintf(format, args...))
}

// Remove takes a condition away.
func Remove(list *[]metav1.Condition, kind string) { meta.RemoveStatusCondition(list, kind) }

// IsTrue tells whether a condition is there and True.
func IsTrue(list []metav1.Condition, kind string) bool {
	return meta.IsStatusConditionTrue(list, kind)
}

// Get returns a condition, nil when it is not there.
func Get(list []metav1.Condition, kind string) *metav1.Condition {
	return meta.FindStatusCondition(list, kind)
}

// AllTrue tells whether none of the conditions is other than True.
func AllTrue(list []metav1.Condition) bool {
	return !slices.ContainsFunc(list, func(c metav1.Condition) bool { return c.Status != metav1.ConditionTrue })
}

func set(list *[]metav1.Condition, kind string, status metav1.ConditionStatus, reason, message string) {
	if len(message) > maxMessage {
		message = message[:maxMessage]
	}
	meta.SetStatusCondition(list, metav1.Condition{Type: kind, Status: status, Reason: reason, Message: message})
}
