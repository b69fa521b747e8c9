//! gRPC's message framing: one flag byte, four bytes of length, the message.

use std::io::Read;

use bytes::{BufMut, Bytes, BytesMut};
use flate2::read::GzDecoder;

use crate::status::{Code, Refusal};

/// Flag and length before each message.
pub const PREFIX: usize = 5;
/// From this size on, a message goes to the socket without being copied behind its prefix.
const COPY_BELOW: usize = 8 << 10;

/// Gathers the body of a unary request, and gives its one message.
#[derive(Debug)]
pub struct Receiver {
    limit: usize,
    gzip: bool,
    head: BytesMut,
    whole: Option<Bytes>,
}

impl Receiver {
    /// `limit`: most bytes of a message, compressed or not. `gzip`: what `grpc-encoding` says.
    pub fn new(limit: usize, gzip: bool) -> Self {
        Self {
            limit,
            gzip,
            head: BytesMut::new(),
            whole: None,
        }
    }

    /// Adds a piece of the body. Fails as soon as the length in the prefix is known to be too much.
    pub fn push(&mut self, piece: Bytes) -> Result<(), Refusal> {
        if self.head.is_empty() && self.whole.is_none() {
            self.whole = Some(piece); // most messages come in one piece, and are not copied
        } else {
            if let Some(first) = self.whole.take() {
                self.head.reserve(first.len() + piece.len());
                self.head.put(first);
            }
            self.head.put(piece);
        }
        self.check(self.body())
    }

    /// Bytes of the whole body; 0 before its prefix has come.
    pub fn expected(&self) -> usize {
        let body = self.body();
        if body.len() < PREFIX {
            return 0;
        }
        PREFIX + length_of(body)
    }

    /// Whether the message is compressed, in a way that is known here.
    pub fn is_packed(&self) -> bool {
        self.gzip && self.body().first() == Some(&1)
    }

    /// A compressed message, when the body has ended, if it has no more than `most` bytes. Else `finish`
    /// says what it is, and may take long.
    pub fn short(&self, most: usize) -> Option<Bytes> {
        let body = self.body();
        if !self.is_packed() || body.len() < PREFIX || body.len() != PREFIX + length_of(body) {
            return None;
        }
        gunzip(&body[PREFIX..], most.min(self.limit)).ok()
    }

    fn body(&self) -> &[u8] {
        self.whole.as_deref().unwrap_or(&self.head)
    }

    fn check(&self, body: &[u8]) -> Result<(), Refusal> {
        if body.len() < PREFIX {
            return Ok(());
        }
        let length = length_of(body);
        if length > self.limit {
            return Err(too_large(length, self.limit));
        }
        if body.len() > PREFIX + length {
            return Err(Refusal::new(
                Code::InvalidArgument,
                "a unary call takes one message",
            ));
        }
        Ok(())
    }

    /// The message, when the body has ended.
    pub fn finish(self) -> Result<Bytes, Refusal> {
        let body = self.whole.unwrap_or_else(|| self.head.freeze());
        if body.len() < PREFIX || body.len() != PREFIX + length_of(&body) {
            let text = if body.is_empty() {
                "the call has no message"
            } else {
                "the body ended within the message"
            };
            return Err(Refusal::new(Code::InvalidArgument, text));
        }
        let message = body.slice(PREFIX..);
        match body[0] {
            0 => Ok(message),
            1 if self.gzip => gunzip(&message, self.limit),
            1 => Err(Refusal::new(
                Code::Unimplemented,
                "the message is compressed by something else than gzip",
            )),
            _ => Err(Refusal::new(
                Code::InvalidArgument,
                "the message's flag is neither 0 nor 1",
            )),
        }
    }
}

fn length_of(body: &[u8]) -> usize {
    u32::from_be_bytes([body[1], body[2], body[3], body[4]]) as usize
}

fn too_large(size: usize, limit: usize) -> Refusal {
    Refusal::new(
        Code::ResourceExhausted,
        &format!("the message has {size} bytes; the limit is {limit}"),
    )
}

fn gunzip(data: &[u8], limit: usize) -> Result<Bytes, Refusal> {
    let mut out = Vec::new();
    // One byte more than the limit tells "too large" from "just fits".
    let read = GzDecoder::new(data)
        .take(limit as u64 + 1)
        .read_to_end(&mut out);
    match read {
        Err(_) => Err(Refusal::new(
            Code::InvalidArgument,
            "the message is not valid gzip",
        )),
        Ok(n) if n > limit => Err(too_large(n, limit)),
        Ok(_) => Ok(out.into()),
    }
}

