package main

import (
	"container/heap"
	"syscall"
	"time"
	"unsafe"
)

// loop is the generator's only thread of control: it waits for sockets and for times.
//
// Its system calls keep the processor from Go's scheduler. The runtime's own poller gives it back at
// every wait, and the runtime's monitor, which looks for that every 20 microseconds, then costs more
// than the calls do: a fifth of a core at a thousand calls a second, on cores that are shared with
// the server that is measured.
type loop struct {
	epoll  uintptr
	timers timers
	byFD   map[int32]*connection
	dirty  []*connection // with frames to write
	events [128]syscall.EpollEvent
}

// timer runs `do` once, at its time or soon after.
type timer struct {
	at    time.Time
	do    func()
	order uint64
}

func newLoop() (*loop, error) {
	epoll, err := syscall.EpollCreate1(syscall.EPOLL_CLOEXEC)
	if err != nil {
		return nil, err
	}
	// Waits end when they should, not up to 50 microseconds later.
	const setTimerSlack = 29
	_, _, _ = syscall.RawSyscall6(syscall.SYS_PRCTL, setTimerSlack, 1, 0, 0, 0, 0)
	return &loop{epoll: uintptr(epoll), byFD: map[int32]*connection{}}, nil
}

// at has `do` run at a time.
func (l *loop) at(when time.Time, do func()) { l.timers.add(&timer{at: when, do: do}) }

// watch sets what is waited for on a connection's socket.
func (l *loop) watch(c *connection, events uint32) {
	if c.watched == events {
		return
	}
	action := syscall.EPOLL_CTL_MOD
	if l.byFD[int32(c.fd)] != c {
		l.byFD[int32(c.fd)] = c
		action = syscall.EPOLL_CTL_ADD
	}
	c.watched = events
	_ = syscall.EpollCtl(int(l.epoll), action, c.fd, &syscall.EpollEvent{Events: events, Fd: int32(c.fd)})
}

// forget a connection's socket before it is closed.
func (l *loop) forget(c *connection) { delete(l.byFD, int32(c.fd)) }

// run goes on until a time, or until `done`.
func (l *loop) run(until time.Time, done func() bool) {
	for !done() {
		now := time.Now()
		if !now.Before(until) {
			return
		}
		for len(l.timers.heap) > 0 && !now.Before(l.timers.heap[0].at) {
			heap.Pop(&l.timers).(*timer).do()
		}
		for len(l.dirty) > 0 {
			dirty := l.dirty
			l.dirty = nil
			for _, c := range dirty {
				c.dirty = false
				c.write()
			}
		}
		if next := l.timers.next(); next.Before(until) {
			l.wait(time.Until(next))
		} else {
			l.wait(time.Until(until))
		}
	}
}

func (l *loop) wait(d time.Duration) {
	const epollPwait2 = 441
	limit := syscall.NsecToTimespec(int64(min(max(d, 0), time.Second)))
	n, _, errno := syscall.RawSyscall6(
		epollPwait2, l.epoll, uintptr(unsafe.Pointer(&l.events[0])), uintptr(len(l.events)),
		uintptr(unsafe.Pointer(&limit)), 0, 0)
	if errno == syscall.ENOSYS {
		panic("Linux 5.11 or newer is needed (epoll_pwait2)")
	}
	if errno != 0 { // EINTR: the runtime asks for the processor, and gets it in the next call
		return
	}
	for _, event := range l.events[:n] {
		c := l.byFD[event.Fd]
		if c == nil { // closed by an event before this one
			continue
		}
		broken := event.Events&(syscall.EPOLLERR|syscall.EPOLLHUP) != 0
		if broken && c.paused {
			c.end(lost)
			continue
		}
		if broken || event.Events&syscall.EPOLLOUT != 0 {
			c.write()
		}
		if broken || event.Events&syscall.EPOLLIN != 0 {
			c.read()
		}
	}
}

// read and write are without the scheduler's notice: the sockets never block.

func read(fd int, into []byte) (int, syscall.Errno) {
	n, _, errno := syscall.RawSyscall(
		syscall.SYS_READ, uintptr(fd), uintptr(unsafe.Pointer(&into[0])), uintptr(len(into)))
	return int(n), errno
}

func write(fd int, data []byte) (int, syscall.Errno) {
	n, _, errno := syscall.RawSyscall(
		syscall.SYS_WRITE, uintptr(fd), uintptr(unsafe.Pointer(&data[0])), uintptr(len(data)))
	return int(n), errno
}

// timers are a heap, by time and then by age.
type timers struct {
	heap  []*timer
	count uint64
}

func (t *timers) add(one *timer) {
	t.count++
	one.order = t.count
	heap.Push(t, one)
}

func (t *timers) next() time.Time {
	if len(t.heap) == 0 {
		return time.Now().Add(time.Second)
	}
	return t.heap[0].at
}

func (t *timers) Len() int { return len(t.heap) }

func (t *timers) Less(i, j int) bool {
	a, b := t.heap[i], t.heap[j]
	if a.at.Equal(b.at) {
		return a.order < b.order
	}
	return a.at.Before(b.at)
}

func (t *timers) Swap(i, j int) { t.heap[i], t.heap[j] = t.heap[j], t.heap[i] }

func (t *timers) Push(one any) { t.heap = append(t.heap, one.(*timer)) }

func (t *timers) Pop() any {
	last := len(t.heap) - 1
	one := t.heap[last]
	t.heap[last] = nil
	t.heap = t.heap[:last]
	return one
}
