//! Timeouts are what gRPC's grammar says and nothing else; metadata that goes on is text, and none of
//! gRPC's own.
#![no_main]

use std::time::{Duration, Instant};

use forebay_native::metadata::{ENCODING, TIMEOUT, is_gzip, pairs, timeout};
use http::{HeaderMap, HeaderName, HeaderValue};
use libfuzzer_sys::fuzz_target;

const NAMES: [&str; 8] = [
    TIMEOUT,
    ENCODING,
    "te",
    "content-type",
    "grpc-accept-encoding",
    "x-request-id",
    "authorization",
    "trace-bin",
];

/// The grammar, written anew: TimeoutValue of 1 to 8 digits, TimeoutUnit.
fn nanoseconds(text: &[u8]) -> Option<u128> {
    let (unit, digits) = text.split_last()?;
    if !(1..=8).contains(&digits.len()) {
        return None;
    }
    let mut n = 0_u128;
    for d in digits {
        n = n * 10 + u128::from(d.checked_sub(b'0').filter(|d| *d < 10)?);
    }
    let scale = match unit {
        b'H' => 3_600_000_000_000,
        b'M' => 60_000_000_000,
        b'S' => 1_000_000_000,
        b'm' => 1_000_000,
        b'u' => 1_000,
        b'n' => 1,
        _ => return None,
    };
    Some(n * scale)
}

fuzz_target!(|input: Vec<(u8, Vec<u8>, Vec<u8>)>| {
    let mut headers = HeaderMap::new();
    for (kind, name, value) in &input {
        let known = NAMES.get(usize::from(*kind)).copied();
        let name = known.map_or_else(|| HeaderName::from_bytes(name).ok(), |n| n.parse().ok());
        if let (Some(name), Ok(value)) = (name, HeaderValue::from_bytes(value)) {
            headers.append(name, value);
        }
    }
    let expected = headers.get(TIMEOUT).and_then(|v| nanoseconds(v.as_bytes()));
    let got = timeout(&headers);
    assert_eq!(got.as_ref().map(Duration::as_nanos), expected);
    let _ = got.and_then(|t| Instant::now().checked_add(t));
    let first = headers.get(ENCODING).map(HeaderValue::as_bytes);
    assert_eq!(is_gzip(&headers), first == Some(b"gzip"));
    for (name, value) in pairs(&headers) {
        assert!(!name.ends_with("-bin") && name != TIMEOUT && name != "te");
        assert!(headers.get_all(name).iter().any(|v| v.as_bytes() == value.as_bytes()));
    }
});
