package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
)

// Check says what one value of an answer must be. The answer is read as protobuf's wire format.
type Check struct {
	// Field numbers from the message inwards; a number may carry an index: [1, 2] is field 2 of the
	// first field 1, Index picks another occurrence of the first number.
	Path  []uint64 `json:"path"`
	Index int      `json:"index"`
	// double, float, floats (packed float32: the first len(Values) of them), bytes, string, count
	// (occurrences of the path's first number) or length (of packed float32).
	As     string    `json:"as"`
	Value  float64   `json:"value"`
	Values []float64 `json:"values"`
	Data   []byte    `json:"data"`
	Text   string    `json:"text"`
	// Greatest absolute difference, for numbers.
	Tolerance float64 `json:"tolerance"`
}

// verify gives "" when the answer is right, else what is wrong.
func (c *Check) verify(message []byte) string {
	if c.As == "count" {
		n := 0
		for walk := (walker{message}); ; n++ {
			if _, ok := walk.find(c.Path[0]); !ok {
				break
			}
		}
		if n != int(c.Value) {
			return fmt.Sprintf("field %d is there %d times, not %g", c.Path[0], n, c.Value)
		}
		return ""
	}
	value := message
	for depth, number := range c.Path {
		walk := walker{value}
		skip := 0
		if depth == 0 {
			skip = c.Index
		}
		found, ok := walk.find(number)
		for ; ok && skip > 0; skip-- {
			found, ok = walk.find(number)
		}
		if !ok {
			return fmt.Sprintf("field %v is missing", c.Path)
		}
		value = found
	}
	return c.compare(value)
}

func (c *Check) compare(value []byte) string {
	switch c.As {
	case "double":
		if len(value) != 8 {
			return "is no double"
		}
		got := math.Float64frombits(binary.LittleEndian.Uint64(value))
		return c.near(got, c.Value)
	case "float":
		if len(value) != 4 {
			return "is no float"
		}
		return c.near(float64(math.Float32frombits(binary.LittleEndian.Uint32(value))), c.Value)
	case "length":
		if len(value) != 4*int(c.Value) {
			return fmt.Sprintf("has %d bytes, not %d floats", len(value), int(c.Value))
		}
	case "floats":
		if len(value) < 4*len(c.Values) {
			return fmt.Sprintf("has %d bytes for %d floats", len(value), len(c.Values))
		}
		for i, want := range c.Values {
			got := math.Float32frombits(binary.LittleEndian.Uint32(value[4*i:]))
			if said := c.near(float64(got), want); said != "" {
				return said
			}
		}
	case "bytes":
		if !bytes.Equal(value, c.Data) {
			return fmt.Sprintf("is %x, not %x", head(value), head(c.Data))
		}
	case "string":
		if string(value) != c.Text {
			return fmt.Sprintf("is %q, not %q", head(value), c.Text)
		}
	default:
		return "unknown check " + c.As
	}
	return ""
}

func (c *Check) near(got, want float64) string {
	if math.Abs(got-want) <= c.Tolerance {
		return ""
	}
	return fmt.Sprintf("%v is %v, not %v", c.Path, got, want)
}

func head(data []byte) []byte { return data[:min(len(data), 32)] }

// walker reads the fields of one message in order.
type walker struct{ rest []byte }

// find gives the next field of this number: the bytes of a length-delimited or fixed-width one, the
// bytes of the varint else.
func (w *walker) find(number uint64) ([]byte, bool) {
	for len(w.rest) > 0 {
		tag, n := binary.Uvarint(w.rest)
		if n <= 0 {
			break
		}
		w.rest = w.rest[n:]
		size := 0
		switch tag & 7 {
		case 0:
			_, size = binary.Uvarint(w.rest)
		case 1:
			size = 8
		case 2:
			length, n := binary.Uvarint(w.rest)
			if n <= 0 || length > uint64(len(w.rest)-n) {
				w.rest = nil
				return nil, false
			}
			w.rest = w.rest[n:]
			size = int(length)
		case 5:
			size = 4
		default:
			size = -1
		}
		if size < 0 || size > len(w.rest) {
			break
		}
		value := w.rest[:size]
		w.rest = w.rest[size:]
		if tag>>3 == number {
			return value, true
		}
	}
	w.rest = nil
	return nil, false
}
