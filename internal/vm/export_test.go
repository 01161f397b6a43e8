package vm

import "time"

// SetPatience is for tests that do not want to wait for long.
func (m *Machine) SetPatience(d time.Duration) { m.graph.SetPatience(d) }
