//! Messages taken apart at one of their fields: what callers repeat from call to call (the head), and
//! what differs (the records). Knows protobuf's wire format, and no message of anybody's contract.

use std::ops::Range;

use crate::wire::{Field, field};

/// A longer head is nothing that callers repeat.
const MAX_HEAD: usize = 4 << 10;

/// One message.
#[derive(Debug, PartialEq, Eq)]
pub struct Parts {
    /// The other fields as they came: a message of its own.
    pub head: Vec<u8>,
    /// Where each record's bytes stand in the message.
    pub records: Vec<Range<usize>>,
}

/// Takes a message apart at the field `number`. `None` when it is malformed, has no records, or has a
/// record that is not length-delimited.
pub fn split(data: &[u8], number: u64) -> Option<Parts> {
    let mut parts = Parts {
        head: Vec::new(),
        records: Vec::new(),
    };
    let mut rest = data;
    while !rest.is_empty() {
        let start = data.len() - rest.len();
        let (n, value) = field(&mut rest)?;
        let end = data.len() - rest.len();
        if n != number {
            parts.head.extend_from_slice(&data[start..end]);
            if n == 0 || parts.head.len() > MAX_HEAD {
                return None;
            }
            continue;
        }
        let Field::Bytes(record) = value else {
            return None;
        };
        parts.records.push(end - record.len()..end);
    }
    (!parts.records.is_empty()).then_some(parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn head_and_records_are_told_apart() {
        // 1: "ab", 2: "x", 2: "", 4: 7
        let data = b"\x0a\x02ab\x12\x01x\x12\x00\x20\x07";
        let parts = split(data, 2).unwrap();
        assert_eq!(parts.head, b"\x0a\x02ab\x20\x07");
        assert_eq!(parts.records, [6..7, 9..9]);
        assert_eq!(split(data, 3), None, "no records");
    }

    #[test]
    fn what_is_no_message_is_left_alone() {
        for data in [
            &b"\x12\x05x"[..],
            b"\x10\x01",
            b"\x00\x00\x12\x00",
            b"\x12\x00\x0b",
            b"\xff",
        ] {
            assert_eq!(split(data, 2), None, "{data:?}");
        }
        let mut long = b"\x0a\xff\xff\x03".to_vec();
        long.resize(4 + 0xffff, 0);
        long.extend(b"\x12\x00");
        assert_eq!(split(&long, 2), None, "too long a head");
    }
}
