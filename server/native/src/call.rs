//! What a call is on its way between a connection and Python, and how it ends.

use std::any::Any;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use bytes::Bytes;
use http::{HeaderMap, StatusCode};
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};

use crate::inbox::Room;
use crate::metadata;
use crate::status::Refusal;

/// How a call ends.
#[derive(Debug)]
pub struct Outcome {
    /// Of an HTTP answer; gRPC's is in the trailers.
    pub status: StatusCode,
    /// None for an error: then the trailers say which.
    pub payload: Option<Bytes>,
    pub trailers: HeaderMap,
}

impl Outcome {
    /// The end of a call of gRPC.
    pub fn new(payload: Option<Bytes>, trailers: HeaderMap) -> Self {
        Self {
            status: StatusCode::OK,
            payload,
            trailers,
        }
    }
}

/// What a call that is answered by a stream sends next.
#[derive(Debug)]
pub enum Event {
    Message(Bytes),
    /// Its payload is not looked at.
    End(Outcome),
}

/// The way back to whoever waits for an answer.
pub enum Back {
    One(oneshot::Sender<Outcome>),
    Many(mpsc::UnboundedSender<Event>),
}

impl Back {
    /// Ends the call. False when nobody waits.
    pub fn end(self, outcome: Outcome) -> bool {
        match self {
            Self::One(sender) => sender.send(outcome).is_ok(),
            Self::Many(sender) => sender.send(Event::End(outcome)).is_ok(),
        }
    }
}

/// Bytes of a stream's messages that wait for its reader: from here on it is behind...
const BEHIND: usize = 32 << 10;
/// ... until it has come back to this.
const CAUGHT_UP: usize = 8 << 10;

const WAITING: u8 = 0;
const TAKEN: u8 = 1;
const DROPPED: u8 = 2;

/// Who calls, and with what metadata: the same object for calls of a connection that say the same.
#[derive(Default)]
pub struct Caller {
    pub peer: Arc<str>,
    /// The caller's text metadata, in order.
    pub pairs: Vec<(String, String)>,
    /// Room for who looks for what was leased to such calls.
    pub leases_key: OnceLock<u64>,
    /// Room for Python's form of it.
    pub python: OnceLock<Box<dyn Any + Send + Sync>>,
}

impl Caller {
    pub fn new(peer: Arc<str>, headers: &HeaderMap) -> Self {
        let owned = |(n, v): (&str, &str)| (n.to_owned(), v.to_owned());
        Self {
            peer,
            pairs: metadata::pairs(headers).map(owned).collect(),
            leases_key: OnceLock::new(),
            python: OnceLock::new(),
        }
    }

    /// Whether a call with these headers says the same. (Of values that are no text it never does.)
    pub fn says(&self, headers: &HeaderMap) -> bool {
        let mine = self.pairs.iter().map(|(n, v)| (n.as_str(), v.as_bytes()));
        let theirs = metadata::values(headers).map(|(n, v)| (n, v.as_bytes()));
        theirs.eq(mine)
    }
}

/// One call between the connection that it came by and Python.
pub struct Call {
    /// Index into the server's list of methods.
    pub method: u32,
    pub message: Bytes,
    pub caller: Arc<Caller>,
    /// What the places of an HTTP route say.
    pub places: Vec<String>,
    pub received: Instant,
    pub deadline: Option<Instant>,
    /// Whatever Python wants to find again when it hears that the call is gone.
    pub owner: Mutex<Option<Box<dyn Any + Send>>>,
    state: AtomicU8,
    /// The room of its message, where nobody else keeps it.
    room: Mutex<Option<Room>>,
    answer: Mutex<Option<Back>>,
    /// Why it ends without an outcome.
    refused: Mutex<Option<Refusal>>,
    /// Bytes of its stream that nobody has read yet.
    unread: AtomicUsize,
    /// Python has been told that the reader is behind, and waits to hear the contrary.
    behind: AtomicBool,
}

impl Call {
    pub fn new(
        method: u32,
        message: Bytes,
        caller: Arc<Caller>,
        deadline: Option<Instant>,
        places: Vec<String>,
    ) -> (Arc<Self>, oneshot::Receiver<Outcome>) {
        let (sender, receiver) = oneshot::channel();
        let back = Back::One(sender);
        (
            Self::with(method, message, caller, deadline, places, back),
            receiver,
        )
    }

    /// A call that is answered by a stream of messages.
    pub fn streamed(
        method: u32,
        message: Bytes,
        caller: Arc<Caller>,
        deadline: Option<Instant>,
    ) -> (Arc<Self>, mpsc::UnboundedReceiver<Event>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        let back = Back::Many(sender);
        (
            Self::with(method, message, caller, deadline, Vec::new(), back),
            receiver,
        )
    }

    fn with(
        method: u32,
        message: Bytes,
        caller: Arc<Caller>,
        deadline: Option<Instant>,
        places: Vec<String>,
        back: Back,
    ) -> Arc<Self> {
        Arc::new(Self {
            method,
            message,
            caller,
            places,
            received: Instant::now(),
            deadline,
            owner: Mutex::new(None),
            state: AtomicU8::new(WAITING),
            room: Mutex::new(None),
            answer: Mutex::new(Some(back)),
            refused: Mutex::default(),
            unread: AtomicUsize::new(0),
            behind: AtomicBool::new(false),
        })
    }

