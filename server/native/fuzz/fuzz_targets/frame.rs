//! A body gives the same message, or the same refusal, however it is cut into pieces; no message is
//! larger than the limit.
#![no_main]

use arbitrary::Arbitrary;
use bytes::Bytes;
use forebay_native::frame::{PREFIX, Receiver, frame};
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
struct Input {
    limit: u16,
    gzip: bool,
    /// True: the length in the prefix is made right, so that the message itself is reached.
    right: bool,
    flag: u8,
    body: Vec<u8>,
    cuts: Vec<u8>,
}

type Outcome = Result<Bytes, (u8, String)>;

fn receive(pieces: impl Iterator<Item = Bytes>, limit: usize, gzip: bool) -> Outcome {
    let mut receiver = Receiver::new(limit, gzip);
    let told = |r: forebay_native::status::Refusal| (r.code as u8, r.message);
    for piece in pieces {
        receiver.push(piece).map_err(told)?;
        assert!(receiver.expected() <= PREFIX + limit, "what is refused is expected");
    }
    receiver.finish().map_err(told)
}

fuzz_target!(|input: Input| {
    let limit = usize::from(input.limit);
    let mut body = input.body;
    if input.right {
        let length = u32::try_from(body.len()).unwrap();
        let mut whole = vec![input.flag & 1];
        whole.extend(length.to_be_bytes());
        whole.append(&mut body);
        body = whole;
    }
    let body = Bytes::from(body);
    let whole = receive(std::iter::once(body.clone()), limit, input.gzip);
    let mut rest = body.clone();
    let mut pieces = Vec::new();
    for cut in input.cuts {
        pieces.push(rest.split_to(usize::from(cut).min(rest.len())));
    }
    pieces.push(rest);
    let parts = receive(pieces.into_iter(), limit, input.gzip);
    match (&whole, &parts) {
        // Which of two faults is met first depends on what has come.
        (Err(_), Err(_)) => {}
        _ => assert_eq!(whole, parts),
    }
    let Ok(message) = whole else { return };
    assert!(message.len() <= limit);
    let (first, second) = frame(message.clone());
    let again = std::iter::once(first).chain(second);
    assert_eq!(receive(again, message.len(), false), Ok(message));
});
