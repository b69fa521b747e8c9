package main

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
	"math/rand/v2"
	"net"
	"strconv"
	"sync"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

const (
	greeting     = 10 * time.Second
	mostFrame    = 16384
	defaultSends = 65535
)

// connection is one HTTP/2 connection. Frames are gathered and written together: a call costs two
// to three microseconds of CPU here, so that a generator beside the server on the same cores measures
// the server and not itself.
type connection struct {
	kind   *kind
	socket net.Conn

	mu         sync.Mutex
	out        []byte // frames that wait to be written
	headers    bytes.Buffer
	encoder    *hpack.Encoder
	nextID     uint32
	flight     map[uint32]*call
	maxStreams int
	room       int64 // of the connection's window, for sending
	streamRoom int64 // what a new stream's window has
	blocked    []*call
	closed     bool
	leaving    bool          // the server said GOAWAY
	told       chan struct{} // closed when it has
	wake       chan struct{}

	unacked int // bytes received and not given back to the connection's window
}

func dial(k *kind, target string) (*connection, error) {
	socket, err := net.DialTimeout("tcp", target, greeting)
	if err != nil {
		return nil, err
	}
	c := &connection{
		kind: k, socket: socket, nextID: 1, flight: map[uint32]*call{}, maxStreams: math.MaxInt32,
		room: defaultSends, streamRoom: defaultSends, wake: make(chan struct{}, 1), told: make(chan struct{}),
	}
	c.encoder = hpack.NewEncoder(&c.headers)
	var hello bytes.Buffer
	hello.WriteString(http2.ClientPreface)
	framer := http2.NewFramer(&hello, nil)
	_ = framer.WriteSettings(
		http2.Setting{ID: http2.SettingInitialWindowSize, Val: k.spec.StreamWindow},
		http2.Setting{ID: http2.SettingEnablePush, Val: 0},
	)
	if k.spec.Window > defaultSends {
		_ = framer.WriteWindowUpdate(0, k.spec.Window-defaultSends)
	}
	if _, err := socket.Write(hello.Bytes()); err != nil {
		socket.Close()
		return nil, err
	}
	return c, nil
}

// serve reads until the connection ends. `ready` is called when the server's settings are known.
func (c *connection) serve(ready func()) {
	go c.write()
	why := c.read(ready)
	c.end(why)
}

func (c *connection) end(why string) {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return
	}
	c.closed = true
	flight, blocked := c.flight, c.blocked
	c.flight, c.blocked = nil, nil
	for _, one := range flight {
		one.ended = true
	}
	for _, one := range blocked {
		one.ended = true
	}
	c.mu.Unlock()
	c.socket.Close()
	select {
	case c.wake <- struct{}{}:
	default:
	}
	for _, one := range flight {
		c.kind.load.finish(one, why)
	}
	for _, one := range blocked {
		c.kind.load.finish(one, why)
	}
}

// offer sends the call if there is room for one more. Safe for concurrent use.
func (c *connection) offer(one *call) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
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
		left := max(1, time.Until(one.expires).Milliseconds())
		_ = c.encoder.WriteField(hpack.HeaderField{
			Name: "grpc-timeout", Value: strconv.FormatInt(left, 10) + "m",
		})
	}
	c.out = appendFrame(c.out, http2.FrameHeaders, http2.FlagHeadersEndHeaders, one.id, c.headers.Bytes())
	message := one.request.Message
	c.room -= int64(len(message) + 5)
	piece := make([]byte, 5, min(len(message)+5, mostFrame))
	binary.BigEndian.PutUint32(piece[1:], uint32(len(message)))
	fits := min(len(message), mostFrame-5)
	piece = append(piece, message[:fits]...)
	message = message[fits:]
	for {
		flags := http2.Flags(0)
		if len(message) == 0 {
			flags = http2.FlagDataEndStream
		}
		c.out = appendFrame(c.out, http2.FrameData, flags, one.id, piece)
		if len(message) == 0 {
			break
		}
		fits = min(len(message), mostFrame)
		piece, message = message[:fits], message[fits:]
	}
	c.nudge()
}

func (c *connection) nudge() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// leave takes a call back. False when it has ended.
func (c *connection) leave(one *call) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if one.ended {
		return false
	}
	one.ended = true
	if one.id == 0 {
		for at, other := range c.blocked {
			if other == one {
				c.blocked = append(c.blocked[:at], c.blocked[at+1:]...)
				break
			}
		}
		return true
	}
	delete(c.flight, one.id)
	code := binary.BigEndian.AppendUint32(nil, uint32(http2.ErrCodeCancel))
	c.out = appendFrame(c.out, http2.FrameRSTStream, 0, one.id, code)
	c.nudge()
	return true
}

func (c *connection) write() {
	var spare []byte
	for range c.wake {
		c.mu.Lock()
		data := c.out
		c.out = spare[:0]
		closed := c.closed
		c.mu.Unlock()
		if closed {
			return
		}
		if len(data) > 0 {
			if _, err := c.socket.Write(data); err != nil {
				c.end(lost)
				return
			}
		}
		spare = data
	}
}

