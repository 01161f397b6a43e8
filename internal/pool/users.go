package pool

import (
	"fmt"
	"os"
	"strconv"
	"syscall"

	"atoll.dev/atoll/internal/pool/registry"
)

// users hands out the user ids that QEMUs run as: one for each, never one that a living process has.
type users struct {
	base, count uint32
	next        uint32
	taken       map[uint32]registry.Entry // of daemons; a zero PID is in use for good
}

func newUsers(base, count uint32) *users {
	return &users{base: base, count: count, taken: map[uint32]registry.Entry{}}
}

// scan takes out the ids of processes that are none of the registry's.
func (u *users) scan() error {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return fmt.Errorf("looking for used user ids: %w", err)
	}
	for _, e := range entries {
		if _, err := strconv.Atoi(e.Name()); err != nil {
			continue
		}
		st, err := os.Stat("/proc/" + e.Name())
		if err != nil {
			continue
		}
		uid := st.Sys().(*syscall.Stat_t).Uid
		if _, known := u.taken[uid]; !known && uid >= u.base && uid-u.base < u.count {
			u.taken[uid] = registry.Entry{}
		}
	}
	return nil
}

// take returns an id that nothing runs as.
func (u *users) take() (uint32, bool) {
	for range u.count {
		uid := u.base + u.next
		u.next = (u.next + 1) % u.count
		e, used := u.taken[uid]
		if used && e.PID == 0 {
			continue
		}
		if used {
			if _, alive := e.Process(); alive {
				continue
			}
		}
		u.taken[uid] = registry.Entry{}
		return uid, true
	}
	return 0, false
}

// give returns an id that was not used.
func (u *users) give(uid uint32) { delete(u.taken, uid) }

// keep notes that a daemon of an earlier pool has an id.
func (u *users) keep(e registry.Entry) { u.taken[e.UID] = e }

// keepPID notes that an id is taken until a daemon's process has ended.
func (u *users) keepPID(uid uint32, pid int, member string) {
	u.taken[uid] = registry.Entry{Member: member, PID: pid, UID: uid}
}
