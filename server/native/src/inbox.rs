//! Where calls wait for Python, and where Python hears of those that nobody waits for any more.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::call::{Call, Outcome};
use crate::status::{Code, Refusal};

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

/// Python takes calls of so many bytes at once. Large ones take it long to read: those behind would
/// wait for all of them before they hear that the queue is full.
const MOST_BYTES: usize = 256 << 10;

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

impl State {
    /// What is new of calls that were taken. Of one that another thread has just taken, and not said yet
    /// whose it is, nobody would know what to do: that waits.
    fn hear(&mut self) -> Vec<(Arc<Call>, Gone)> {
        let all = std::mem::take(&mut self.gone).into_iter();
        let (early, heard) = all.partition(|(call, _)| call.is_new());
        self.gone = early;
        heard
    }

    fn end_waiting(&mut self) {
        let error = Refusal::new(Code::Unavailable, "the server is shutting down");
        for call in self.waiting.drain(..) {
            call.end(Outcome::new(None, error.trailers()));
        }
    }
}

/// See the module.
pub struct Inbox {
    bounds: Bounds,
    state: Mutex<State>,
    ready: Condvar,
    /// Held by whoever looks at the calls that wait: two at once would mix up their order.
    refusing: Mutex<()>,
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
            refusing: Mutex::default(),
            bytes: AtomicUsize::new(0),
            refused: AtomicUsize::new(0),
            abandoned: AtomicUsize::new(0),
        }
    }

    /// Room for the bytes of a message, none yet.
    pub fn room(self: &Arc<Self>) -> Room {
        Room {
            inbox: self.clone(),
            bytes: 0,
        }
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

    /// Says that this call's deadline has passed.
    pub fn late(&self, call: &Arc<Call>) {
        if !call.answered() {
            self.tell(call, Gone::Late);
        }
    }

    /// Says that nobody waits for this call's answer. `room`: of its message.
    pub fn leave(&self, call: &Arc<Call>, room: Option<Room>) {
        if !call.answered() && !self.abandon(call, room) {
            self.tell(call, Gone::Cancelled);
        }
    }

    /// Keeps a call from Python. Its message is there until Python would have taken it, and so long it
    /// has its room. False when Python has taken the call, and may answer it.
    pub fn abandon(&self, call: &Arc<Call>, room: Option<Room>) -> bool {
        let left = call.abandon();
        if left {
            self.abandoned.fetch_add(1, Ordering::Relaxed);
            call.keep(room);
        }
        left
    }

    /// So many bytes of a call's stream have left.
    pub fn read(&self, call: &Arc<Call>, size: usize) {
        if call.read(size) {
            self.tell(call, Gone::Ready);
        }
    }

    fn tell(&self, call: &Arc<Call>, why: Gone) {
        self.state.lock().gone.push((call.clone(), why));
        self.ready.notify_one();
    }

    /// Waits for calls; empty after `timeout`, or when closed.
    pub fn take(&self, most: usize, timeout: Duration) -> Taken {
        let until = Instant::now() + timeout;
        let mut state = self.state.lock();
        loop {
            let mut taken = Vec::with_capacity(most.min(state.waiting.len()));
            let mut bytes = 0;
            while taken.len() < most && bytes < MOST_BYTES {
                let Some(call) = state.waiting.pop_front() else {
                    break;
                };
                if call.take() {
                    bytes += call.message.len();
                    taken.push(call);
                }
            }
            if !state.waiting.is_empty() {
                self.ready.notify_one();
            }
            let gone = state.hear();
            if !taken.is_empty() || !gone.is_empty() || state.closed {
                return (taken, gone);
            }
            if self.ready.wait_until(&mut state, until).timed_out() && state.waiting.is_empty() {
                return Taken::default();
            }
        }
    }

    /// Ends the calls that wait and get a refusal; the others keep their order.
    pub fn refuse(&self, why: impl Fn(&Call) -> Option<Refusal>) {
        let _alone = self.refusing.lock();
        // Looked at aside, so that nobody who brings a call has to wait for it.
        let mut waiting = std::mem::take(&mut self.state.lock().waiting);
        waiting.retain(|call| {
            let Some(refusal) = why(call) else {
                return true;
            };
            if call.take() {
                call.refuse(refusal);
            }
            false
        });
        let mut state = self.state.lock();
        waiting.append(&mut state.waiting);
        state.waiting = waiting;
        if state.closed {
            state.end_waiting();
        } else if !state.waiting.is_empty() {
            self.ready.notify_one();
        }
    }

    /// No more calls: those that wait end as UNAVAILABLE.
    pub fn close(&self) {
        let mut state = self.state.lock();
        state.closed = true;
        state.end_waiting();
        self.ready.notify_all();
    }

    /// How long the first of the calls that wait has done so.
    pub fn behind(&self) -> Duration {
        let state = self.state.lock();
        let first = state.waiting.front();
        first.map_or(Duration::ZERO, |call| call.received.elapsed())
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

/// What a message takes of the bytes that may be held, given back when the value is dropped.
pub struct Room {
    inbox: Arc<Inbox>,
    bytes: usize,
}

impl Room {
    /// Takes room for what has come, if what is `expected` in all would fit too. What is only said
    /// takes none: whoever said much and sent nothing would keep all others out. False when full.
    pub fn grow(&mut self, more: usize, expected: usize) -> bool {
        let before = self.inbox.bytes.fetch_add(more, Ordering::Relaxed);
        let whole = before + more.max(expected.saturating_sub(self.bytes));
        self.bytes += more;
        let fits = whole <= self.inbox.bounds.bytes;
        if !fits {
            self.inbox.refused.fetch_add(1, Ordering::Relaxed);
        }
        fits
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.inbox.bytes.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use http::HeaderMap;
    use tokio::sync::oneshot;

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
        inbox.leave(&early, None);
        inbox.put(late.clone());
        let (taken, gone) = inbox.take(9, Duration::ZERO);
        assert!(taken.len() == 1 && Arc::ptr_eq(&taken[0], &late) && gone.is_empty());
        inbox.leave(&late, None);
        let (taken, gone) = inbox.take(9, Duration::ZERO);
        assert!(taken.is_empty() && gone.is_empty(), "it is nobody's yet");
        *late.owner.lock() = Some(Box::new(()));
        let (taken, gone) = inbox.take(9, Duration::ZERO);
        assert!(taken.is_empty() && gone.len() == 1 && gone[0].1 == Gone::Cancelled);
    }

    #[test]
    fn the_message_of_a_call_that_was_left_has_its_room_while_it_waits() {
        let inbox = inbox(9);
        let (call, answer) = call();
        let mut room = inbox.room();
        assert!(room.grow(60, 60) && inbox.put(call.clone()));
        inbox.leave(&call, Some(room));
        drop((call, answer));
        assert_eq!(inbox.held(), 60);
        assert!(!inbox.room().grow(60, 60));
        assert!(inbox.take(9, Duration::ZERO).0.is_empty());
        assert_eq!(inbox.held(), 0);
    }

    #[test]
    fn nobody_hears_of_a_call_that_has_its_answer() {
        let inbox = inbox(1);
        let (call, _answer) = call();
        call.end(Outcome::new(None, HeaderMap::new()));
        inbox.leave(&call, None);
        assert!(inbox.take(1, Duration::ZERO).1.is_empty());
    }

    #[test]
    fn python_hears_once_that_a_reader_has_caught_up() {
        let inbox = inbox(9);
        let (call, _events) = Call::streamed(0, Bytes::new(), Arc::default(), None);
        let size = 64 << 10;
        assert!(call.push(Bytes::from(vec![0; size])), "behind");
        inbox.read(&call, 1);
        assert!(inbox.take(1, Duration::ZERO).1.is_empty());
        inbox.read(&call, size - 2);
        inbox.read(&call, 1);
        let gone = inbox.take(1, Duration::ZERO).1;
        assert!(gone.len() == 1 && gone[0].1 == Gone::Ready);
    }

    #[test]
    fn bytes_are_bounded_and_given_back() {
        let inbox = inbox(1);
        let mut held = inbox.room();
        assert!(held.grow(30, 0) && held.grow(30, 0));
        assert!(!inbox.room().grow(60, 0));
        assert_eq!(inbox.held(), 60);
        drop(held);
        assert!(inbox.room().grow(100, 0));
    }

    #[test]
    fn what_is_said_takes_no_room_and_what_cannot_fit_is_refused_at_once() {
        let inbox = inbox(1);
        let (mut said, mut other) = (inbox.room(), inbox.room());
        assert!(said.grow(5, 100));
        assert_eq!(inbox.held(), 5);
        assert!(other.grow(95, 95));
        assert!(!said.grow(1, 100), "there is no room any more");
        drop(other);
        assert!(
            !inbox.room().grow(5, 95),
            "it would not fit beside the 6 that came"
        );
    }

    #[test]
    fn large_calls_are_taken_a_few_at_a_time() {
        let inbox = inbox(9);
        for _ in 0..3 {
            let message = Bytes::from(vec![0; MOST_BYTES / 2]);
            inbox.put(Call::new(0, message, Arc::default(), None, Vec::new()).0);
        }
        assert_eq!(inbox.take(9, Duration::ZERO).0.len(), 2);
        assert_eq!(inbox.take(9, Duration::ZERO).0.len(), 1);
    }

    #[test]
    fn calls_that_wait_can_be_refused_and_the_others_keep_their_order() {
        let inbox = inbox(9);
        let calls: Vec<_> = (0..4)
            .map(|n| Call::new(n % 2, Bytes::new(), Arc::default(), None, Vec::new()))
            .collect();
        for (call, _) in &calls {
            inbox.put(call.clone());
        }
        let full = || Refusal::new(Code::ResourceExhausted, "full");
        inbox.refuse(|call| (call.method == 1).then(full));
        let (taken, _) = inbox.take(9, Duration::ZERO);
        assert!(taken.len() == 2 && Arc::ptr_eq(&taken[0], &calls[0].0));
        assert!(Arc::ptr_eq(&taken[1], &calls[2].0));
        assert_eq!(calls[1].0.refusal().unwrap().message, "full");
    }

    #[test]
    fn two_that_refuse_at_once_keep_the_order() {
        let inbox = inbox(9);
        let ((first, _f), (second, _s)) = (call(), call());
        let gates = [Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0))];
        inbox.put(first.clone());
        let looks = |gate: &Arc<AtomicUsize>| {
            let (inbox, gate) = (inbox.clone(), gate.clone());
            std::thread::spawn(move || {
                inbox.refuse(|_| {
                    while gate.load(Ordering::SeqCst) == 0 {
                        std::thread::yield_now();
                    }
                    None
                });
            })
        };
        let one = looks(&gates[0]);
        while inbox.waiting() == 1 {
            std::thread::yield_now();
        }
        inbox.put(second.clone());
        let other = looks(&gates[1]);
        std::thread::sleep(Duration::from_millis(20));
        for (gate, thread) in gates.iter().zip([one, other]) {
            gate.store(1, Ordering::SeqCst);
            thread.join().unwrap();
        }
        let (taken, _) = inbox.take(9, Duration::ZERO);
        assert!(Arc::ptr_eq(&taken[0], &first) && Arc::ptr_eq(&taken[1], &second));
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
