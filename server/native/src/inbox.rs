//! Where calls wait for Python, and where Python hears of those that nobody waits for any more.

use std::any::Any;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderMap, StatusCode};
use parking_lot::{Condvar, Mutex};
use tokio::sync::{mpsc, oneshot};

use crate::metadata;
use crate::status::{Code, Refusal};

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
    /// Room for Python's form of it.
    pub python: OnceLock<Box<dyn Any + Send + Sync>>,
}

impl Caller {
    pub fn new(peer: Arc<str>, headers: &HeaderMap) -> Self {
        let owned = |(n, v): (&str, &str)| (n.to_owned(), v.to_owned());
        Self {
            peer,
            pairs: metadata::pairs(headers).map(owned).collect(),
            python: OnceLock::new(),
        }
    }

    /// Whether a call with these headers says the same.
    pub fn says(&self, headers: &HeaderMap) -> bool {
        let mine = self.pairs.iter().map(|(n, v)| (n.as_str(), v.as_str()));
        metadata::pairs(headers).eq(mine)
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
    answer: Mutex<Option<Back>>,
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
            answer: Mutex::new(Some(back)),
            unread: AtomicUsize::new(0),
            behind: AtomicBool::new(false),
        })
    }

    /// Ends the call. False when it has ended before, or when nobody waits.
    pub fn end(&self, outcome: Outcome) -> bool {
        self.ending().is_some_and(|back| back.end(outcome))
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

    fn answered(&self) -> bool {
        self.answer.lock().is_none()
    }
}

/// Why Python hears of a call again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gone {
    /// The client reset the call, or its connection ended.
    Cancelled,
    /// The deadline passed.
    Late,
    /// It is not gone: the reader of its stream has caught up.
    Ready,
}

/// What `take` gives: calls that start, and calls that were taken and are gone.
pub type Taken = (Vec<Arc<Call>>, Vec<(Arc<Call>, Gone)>);

/// Bounds of all that waits at once, over all connections.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Calls that wait for Python.
    pub calls: usize,
    /// Bytes of messages, those that are on their way included.
    pub bytes: usize,
    /// While a call has waited longer than this, no more are taken: they would only wait longer.
    pub wait: Duration,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<Arc<Call>>,
    gone: Vec<(Arc<Call>, Gone)>,
    closed: bool,
}

/// See the module.
pub struct Inbox {
    bounds: Bounds,
    state: Mutex<State>,
    ready: Condvar,
    bytes: AtomicUsize,
    /// Calls that were refused because too many waited.
    pub refused: AtomicUsize,
    /// Calls whose client left before Python took them.
    pub abandoned: AtomicUsize,
}

impl Inbox {
    pub fn new(bounds: Bounds) -> Self {
        Self {
            bounds,
            state: Mutex::default(),
            ready: Condvar::new(),
            bytes: AtomicUsize::new(0),
            refused: AtomicUsize::new(0),
            abandoned: AtomicUsize::new(0),
        }
    }

    /// Room for `more` bytes of messages, given back when the value is dropped. None when full.
    pub fn reserve(self: &Arc<Self>, more: usize) -> Option<Reservation> {
        let before = self.bytes.fetch_add(more, Ordering::Relaxed);
        let reservation = Reservation {
            inbox: self.clone(),
            bytes: more,
        };
        if before + more > self.bounds.bytes {
            self.refused.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        Some(reservation)
    }

    /// Hands a call over. False when too many wait.
    pub fn put(&self, call: Arc<Call>) -> bool {
        let mut state = self.state.lock();
        let aged = |first: &Arc<Call>| first.received.elapsed() > self.bounds.wait;
        if state.closed
            || state.waiting.len() >= self.bounds.calls
            || state.waiting.front().is_some_and(aged)
        {
            self.refused.fetch_add(1, Ordering::Relaxed);
            return false;
        }
        state.waiting.push_back(call);
        if state.waiting.len() == 1 {
            self.ready.notify_one();
        }
        true
    }

    /// Says that nobody waits for this call's answer, or that it is late.
    pub fn leave(&self, call: &Arc<Call>, why: Gone) {
        if call.answered() {
            return;
        }
        if why == Gone::Cancelled
            && call
                .state
                .compare_exchange(WAITING, DROPPED, Ordering::AcqRel, Ordering::Acquire)
                .is_ok()
        {
            self.abandoned.fetch_add(1, Ordering::Relaxed);
            return;
        }
        self.tell(call, why);
    }

    /// So many bytes of a call's stream have left.
    pub fn read(&self, call: &Arc<Call>, size: usize) {
        let unread = call.unread.fetch_sub(size, Ordering::SeqCst) - size;
        if unread <= CAUGHT_UP && call.behind.swap(false, Ordering::SeqCst) {
            self.tell(call, Gone::Ready);
        }
    }

    fn tell(&self, call: &Arc<Call>, why: Gone) {
        let mut state = self.state.lock();
        state.gone.push((call.clone(), why));
        if state.gone.len() == 1 {
            self.ready.notify_one();
        }
    }

    /// Waits for calls; empty after `timeout`, or when closed.
    pub fn take(&self, most: usize, timeout: Duration) -> Taken {
        let until = Instant::now() + timeout;
        let mut state = self.state.lock();
        loop {
            let mut taken = Vec::with_capacity(most.min(state.waiting.len()));
            while taken.len() < most {
                let Some(call) = state.waiting.pop_front() else {
                    break;
                };
                let was = call.state.compare_exchange(
                    WAITING,
                    TAKEN,
                    Ordering::AcqRel,
                    Ordering::Acquire,
                );
                if was.is_ok() {
                    taken.push(call);
                }
            }
            if !state.waiting.is_empty() {
                self.ready.notify_one();
            }
            let gone = std::mem::take(&mut state.gone);
            if !taken.is_empty() || !gone.is_empty() || state.closed {
                return (taken, gone);
            }
            if self.ready.wait_until(&mut state, until).timed_out() && state.waiting.is_empty() {
                return Taken::default();
            }
        }
    }

    /// No more calls: those that wait end as UNAVAILABLE.
    pub fn close(&self) {
        let mut state = self.state.lock();
        state.closed = true;
        let error = Refusal::new(Code::Unavailable, "the server is shutting down");
        for call in state.waiting.drain(..) {
            call.end(Outcome::new(None, error.trailers()));
        }
        self.ready.notify_all();
    }

    /// Calls that wait.
    pub fn waiting(&self) -> usize {
        self.state.lock().waiting.len()
    }

    /// Bytes of messages that are held.
    pub fn held(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }
}

/// See `Inbox::reserve`.
pub struct Reservation {
    inbox: Arc<Inbox>,
    bytes: usize,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.inbox.bytes.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call() -> (Arc<Call>, oneshot::Receiver<Outcome>) {
        Call::new(
            0,
            Bytes::from_static(b"m"),
            Arc::default(),
            None,
            Vec::new(),
        )
    }

