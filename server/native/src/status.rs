//! Status codes, and how a status looks on the wire.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use http::{HeaderMap, HeaderName, HeaderValue};
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};

pub const STATUS: HeaderName = HeaderName::from_static("grpc-status");
pub const MESSAGE: HeaderName = HeaderName::from_static("grpc-message");
pub const DETAILS: HeaderName = HeaderName::from_static("grpc-status-details-bin");
/// Milliseconds after which a client's retry policy tries again; -1: not at all.
pub const PUSHBACK: HeaderName = HeaderName::from_static("grpc-retry-pushback-ms");
/// What gRPC does not let stand as it is; all that is not ASCII is escaped too.
const ESCAPED: &AsciiSet = &CONTROLS.add(b'%').add(0x7f);

/// The codes that this crate itself answers with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Code {
    InvalidArgument = 3,
    DeadlineExceeded = 4,
    ResourceExhausted = 8,
    Unimplemented = 12,
    Unavailable = 14,
}

/// An error that is answered here, without Python.
#[derive(Clone, Debug)]
pub struct Refusal {
    pub code: Code,
    pub message: String,
    /// A serialised google.rpc.Status; may be empty.
    pub details: Vec<u8>,
    /// After how long the call may come again.
    pub retry: Option<Duration>,
}

impl Refusal {
    pub fn new(code: Code, message: &str) -> Self {
        Self {
            code,
            message: message.to_owned(),
            details: Vec::new(),
            retry: None,
        }
    }

    /// With these details: a serialised google.rpc.Status without a message, for it is added here.
    #[must_use]
    pub fn with_details(mut self, status: &[u8]) -> Self {
        self.details = status.to_vec();
        self.details.push(2 << 3 | 2); // the field `message`, a string
        let mut length = self.message.len();
        while length > 0x7f {
            self.details.push(length as u8 | 0x80);
            length >>= 7;
        }
        self.details.push(length as u8);
        self.details.extend(self.message.as_bytes());
        self
    }

    pub fn trailers(&self) -> HeaderMap {
        trailers(
            self.code as u8,
            &self.message,
            &self.details,
            HeaderMap::new(),
        )
    }

    /// What a call that has so much time is told of when to come again: not at all where it would be too
    /// late by then, or where the refusal would stay the same.
    pub fn pushback(&self, left: Option<Duration>) -> HeaderValue {
        match self.retry {
            Some(wait) if left.is_none_or(|left| wait < left) => {
                HeaderValue::from(u64::try_from(wait.as_millis()).unwrap_or(u64::MAX).max(1))
            }
            _ => HeaderValue::from_static("-1"),
        }
    }
}

/// The status as trailers, added to `more`.
pub fn trailers(code: u8, message: &str, details: &[u8], mut more: HeaderMap) -> HeaderMap {
    more.insert(STATUS, HeaderValue::from(u16::from(code)));
    if !message.is_empty() {
        let text = utf8_percent_encode(message, ESCAPED).to_string();
        if let Ok(value) = HeaderValue::try_from(text) {
            more.insert(MESSAGE, value);
        }
    }
    if !details.is_empty()
        && let Ok(value) = HeaderValue::try_from(STANDARD_NO_PAD.encode(details))
    {
        more.insert(DETAILS, value);
    }
    more
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn details_have_the_message_of_the_refusal() {
        let long = "x".repeat(300);
        for (text, length) in [("much", &[4][..]), (&long, &[0xac, 2])] {
            let refusal = Refusal::new(Code::ResourceExhausted, text).with_details(b"\x08\x08");
            let expected = [&[8, 8, 0x12], length, text.as_bytes()].concat();
            assert_eq!(refusal.details, expected);
        }
    }

    #[test]
    fn who_would_come_again_too_late_is_told_not_to() {
        let mut full = Refusal::new(Code::ResourceExhausted, "full");
        assert_eq!(full.pushback(None), "-1");
        full.retry = Some(Duration::from_millis(100));
        assert_eq!(full.pushback(None), "100");
        assert_eq!(full.pushback(Some(Duration::from_millis(101))), "100");
        assert_eq!(full.pushback(Some(Duration::from_millis(100))), "-1");
        full.retry = Some(Duration::ZERO);
        assert_eq!(full.pushback(None), "1", "0 would be at once");
    }

    #[test]
    fn any_text_makes_a_header() {
        let t = trailers(3, "ü 100%\n\u{1F4A7}", b"\x00\xff", HeaderMap::new());
        assert_eq!(t[STATUS], "3");
        assert_eq!(t[MESSAGE], "%C3%BC 100%25%0A%F0%9F%92%A7");
        assert_eq!(t[DETAILS], "AP8");
        let ok = trailers(0, "", b"", HeaderMap::new());
        assert_eq!((ok.len(), &ok[STATUS]), (1, &HeaderValue::from_static("0")));
    }
}