/// A message as it goes to the wire: prefix and message in one piece, or in two when copying costs.
pub fn frame(payload: Bytes) -> (Bytes, Option<Bytes>) {
    let copied = payload.len() < COPY_BELOW;
    let mut out = BytesMut::with_capacity(PREFIX + if copied { payload.len() } else { 0 });
    out.put_u8(0);
    out.put_u32(u32::try_from(payload.len()).unwrap_or(u32::MAX));
    if copied {
        out.put(payload);
        (out.freeze(), None)
    } else {
        (out.freeze(), Some(payload))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn framed(flag: u8, message: &[u8]) -> Bytes {
        let mut out = vec![flag];
        out.extend((message.len() as u32).to_be_bytes());
        out.extend(message);
        out.into()
    }

    fn receive(pieces: &[Bytes], limit: usize, gzip: bool) -> Result<Bytes, Refusal> {
        let mut receiver = Receiver::new(limit, gzip);
        for piece in pieces {
            receiver.push(piece.clone())?;
        }
        receiver.finish()
    }

    #[test]
    fn a_message_survives_any_split() {
        let body = framed(0, b"hello");
        for at in 0..=body.len() {
            for to in at..=body.len() {
                let pieces = [body.slice(..at), body.slice(at..to), body.slice(to..)];
                assert_eq!(receive(&pieces, 100, false).unwrap(), "hello");
            }
        }
    }

    #[test]
    fn a_length_beyond_the_limit_is_refused_before_its_bytes_come() {
        let body = framed(0, &[0; 101]);
        let error = Receiver::new(100, false)
            .push(body.slice(..PREFIX))
            .unwrap_err();
        assert_eq!(error.code, Code::ResourceExhausted);
        assert!(receive(&[framed(0, &[0; 100])], 100, false).is_ok());
    }

    #[test]
    fn bodies_that_are_not_one_message_are_refused() {
        let two = [framed(0, b"a"), framed(0, b"b")].concat().into();
        for body in [
            Bytes::new(),
            framed(0, b"abc").slice(..6),
            two,
            framed(7, b"a"),
        ] {
            assert_eq!(
                receive(&[body], 100, false).unwrap_err().code,
                Code::InvalidArgument
            );
        }
        assert_eq!(
            receive(&[framed(1, b"a")], 9, false).unwrap_err().code,
            Code::Unimplemented
        );
    }

    #[test]
    fn gzip_is_read_and_bounded() {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(&vec![7; 100_000]).unwrap();
        let body = framed(1, &encoder.finish().unwrap());
        assert_eq!(
            receive(std::slice::from_ref(&body), 100_000, true)
                .unwrap()
                .len(),
            100_000
        );
        let bomb = receive(&[body], 99_999, true).unwrap_err();
        assert_eq!(bomb.code, Code::ResourceExhausted);
        let broken = receive(&[framed(1, b"no gzip")], 100, true).unwrap_err();
        assert_eq!(broken.code, Code::InvalidArgument);
    }

    #[test]
    fn what_unpacks_to_little_is_told_from_what_may_take_long() {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(&[7; 1000]).unwrap();
        let body = framed(1, &encoder.finish().unwrap());
        let short = |body: &Bytes, most, gzip| {
            let mut receiver = Receiver::new(1 << 20, gzip);
            receiver.push(body.clone()).unwrap();
            receiver.short(most)
        };
        assert_eq!(short(&body, 1000, true).unwrap().len(), 1000);
        assert!(short(&body, 999, true).is_none());
        assert!(short(&body, 1000, false).is_none());
        for end in 0..body.len() {
            assert!(short(&body.slice(..end), 1000, true).is_none());
        }
        assert!(short(&framed(0, &[7; 1000]), 1000, true).is_none());
    }

    #[test]
    fn random_bodies_never_panic() {
        let mut seed = 7_u64;
        let mut next = move || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (seed >> 33) as usize
        };
        for _ in 0..20_000 {
            let mut receiver = Receiver::new(64, next() % 2 == 0);
            let mut open = true;
            for _ in 0..next() % 4 {
                let piece: Vec<u8> = (0..next() % 12).map(|_| (next() % 4) as u8).collect();
                open &= receiver.push(piece.into()).is_ok();
            }
            if open {
                let _ = receiver.finish();
            }
        }
    }

    #[test]
    fn large_messages_are_not_copied() {
        let large = Bytes::from(vec![1; COPY_BELOW]);
        let (prefix, rest) = frame(large.clone());
        assert_eq!(
            (prefix.len(), rest.unwrap().as_ptr()),
            (PREFIX, large.as_ptr())
        );
        assert_eq!(frame(Bytes::from_static(b"ab")).0, framed(0, b"ab"));
    }
}