    fn inbox_with(calls: usize, wait: Duration) -> Arc<Inbox> {
        let bytes = 100;
        Arc::new(Inbox::new(Bounds { calls, bytes, wait }))
    }

    fn inbox(calls: usize) -> Arc<Inbox> {
        inbox_with(calls, Duration::from_secs(60))
    }

    #[test]
    fn calls_come_out_in_order_and_within_the_bound() {
        let inbox = inbox(2);
        let calls: Vec<_> = (0..3).map(|_| call()).collect();
        let put: Vec<_> = calls.iter().map(|(c, _)| inbox.put(c.clone())).collect();
        assert_eq!(put, [true, true, false]);
        let (first, _) = inbox.take(1, Duration::ZERO);
        let (second, _) = inbox.take(9, Duration::ZERO);
        assert!(Arc::ptr_eq(&first[0], &calls[0].0) && Arc::ptr_eq(&second[0], &calls[1].0));
        assert_eq!(inbox.refused.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn while_a_call_waits_too_long_no_more_are_taken() {
        let inbox = inbox_with(9, Duration::from_millis(5));
        let ((first, _f), (second, _s), (third, _t)) = (call(), call(), call());
        assert!(inbox.put(first));
        std::thread::sleep(Duration::from_millis(10));
        assert!(!inbox.put(second.clone()));
        assert_eq!(inbox.take(9, Duration::ZERO).0.len(), 1);
        assert!(inbox.put(third), "nothing waits any more");
    }

    #[test]
    fn who_leaves_early_never_reaches_python_and_who_leaves_late_is_told() {
        let inbox = inbox(9);
        let (early, _e) = call();
        let (late, _l) = call();
        inbox.put(early.clone());
        inbox.leave(&early, Gone::Cancelled);
        inbox.put(late.clone());
        let (taken, gone) = inbox.take(9, Duration::ZERO);
        assert!(taken.len() == 1 && Arc::ptr_eq(&taken[0], &late) && gone.is_empty());
        inbox.leave(&late, Gone::Cancelled);
        let (taken, gone) = inbox.take(9, Duration::ZERO);
        assert!(taken.is_empty() && gone.len() == 1 && gone[0].1 == Gone::Cancelled);
    }

    #[test]
    fn an_answer_counts_once() {
        let (call, mut answer) = call();
        let outcome = || Outcome::new(None, HeaderMap::new());
        assert!(call.end(outcome()) && !call.end(outcome()));
        assert!(answer.try_recv().is_ok());
        let inbox = inbox(1);
        inbox.leave(&call, Gone::Cancelled);
        assert!(
            inbox.take(1, Duration::ZERO).1.is_empty(),
            "it has its answer"
        );
    }

    #[test]
    fn a_stream_keeps_its_order_and_says_when_its_reader_is_behind() {
        let inbox = inbox(9);
        let (call, mut events) = Call::streamed(0, Bytes::new(), Arc::default(), None);
        inbox.put(call.clone());
        inbox.take(1, Duration::ZERO);
        let piece = |n: u8| Bytes::from(vec![n; BEHIND / 2]);
        assert!(!call.push(piece(1)));
        assert!(call.push(piece(2)), "behind");
        call.end(Outcome::new(None, HeaderMap::new()));
        assert!(!call.push(piece(3)), "it has ended");
        for n in 1..=2 {
            let Ok(Event::Message(m)) = events.try_recv() else {
                panic!("no message");
            };
            assert_eq!(m[0], n);
            inbox.read(&call, m.len());
            let gone = inbox.take(1, Duration::ZERO).1;
            assert_eq!(
                gone.len(),
                usize::from(n == 2),
                "told once it has caught up"
            );
        }
        assert!(matches!(events.try_recv(), Ok(Event::End(_))));
        assert!(events.try_recv().is_err());
    }

    #[test]
    fn bytes_are_bounded_and_given_back() {
        let inbox = inbox(1);
        let held = inbox.reserve(60).unwrap();
        assert!(inbox.reserve(60).is_none());
        assert_eq!(inbox.held(), 60);
        drop(held);
        assert!(inbox.reserve(100).is_some());
    }

    #[test]
    fn close_wakes_whoever_waits() {
        let inbox = inbox(1);
        let other = inbox.clone();
        let waiter = std::thread::spawn(move || other.take(1, Duration::from_secs(60)));
        inbox.close();
        assert!(waiter.join().unwrap().0.is_empty());
        assert!(!inbox.put(call().0));
    }
}