    /// Ends the call. False when it has ended before, or when nobody waits.
    pub fn end(&self, outcome: Outcome) -> bool {
        self.ending().is_some_and(|back| back.end(outcome))
    }

    /// Ends the call, if it has not ended, with what its connection is to say.
    pub fn refuse(&self, why: Refusal) {
        if let Some(back) = self.ending() {
            *self.refused.lock() = Some(why);
            drop(back);
        }
    }

    /// Why it ended without an outcome, for who waited for one.
    pub fn refusal(&self) -> Option<Refusal> {
        self.refused.lock().take()
    }

    /// The right to end the call; None when it has ended, or somebody else has it.
    pub fn ending(&self) -> Option<Back> {
        self.answer.lock().take()
    }

    /// Sends a message of the stream; nothing when it has ended. True when the reader is behind: no
    /// more should be sent until `Inbox::read` has said so.
    pub fn push(&self, message: Bytes) -> bool {
        let size = message.len();
        let answer = self.answer.lock();
        let Some(Back::Many(sender)) = answer.as_ref() else {
            return false;
        };
        // Counted first: the reader may be quicker.
        let unread = self.unread.fetch_add(size, Ordering::SeqCst) + size;
        if sender.send(Event::Message(message)).is_err() {
            return false;
        }
        if unread < BEHIND {
            return false;
        }
        self.behind.store(true, Ordering::SeqCst);
        // Read meanwhile? Then nobody would be told; unless the reader has seen the flag already.
        !(self.unread.load(Ordering::SeqCst) <= CAUGHT_UP
            && self.behind.swap(false, Ordering::SeqCst))
    }

    /// So many bytes of the stream have left. True when Python, told that the reader was behind, is
    /// to hear that it has caught up.
    pub(crate) fn read(&self, size: usize) -> bool {
        let unread = self.unread.fetch_sub(size, Ordering::SeqCst) - size;
        unread <= CAUGHT_UP && self.behind.swap(false, Ordering::SeqCst)
    }

    /// Python takes the call. False when its client has left before.
    pub(crate) fn take(&self) -> bool {
        self.leaves_waiting(TAKEN)
    }

    /// The client leaves. False when Python has taken the call, and has to be told.
    pub(crate) fn abandon(&self) -> bool {
        self.leaves_waiting(DROPPED)
    }

    /// Keeps the room of its message for as long as there is the message.
    pub(crate) fn keep(&self, room: Option<Room>) {
        *self.room.lock() = room;
    }

    fn leaves_waiting(&self, to: u8) -> bool {
        self.state
            .compare_exchange(WAITING, to, Ordering::AcqRel, Ordering::Acquire)
            .is_ok()
    }

    /// Whether Python has taken it, and not said yet whose it is.
    pub(crate) fn is_new(&self) -> bool {
        self.state.load(Ordering::Acquire) == TAKEN
            && self.owner.lock().is_none()
            && !self.answered()
    }

    /// Whether it has ended, or somebody is about to end it.
    pub(crate) fn answered(&self) -> bool {
        self.answer.lock().is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::Code;

    fn call() -> (Arc<Call>, oneshot::Receiver<Outcome>) {
        Call::new(0, Bytes::new(), Arc::default(), None, Vec::new())
    }

    fn ended() -> Outcome {
        Outcome::new(None, HeaderMap::new())
    }

    #[test]
    fn an_answer_counts_once() {
        let (call, mut answer) = call();
        assert!(!call.answered());
        assert!(call.end(ended()) && !call.end(ended()));
        assert!(call.answered() && answer.try_recv().is_ok());
    }

    #[test]
    fn a_refused_call_has_no_outcome_and_says_why() {
        let full = || Refusal::new(Code::ResourceExhausted, "full");
        let (call, mut answer) = call();
        call.refuse(full());
        assert!(answer.try_recv().is_err() && !call.end(ended()));
        assert_eq!(call.refusal().unwrap().message, "full");
        let (call, mut answer) = super::tests::call();
        call.end(ended());
        call.refuse(full());
        assert!(answer.try_recv().is_ok() && call.refusal().is_none());
    }

    #[test]
    fn a_call_is_taken_or_abandoned_and_never_both() {
        let ((taken, _t), (left, _l)) = (call(), call());
        assert!(taken.take() && !taken.abandon());
        assert!(left.abandon() && !left.take());
    }

    #[test]
    fn a_stream_keeps_its_order_and_says_when_its_reader_is_behind() {
        let (call, mut events) = Call::streamed(0, Bytes::new(), Arc::default(), None);
        let piece = |n: u8| Bytes::from(vec![n; BEHIND / 2]);
        assert!(!call.push(piece(1)));
        assert!(call.push(piece(2)), "behind");
        call.end(ended());
        assert!(!call.push(piece(3)), "it has ended");
        for n in 1..=2 {
            let Ok(Event::Message(m)) = events.try_recv() else {
                panic!("no message");
            };
            assert_eq!(m[0], n);
            assert_eq!(call.read(m.len()), n == 2, "told once it has caught up");
        }
        assert!(matches!(events.try_recv(), Ok(Event::End(_))));
        assert!(events.try_recv().is_err());
    }
}