func (c *connection) read(ready func()) string {
	var source = bufio.NewReaderSize(c.socket, 64<<10)
	framer := http2.NewFramer(nil, source)
	framer.SetReuseFrames()
	framer.SetMaxReadFrameSize(1 << 24)
	var current *call
	decoder := hpack.NewDecoder(4096, func(f hpack.HeaderField) {
		if current == nil {
			return
		}
		switch f.Name {
		case "grpc-status":
			current.status = f.Value
		case "grpc-message":
			current.message = f.Value
		case "grpc-status-details-bin":
			current.details = f.Value
		case ":status":
			if f.Value != "200" {
				current.status = "HTTP_" + f.Value
			}
		}
	})
	random := rand.New(rand.NewPCG(1, uint64(c.socket.LocalAddr().(*net.TCPAddr).Port)))
	if every := c.kind.spec.DropEveryS; every > 0 {
		after := time.Duration(random.ExpFloat64() * every * 1e9)
		timer := time.AfterFunc(after, func() { c.end(dropped) })
		defer timer.Stop()
	}
	ending := false
	for {
		frame, err := framer.ReadFrame()
		if err != nil {
			return lost
		}
		if rate := c.kind.spec.ReadBytesPerS; rate > 0 {
			time.Sleep(time.Duration(float64(frame.Header().Length) / float64(rate) * 1e9))
		}
		id := frame.Header().StreamID
		switch f := frame.(type) {
		case *http2.SettingsFrame:
			if f.IsAck() {
				continue
			}
			c.settings(f)
			ready()
		case *http2.HeadersFrame:
			current = c.find(id)
			ending = f.StreamEnded()
			if _, err := decoder.Write(f.HeaderBlockFragment()); err != nil {
				return lost
			}
			if f.HeadersEnded() {
				_ = decoder.Close()
				c.headersEnded(current, ending)
			}
		case *http2.ContinuationFrame:
			if _, err := decoder.Write(f.HeaderBlockFragment()); err != nil {
				return lost
			}
			if f.HeadersEnded() {
				_ = decoder.Close()
				c.headersEnded(current, ending)
			}
		case *http2.DataFrame:
			if one := c.find(id); one != nil {
				one.body = append(one.body, f.Data()...)
				if f.StreamEnded() {
					c.complete(one)
				}
			}
			c.give(id, int(f.Length), f.StreamEnded())
		case *http2.RSTStreamFrame:
			if one := c.find(id); one != nil {
				one.status = "RESET_" + f.ErrCode.String()
				c.complete(one)
			}
		case *http2.PingFrame:
			if !f.IsAck() {
				c.mu.Lock()
				c.out = appendFrame(c.out, http2.FramePing, http2.FlagPingAck, 0, f.Data[:])
				c.nudge()
				c.mu.Unlock()
			}
		case *http2.WindowUpdateFrame:
			if id == 0 {
				c.mu.Lock()
				c.room += int64(f.Increment)
				c.unblock()
				c.mu.Unlock()
			}
		case *http2.GoAwayFrame:
			c.goAway(f.LastStreamID)
		}
	}
}

func (c *connection) settings(f *http2.SettingsFrame) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if v, ok := f.Value(http2.SettingMaxConcurrentStreams); ok {
		c.maxStreams = int(v)
	}
	if v, ok := f.Value(http2.SettingInitialWindowSize); ok {
		c.streamRoom = int64(v)
	}
	c.out = appendFrame(c.out, http2.FrameSettings, http2.FlagSettingsAck, 0, nil)
	c.nudge()
}

func (c *connection) unblock() {
	for len(c.blocked) > 0 && c.room >= int64(len(c.blocked[0].request.Message)+5) {
		c.send(c.blocked[0])
		c.blocked = c.blocked[1:]
	}
}

func (c *connection) find(id uint32) *call {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.flight[id]
}

// give hands received bytes back to the windows.
func (c *connection) give(id uint32, size int, ended bool) {
	c.unacked += size
	back := 0
	if c.unacked*4 >= int(c.kind.spec.Window) || (c.unacked > 0 && c.kind.spec.Window <= defaultSends) {
		back, c.unacked = c.unacked, 0
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if back > 0 {
		c.out = appendFrame(c.out, http2.FrameWindowUpdate, 0, 0, binary.BigEndian.AppendUint32(nil, uint32(back)))
		c.nudge()
	}
	if one := c.flight[id]; one != nil && !ended && size > 0 {
		one.received += size
		if one.received*4 >= int(c.kind.spec.StreamWindow) {
			c.out = appendFrame(c.out, http2.FrameWindowUpdate, 0, id, binary.BigEndian.AppendUint32(nil, uint32(one.received)))
			one.received = 0
			c.nudge()
		}
	}
}

func (c *connection) headersEnded(one *call, ended bool) {
	if one != nil && ended {
		c.complete(one)
	}
}

func (c *connection) goAway(last uint32) {
	c.mu.Lock()
	if !c.leaving {
		close(c.told)
	}
	c.leaving = true
	var back []*call
	for id, one := range c.flight {
		if id > last {
			one.ended = true
			back = append(back, one)
			delete(c.flight, id)
		}
	}
	empty := len(c.flight) == 0
	c.mu.Unlock()
	c.kind.replace(c)
	for _, one := range back {
		c.kind.load.finish(one, "GOAWAY")
	}
	if empty {
		c.socket.Close()
	}
}

// complete ends a call by what the server said.
func (c *connection) complete(one *call) {
	c.mu.Lock()
	if one.ended {
		c.mu.Unlock()
		return
	}
	one.ended = true
	delete(c.flight, one.id)
	last := c.leaving && len(c.flight) == 0
	c.mu.Unlock()
	code := one.status
	if n, err := strconv.Atoi(code); err == nil && n >= 0 && n < len(codeNames) {
		code = codeNames[n]
	} else if code == "" {
		code = "NO_STATUS"
	}
	c.kind.load.finish(one, code)
	if last {
		c.socket.Close()
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

func appendFrame(out []byte, kind http2.FrameType, flags http2.Flags, id uint32, payload []byte) []byte {
	n := len(payload)
	out = append(out, byte(n>>16), byte(n>>8), byte(n), byte(kind), byte(flags))
	out = binary.BigEndian.AppendUint32(out, id)
	return append(out, payload...)
}
