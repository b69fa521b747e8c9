//! What of a request's headers is gRPC's own, and what is the caller's metadata.

use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue};

pub const TIMEOUT: &str = "grpc-timeout";
pub const ENCODING: &str = "grpc-encoding";
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The time that `grpc-timeout` gives: up to eight digits and a unit. None when absent or malformed,
/// as gRPC's own servers take it.
pub fn timeout(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(TIMEOUT)?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let n: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(n * 3600)),
        "M" => Some(Duration::from_secs(n * 60)),
        "S" => Some(Duration::from_secs(n)),
        "m" => Some(Duration::from_millis(n)),
        "u" => Some(Duration::from_micros(n)),
        "n" => Some(Duration::from_nanos(n)),
        _ => None,
    }
}

/// The id that the caller gives this call, if it is one that Python would take.
pub fn request_id(headers: &HeaderMap) -> Option<&HeaderValue> {
    let known = |b: &u8| b.is_ascii_alphanumeric() || b"._:-".contains(b);
    let id = headers.get(REQUEST_ID)?;
    ((1..=128).contains(&id.len()) && id.as_bytes().iter().all(known)).then_some(id)
}

/// Whether the messages of this call are compressed by gzip.
pub fn is_gzip(headers: &HeaderMap) -> bool {
    headers.get(ENCODING).is_some_and(|v| v == "gzip")
}

/// The caller's text metadata: all but gRPC's own headers and binary values.
pub fn pairs(headers: &HeaderMap) -> impl Iterator<Item = (&str, &str)> {
    values(headers).filter_map(|(name, value)| Some((name, value.to_str().ok()?)))
}

/// As `pairs`, whatever the values are.
pub fn values(headers: &HeaderMap) -> impl Iterator<Item = (&str, &HeaderValue)> {
    let all = headers.iter().map(|(name, value)| (name.as_str(), value));
    all.filter(|(name, _)| {
        let own = matches!(
            *name,
            "te" | "content-type" | "grpc-timeout" | "grpc-encoding"
        );
        !own && !matches!(*name, "grpc-accept-encoding" | "accept-encoding")
            && !name.ends_with("-bin")
    })
}

/// Trailers, or an answer's headers. What no header can hold is left out: it is no reason to lose an
/// answer.
pub fn map(pairs: Vec<(String, String)>) -> HeaderMap {
    let mut map = HeaderMap::with_capacity(pairs.len() + 3);
    for (name, value) in pairs {
        if let (Ok(name), Ok(value)) = (HeaderName::try_from(name), HeaderValue::try_from(value)) {
            map.append(name, value);
        }
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(name: &'static str, value: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(name, HeaderValue::from_str(value).unwrap());
        headers
    }

    #[test]
    fn timeouts_are_read_by_unit() {
        for (text, seconds) in [
            ("2H", 7200.0),
            ("3M", 180.0),
            ("4S", 4.0),
            ("5m", 0.005),
            ("6u", 6e-6),
            ("99999999n", 0.099_999_999),
        ] {
            let got = timeout(&with(TIMEOUT, text)).unwrap().as_secs_f64();
            assert!((got - seconds).abs() < 1e-12, "{text}");
        }
        for text in ["", "S", "1", "1X", "123456789S", "-1S", "1 S", "0x1S"] {
            assert_eq!(timeout(&with(TIMEOUT, text)), None, "{text:?}");
        }
        assert_eq!(timeout(&HeaderMap::new()), None);
    }

    #[test]
    fn ids_that_are_none_are_not_repeated() {
        let given = |id: &str| request_id(&with("x-request-id", id)).is_some();
        assert!(given("a.B_7:-") && given(&"a".repeat(128)));
        assert!(!given("") && !given("a b") && !given(&"a".repeat(129)));
    }

    #[test]
    fn only_the_callers_text_metadata_goes_on() {
        let mut headers = with("x-request-id", "a");
        for name in ["te", "content-type", TIMEOUT, ENCODING, "trace-bin"] {
            headers.insert(name, HeaderValue::from_static("x"));
        }
        headers.insert("bad", HeaderValue::from_bytes(b"\xff").unwrap());
        assert_eq!(pairs(&headers).collect::<Vec<_>>(), [("x-request-id", "a")]);
    }
}
