package main

import (
	"os"
	"syscall"
	"time"
	"unsafe"
)

// alarm wakes up one goroutine at its time. A timerfd that the runtime's poller waits for: a Go timer may
// be a millisecond late, and a goroutine that sleeps in a system call keeps the others from the only
// processor until the runtime's monitor has noticed, for which that has to look every 20 microseconds.
type alarm struct {
	fd   uintptr
	file *os.File
}

func newAlarm() (*alarm, error) {
	const monotonic, flags = 1, syscall.O_NONBLOCK | syscall.O_CLOEXEC
	fd, _, errno := syscall.Syscall(syscall.SYS_TIMERFD_CREATE, monotonic, flags, 0)
	if errno != 0 {
		return nil, os.NewSyscallError("timerfd_create", errno)
	}
	return &alarm{fd, os.NewFile(fd, "alarm")}, nil
}

// sleep for so long.
func (a *alarm) sleep(d time.Duration) {
	if d <= 0 {
		return
	}
	var at struct{ interval, value syscall.Timespec }
	at.value = syscall.NsecToTimespec(int64(d))
	_, _, errno := syscall.Syscall6(
		syscall.SYS_TIMERFD_SETTIME, a.fd, 0, uintptr(unsafe.Pointer(&at)), 0, 0, 0)
	var rung [8]byte
	if errno != 0 {
		time.Sleep(d)
	} else if _, err := a.file.Read(rung[:]); err != nil {
		time.Sleep(d)
	}
}
