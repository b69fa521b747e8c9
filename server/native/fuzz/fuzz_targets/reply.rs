//! Whatever Python answers with, the wire carries the message whole, one status, and a status message
//! that reads back as it was written.
#![no_main]

use arbitrary::Arbitrary;
use bytes::{Buf, Bytes};
use forebay_native::call::Outcome;
use forebay_native::reply::answer;
use forebay_native::status::{self, MESSAGE, STATUS};
use http::{HeaderMap, HeaderName, HeaderValue};
use http_body_util::BodyExt;
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
struct Input {
    payload: Option<Vec<u8>>,
    /// Repeats the payload, to reach those that are not copied.
    large: bool,
    code: u8,
    message: String,
    details: Vec<u8>,
    trailers: Vec<(Vec<u8>, Vec<u8>)>,
}

fuzz_target!(|input: Input| {
    let mut more = HeaderMap::new();
    for (name, value) in &input.trailers {
        if let (Ok(name), Ok(value)) = (HeaderName::from_bytes(name), HeaderValue::from_bytes(value))
        {
            more.append(name, value);
        }
    }
    let trailers = status::trailers(input.code, &input.message, &input.details, more);
    let payload = input.payload.map(|p| {
        Bytes::from(if input.large { p.repeat(1 + (9 << 10) / p.len().max(1)) } else { p })
    });
    let response = answer(Outcome { payload: payload.clone(), trailers });
    let head = response.headers().clone();
    let body = futures_block(response.into_body().collect());
    let ending = if payload.is_some() {
        body.trailers().cloned().expect("an answer ends with trailers")
    } else {
        head
    };
    assert_eq!(ending.get_all(STATUS).iter().count(), 1);
    assert_eq!(ending[STATUS], input.code.to_string());
    if !input.message.is_empty() {
        let read = percent_encoding::percent_decode(ending[MESSAGE].as_bytes());
        assert_eq!(read.decode_utf8().unwrap(), input.message);
    }
    let mut wire = body.aggregate();
    match payload {
        None => assert!(!wire.has_remaining()),
        Some(payload) => {
            assert_eq!(wire.get_u8(), 0);
            assert_eq!(wire.get_u32() as usize, payload.len());
            assert_eq!(wire.copy_to_bytes(wire.remaining()), payload);
        }
    }
});

/// The body never waits: it is all there.
fn futures_block<T>(future: impl Future<Output = Result<T, impl std::fmt::Debug>>) -> T {
    let mut future = std::pin::pin!(future);
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    match future.as_mut().poll(&mut context) {
        std::task::Poll::Ready(out) => out.unwrap(),
        std::task::Poll::Pending => panic!("the body waits"),
    }
}
