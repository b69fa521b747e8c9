package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
	"net"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

const (
	greeting     = 10 * time.Second
	mostFrame    = 16384
	frameHeader  = 9
	defaultSends = 65535
	readSize     = 64 << 10
)

// connection is one HTTP/2 connection. Frames are gathered and written together: a call costs a few
// microseconds of CPU here, so that a generator beside the server on the same cores measures the
// server and not itself.
type connection struct {
	kind    *kind
	slot    int
	fd      int
	watched uint32 // events that the loop waits for

	connected  bool
	known      bool // the server's settings have come
	closed     bool
	leaving    bool // the server said GOAWAY
	replaced   bool // its kind has heard that it takes no more
	dirty      bool
	paused     bool // a slow reader waits
	out        []byte
	headers    bytes.Buffer
	encoder    *hpack.Encoder
	nextID     uint32
	flight     map[uint32]*call
	maxStreams int
	room       int64 // of the connection's window, for sending
	blocked    []*call

	in      []byte // what has been read, from the first frame that is not whole
	source  bytes.Reader
	framer  *http2.Framer
	decoder *hpack.Decoder
	current *call // whose headers are read
	ending  bool  // with them it ends
	unacked int   // bytes received and not given back to the connection's window
}

func dial(k *kind, slot int, to *net.TCPAddr) (*connection, error) {
	family, address := sockaddr(to)
	fd, err := syscall.Socket(family, syscall.SOCK_STREAM|syscall.SOCK_NONBLOCK|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	if err = syscall.Connect(fd, address); err != nil && err != syscall.EINPROGRESS {
		syscall.Close(fd)
		return nil, err
	}
	_ = syscall.SetsockoptInt(fd, syscall.IPPROTO_TCP, syscall.TCP_NODELAY, 1)
	c := &connection{
		kind: k, slot: slot, fd: fd, nextID: 1, flight: map[uint32]*call{},
		maxStreams: math.MaxInt32, room: defaultSends,
	}
	c.encoder = hpack.NewEncoder(&c.headers)
	c.decoder = hpack.NewDecoder(4096, c.field)
	var hello bytes.Buffer
	hello.WriteString(http2.ClientPreface)
	c.framer = http2.NewFramer(&hello, &c.source)
	c.framer.SetReuseFrames()
	c.framer.SetMaxReadFrameSize(1<<24 - 1)
	_ = c.framer.WriteSettings(
		http2.Setting{ID: http2.SettingInitialWindowSize, Val: k.spec.StreamWindow},
		http2.Setting{ID: http2.SettingEnablePush, Val: 0},
	)
	if k.spec.Window > defaultSends {
		_ = c.framer.WriteWindowUpdate(0, k.spec.Window-defaultSends)
	}
	c.out = hello.Bytes()
	k.load.loop.watch(c, syscall.EPOLLIN|syscall.EPOLLOUT)
	return c, nil
}

func sockaddr(to *net.TCPAddr) (int, syscall.Sockaddr) {
	if four := to.IP.To4(); four != nil {
		return syscall.AF_INET, &syscall.SockaddrInet4{Port: to.Port, Addr: [4]byte(four)}
	}
	return syscall.AF_INET6, &syscall.SockaddrInet6{Port: to.Port, Addr: [16]byte(to.IP.To16())}
}

// end closes the connection; what is on its way ends with `why`. The kind opens another.
func (c *connection) end(why string) {
	if c.closed {
		return
	}
	c.closed = true
	c.kind.load.loop.forget(c)
	syscall.Close(c.fd)
	flight, blocked := c.flight, c.blocked
	c.flight, c.blocked = nil, nil
	c.kind.gone(c)
	for _, one := range flight {
		one.ended = true
		c.kind.load.finish(one, why)
	}
	for _, one := range blocked {
		one.ended = true
		c.kind.load.finish(one, why)
	}
}

// offer sends the call if there is room for one more.
func (c *connection) offer(one *call) bool {
	if c.closed || c.leaving || len(c.flight)+len(c.blocked) >= c.maxStreams || c.nextID > 1<<30 {
		return false
	}
	one.connection = c
	if len(c.blocked) > 0 || c.room < int64(len(one.request.Message)+5) {
		c.blocked = append(c.blocked, one)
	} else {
		c.send(one)
	}
	return true
}

func (c *connection) send(one *call) {
	one.id = c.nextID
	one.sent = time.Now()
	c.nextID += 2
	c.flight[one.id] = one
	c.headers.Reset()
	for _, field := range c.kind.load.fields[one.workload] {
		_ = c.encoder.WriteField(field)
	}
	if !one.expires.IsZero() { // what is left, as gRPC clients say it: the call may have waited
		left := max(1, one.expires.Sub(one.sent).Milliseconds())
		_ = c.encoder.WriteField(hpack.HeaderField{
			Name: "grpc-timeout", Value: strconv.FormatInt(left, 10) + "m",
		})
	}
	c.queue(http2.FrameHeaders, http2.FlagHeadersEndHeaders, one.id, c.headers.Bytes())
	message := one.request.Message
	c.room -= int64(len(message) + 5)
	prefix := [5]byte{}
	binary.BigEndian.PutUint32(prefix[1:], uint32(len(message)))
	first := prefix[:]
	for {
		fits := min(len(message), mostFrame-len(first))
		flags := http2.Flags(0)
		if fits == len(message) {
			flags = http2.FlagDataEndStream
		}
		c.queue(http2.FrameData, flags, one.id, first, message[:fits])
		first, message = nil, message[fits:]
		if len(message) == 0 {
			return
		}
	}
}

// queue a frame; it is written before the loop waits again.
func (c *connection) queue(kind http2.FrameType, flags http2.Flags, id uint32, pieces ...[]byte) {
	n := 0
	for _, piece := range pieces {
		n += len(piece)
	}
	c.out = append(c.out, byte(n>>16), byte(n>>8), byte(n), byte(kind), byte(flags))
	c.out = binary.BigEndian.AppendUint32(c.out, id)
	for _, piece := range pieces {
		c.out = append(c.out, piece...)
	}
	if !c.dirty {
		c.dirty = true
		c.kind.load.loop.dirty = append(c.kind.load.loop.dirty, c)
	}
}

// leave takes a call back, which has not ended.
func (c *connection) leave(one *call) {
	one.ended = true
	if one.id == 0 {
		for at, other := range c.blocked {
			if other == one {
				c.blocked = append(c.blocked[:at], c.blocked[at+1:]...)
				break
			}
		}
		return
	}
	delete(c.flight, one.id)
	c.queue(http2.FrameRSTStream, 0, one.id, binary.BigEndian.AppendUint32(nil, uint32(http2.ErrCodeCancel)))
}

func (c *connection) write() {
	if c.closed {
		return
	}
	if !c.connected {
		if failed, err := syscall.GetsockoptInt(c.fd, syscall.SOL_SOCKET, syscall.SO_ERROR); err != nil || failed != 0 {
			c.end(lost)
			return
		}
		if _, err := syscall.Getpeername(c.fd); err != nil {
			return // not yet
		}
		c.connected = true
	}
	if len(c.out) > 0 {
		n, errno := write(c.fd, c.out)
		switch errno {
		case 0:
			c.out = append(c.out[:0], c.out[n:]...)
		case syscall.EAGAIN, syscall.EINTR:
		default:
			c.end(lost)
			return
		}
	}
	c.watch()
}

func (c *connection) watch() {
	events := uint32(0)
	if !c.paused {
		events = syscall.EPOLLIN
	}
	if len(c.out) > 0 {
		events |= syscall.EPOLLOUT
	}
	c.kind.load.loop.watch(c, events)
}

func (c *connection) read() {
	if c.closed || c.paused || !c.connected { // not: an event of a socket that had this number before
		return
	}
	have := len(c.in)
	if cap(c.in)-have < readSize {
		c.in = append(make([]byte, 0, 2*have+readSize), c.in...)
	}
	n, errno := read(c.fd, c.in[have:have+readSize])
	if errno == syscall.EAGAIN || errno == syscall.EINTR {
		return
	}
	if errno != 0 || n == 0 {
		c.end(lost)
		return
	}
	c.in = c.in[:have+n]
	c.frames()
}

// frames handles the whole frames that have been read, up to where a slow reader pauses.
func (c *connection) frames() {
	data := c.in
	for !c.closed && !c.paused && len(data) >= frameHeader {
		size := frameHeader + int(data[0])<<16 + int(data[1])<<8 + int(data[2])
		if len(data) < size {
			break
		}
		c.source.Reset(data[:size])
		data = data[size:]
		frame, err := c.framer.ReadFrame()
		if err == nil {
			err = c.take(frame)
		}
		if err != nil {
			c.end(lost)
			return
		}
		if rate := c.kind.spec.ReadBytesPerS; rate > 0 {
			c.pause(time.Duration(float64(size-frameHeader) / float64(rate) * 1e9))
		}
	}
	c.in = c.in[:copy(c.in, data)]
}

func (c *connection) pause(d time.Duration) {
	if c.closed || d <= 0 {
		return
	}
	c.paused = true
	c.watch()
	c.kind.load.loop.at(time.Now().Add(d), func() {
		if !c.closed {
			c.paused = false
			c.watch()
			c.frames()
		}
	})
}

func (c *connection) field(f hpack.HeaderField) {
	if c.current == nil {
		return
	}
	switch f.Name {
	case "grpc-status":
		c.current.status = f.Value
	case "grpc-message":
		c.current.message = f.Value
	case "grpc-status-details-bin":
		c.current.details = f.Value
	case ":status":
		if f.Value != "200" {
			c.current.status = "HTTP_" + f.Value
		}
	}
}

func (c *connection) take(frame http2.Frame) error {
	id := frame.Header().StreamID
	switch f := frame.(type) {
	case *http2.SettingsFrame:
		if f.IsAck() {
			return nil
		}
		if v, ok := f.Value(http2.SettingMaxConcurrentStreams); ok {
			c.maxStreams = int(v)
		}
		c.queue(http2.FrameSettings, http2.FlagSettingsAck, 0, nil)
		c.known = true
		c.kind.ready(c)
	case *http2.HeadersFrame:
		c.current, c.ending = c.flight[id], f.StreamEnded()
		return c.fields(f.HeaderBlockFragment(), f.HeadersEnded())
	case *http2.ContinuationFrame:
		return c.fields(f.HeaderBlockFragment(), f.HeadersEnded())
	case *http2.DataFrame:
		if one := c.flight[id]; one != nil {
			if one.body == nil {
				one.body = c.kind.load.body()
			}
			one.body = append(one.body, f.Data()...)
			if f.StreamEnded() {
				c.complete(one)
			}
		}
		c.give(id, int(f.Length))
	case *http2.RSTStreamFrame:
		if one := c.flight[id]; one != nil {
			one.status = "RESET_" + f.ErrCode.String()
			c.complete(one)
		}
	case *http2.PingFrame:
		if !f.IsAck() {
			c.queue(http2.FramePing, http2.FlagPingAck, 0, f.Data[:])
		}
	case *http2.WindowUpdateFrame:
		if id == 0 {
			c.room += int64(f.Increment)
			for len(c.blocked) > 0 && c.room >= int64(len(c.blocked[0].request.Message)+5) {
				one := c.blocked[0]
				c.blocked = c.blocked[1:]
				c.send(one)
			}
		}
	case *http2.GoAwayFrame:
		c.goAway(f.LastStreamID)
	}
	return nil
}

func (c *connection) fields(block []byte, last bool) error {
	if _, err := c.decoder.Write(block); err != nil {
		return err
	}
	if !last {
		return nil
	}
	err := c.decoder.Close()
	if c.current != nil && c.ending {
		c.complete(c.current)
	}
	return err
}

// give hands received bytes back to the windows.
func (c *connection) give(id uint32, size int) {
	if c.closed {
		return
	}
	c.unacked += size
	if c.unacked*4 >= int(c.kind.spec.Window) || (c.unacked > 0 && c.kind.spec.Window <= defaultSends) {
		c.queue(http2.FrameWindowUpdate, 0, 0, binary.BigEndian.AppendUint32(nil, uint32(c.unacked)))
		c.unacked = 0
	}
	if one := c.flight[id]; one != nil && size > 0 {
		one.received += size
		if one.received*4 >= int(c.kind.spec.StreamWindow) {
			c.queue(http2.FrameWindowUpdate, 0, id, binary.BigEndian.AppendUint32(nil, uint32(one.received)))
			one.received = 0
		}
	}
}

// goAway: the last calls end here beside a new connection.
func (c *connection) goAway(last uint32) {
	c.leaving = true
	c.kind.gone(c)
	var back []*call
	for id, one := range c.flight {
		if id > last {
			one.ended = true
			back = append(back, one)
			delete(c.flight, id)
		}
	}
	for _, one := range back {
		c.kind.load.finish(one, "GOAWAY")
	}
	if len(c.flight) == 0 {
		c.end(lost)
	}
}

// complete ends a call by what the server said.
func (c *connection) complete(one *call) {
	if one.ended { // taken back between the pieces of its headers
		return
	}
	one.ended = true
	delete(c.flight, one.id)
	code := one.status
	if n, err := strconv.Atoi(code); err == nil && n >= 0 && n < len(codeNames) {
		code = codeNames[n]
	} else if code == "" {
		code = "NO_STATUS"
	}
	c.kind.load.finish(one, code)
	if c.leaving && len(c.flight) == 0 {
		c.end(lost)
	}
}

// verify gives "" for a right answer.
func verify(one *call) string {
	body := one.body
	if len(body) < 5 || body[0] != 0 || int(binary.BigEndian.Uint32(body[1:])) != len(body)-5 {
		return fmt.Sprintf("the body of %d bytes is not one message", len(body))
	}
	for i := range one.request.Expect {
		if said := one.request.Expect[i].verify(body[5:]); said != "" {
			return said
		}
	}
	return ""
}
