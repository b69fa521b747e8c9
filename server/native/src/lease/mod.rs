//! Calls that are answered as they come: Python has answered one of them, and leases the right to answer
//! for a moment those that ask the same of themselves (method, metadata, and the request but for its
//! records). So a small table costs no interpreter.
//!
//! A lease is bounded in time, in calls and in items, and Python may end it at any moment. What a call that
//! was answered here has used is in the journal before its answer leaves; what the log, metrics and
//! statistics say of it Python hears a little later. Whatever is odd about a call goes to Python.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hash, Hasher, RandomState};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use http::{HeaderMap, HeaderName, HeaderValue};
use parking_lot::{Condvar, Mutex, RwLock};

use crate::call::{Caller, Outcome};
use crate::metadata;
use crate::split::split;
use crate::status;

pub mod journal;
pub mod recipe;

use journal::Journal;
use recipe::Recipe;

/// More are not kept: what they would answer goes to Python, as without.
const MOST_LEASES: usize = 1024;
/// Answers of a lease that Python has not heard of yet. Where it is so far behind, it has enough to do.
const MOST_UNHEARD: usize = 20_000;
/// What callers say anew with each call, and what no rule looks at.
const VARYING: [&str; 4] = ["x-request-id", "traceparent", "tracestate", "baggage"];
const TRACE: &str = "traceparent";

/// What is lent, at first and anew.
pub struct Terms {
    pub hold: Duration,
    /// Calls and items (rows), beside what is left.
    pub calls: u64,
    pub items: u64,
    /// Trailers of the answers.
    pub trailers: HeaderMap,
    /// And those that count down: each says so much and what is left of the calls, or of the items.
    pub counts: Vec<(HeaderName, i64, Counts)>,
}

#[derive(Clone, Copy)]
pub enum Counts {
    Calls,
    Items,
}

/// A call that was answered.
pub struct Answered {
    pub request_id: String,
    pub traceparent: Option<String>,
    pub caller: Arc<Caller>,
    /// From the request to its answer, and the model's part of it.
    pub took: Duration,
    pub engine: Duration,
    pub rows: usize,
}

#[derive(Default)]
struct State {
    until: Option<Instant>,
    ended: bool,
    calls: u64,
    items: u64,
    trailers: HeaderMap,
    counts: Vec<(HeaderName, i64, Counts)>,
    unheard: Vec<Answered>,
    tally: Tally,
}

impl State {
    fn lend(&mut self, terms: Terms) {
        self.until = Instant::now().checked_add(terms.hold);
        self.calls += terms.calls;
        self.items += terms.items;
        self.trailers = status::trailers(0, "", b"", terms.trailers);
        self.counts = terms.counts;
    }

    fn may_answer(&self, rows: u64, now: Instant) -> bool {
        !self.ended
            && self.calls > 0
            && self.items >= rows
            && self.until.is_some_and(|until| now < until)
            && self.unheard.len() < MOST_UNHEARD
    }

    fn trailers(&self) -> HeaderMap {
        let mut trailers = self.trailers.clone();
        for (name, base, of) in &self.counts {
            let left = match of {
                Counts::Calls => self.calls,
                Counts::Items => self.items,
            };
            let value = base.saturating_add_unsigned(left).max(0);
            trailers.insert(name.clone(), HeaderValue::from(value));
        }
        trailers
    }
}

/// What is not in the journal yet.
#[derive(Default)]
struct Tally {
    calls: u64,
    items: u64,
    engine: Duration,
}

/// The right to answer calls that ask the same.
pub struct Lease {
    method: u32,
    /// The caller's metadata, without what varies.
    pairs: Vec<(String, String)>,
    /// A request without its records.
    head: Vec<u8>,
    recipe: Arc<Recipe>,
    /// What a line of the journal begins with; the counters follow.
    line: String,
    state: Mutex<State>,
}

impl Lease {
    /// Lends more, and for longer. False when it has ended.
    pub fn renew(&self, terms: Terms) -> bool {
        let mut state = self.state.lock();
        if !state.ended {
            state.lend(terms);
        }
        !state.ended
    }

    /// What was answered since the last time.
    pub fn take(&self) -> Vec<Answered> {
        std::mem::take(&mut self.state.lock().unheard)
    }

    /// What is left of calls and items.
    pub fn left(&self) -> (u64, u64) {
        let state = self.state.lock();
        (state.calls, state.items)
    }

    fn is_for(&self, method: u32, caller: &Caller) -> bool {
        self.method == method && lasting(caller).eq(&self.pairs)
    }
}

/// A call that has just come.
pub struct Arrival<'a> {
    pub method: u32,
    pub message: &'a [u8],
    pub headers: &'a HeaderMap,
    pub deadline: Option<Instant>,
}

/// See the module.
pub struct Leases {
    by_caller: RwLock<HashMap<u64, Vec<Arc<Lease>>>>,
    /// Nothing is looked at while there are none.
    live: AtomicUsize,
    hasher: RandomState,
    pub journal: Journal,
    /// Leases whose tallies are not in the journal.
    unwritten: Mutex<Vec<Arc<Lease>>>,
    /// Lines that could not be written: Python has them then.
    lost: Mutex<Vec<Vec<u8>>>,
    broken: AtomicBool,
    /// What ids of requests begin with, and the number of the next.
    id_prefix: String,
    next_id: AtomicU64,
    heard: Mutex<bool>,
    news: Condvar,
}

impl Leases {
    pub fn new(id_prefix: String) -> Self {
        Self {
            by_caller: RwLock::default(),
            live: AtomicUsize::new(0),
            hasher: RandomState::new(),
            journal: Journal::default(),
            unwritten: Mutex::default(),
            lost: Mutex::default(),
            broken: AtomicBool::new(false),
            id_prefix,
            next_id: AtomicU64::new(0),
            heard: Mutex::new(false),
            news: Condvar::new(),
        }
    }

    /// Leases the right to answer calls like this one. None where there is no journal, the request cannot
    /// be taken apart, or there are too many leases already.
    pub fn lease(
        &self,
        call: &crate::call::Call,
        recipe: Arc<Recipe>,
        line: String,
        terms: Terms,
    ) -> Option<Arc<Lease>> {
        if !self.journal.is_set() {
            return None;
        }
        let head = split(&call.message, recipe.field)?.head;
        let lease = Arc::new(Lease {
            method: call.method,
            pairs: lasting(&call.caller).cloned().collect(),
            head,
            recipe,
            line,
            state: Mutex::default(),
        });
        lease.state.lock().lend(terms);
        let key = self.key(call.method, &call.caller);
        let mut all = self.by_caller.write();
        if self.live.load(Ordering::Relaxed) >= MOST_LEASES {
            return None;
        }
        all.entry(key).or_default().push(lease.clone());
        self.live.fetch_add(1, Ordering::Relaxed);
        self.broken.store(false, Ordering::Relaxed);
        Some(lease)
    }

    /// Ends a lease: when this returns, it answers nothing more. Gives what is left of calls and items.
    pub fn end(&self, lease: &Arc<Lease>) -> (u64, u64) {
        let mut all = self.by_caller.write();
        let mut removed = 0;
        all.retain(|_, some| {
            let count = some.len();
            some.retain(|l| !Arc::ptr_eq(l, lease));
            removed += count - some.len();
            !some.is_empty()
        });
        self.live.fetch_sub(removed, Ordering::Relaxed);
        drop(all);
        let mut state = lease.state.lock();
        state.ended = true;
        (
            std::mem::take(&mut state.calls),
            std::mem::take(&mut state.items),
        )
    }

    /// The answer to a call, if somebody leased it. `caller`: who calls.
    pub fn answer(&self, call: &Arrival<'_>, caller: &Arc<Caller>) -> Option<Outcome> {
        if self.live.load(Ordering::Relaxed) == 0 || self.broken.load(Ordering::Relaxed) {
            return None;
        }
        let began = Instant::now();
        if call.deadline.is_some_and(|deadline| deadline <= began) {
            return None;
        }
        let mut given = call.headers.get_all(metadata::REQUEST_ID).iter();
        let request_id = match (given.next(), given.next()) {
            (None, _) => None,
            (Some(_), None) => Some(metadata::request_id(call.headers)?.to_str().ok()?),
            _ => return None,
        };
        let (lease, records) = self.find(call, caller)?;
        if !lease.state.lock().may_answer(1, began) {
            return None;
        }
        let answer = lease.recipe.answer(call.message, &records)?;
        let request_id = request_id.map_or_else(|| self.new_id(), ToOwned::to_owned);
        let traceparent = call.headers.get_all(TRACE).iter().next_back();
        let traceparent = traceparent.and_then(|v| v.to_str().ok());
        let traceparent = traceparent.map(ToOwned::to_owned);
        let id = HeaderValue::from_str(&request_id).ok()?;
        let now = Instant::now();
        let (rows, engine) = (answer.rows as u64, answer.took);
        // In the order of `write`.
        let mut unwritten = self.unwritten.lock();
        let mut state = lease.state.lock();
        if !state.may_answer(rows, now) {
            return None;
        }
        state.calls -= 1;
        state.items -= rows;
        if state.tally.calls == 0 {
            unwritten.push(lease.clone());
        }
        drop(unwritten);
        state.tally.calls += 1;
        state.tally.items += rows;
        state.tally.engine += engine;
        let mut trailers = state.trailers();
        state.unheard.push(Answered {
            request_id,
            traceparent,
            caller: caller.clone(),
            took: now - began,
            engine,
            rows: answer.rows,
        });
        drop(state);
        trailers.insert(metadata::REQUEST_ID, id);
        Some(Outcome::new(Some(answer.payload), trailers))
    }

    /// Puts what was answered into the journal. Called before answers leave.
    pub fn write(&self) {
        let mut unwritten = self.unwritten.lock();
        if unwritten.is_empty() {
            return;
        }
        // The lock is kept until all is written: nobody else's answers may leave before.
        let mut lines = Vec::new();
        for lease in unwritten.drain(..) {
            let tally = std::mem::take(&mut lease.state.lock().tally);
            let ms = tally.engine.as_secs_f64() * 1e3;
            let (start, calls, items) = (&lease.line, tally.calls, tally.items);
            lines.extend(format!("{start}{calls},{items},0,0,0,0,{ms:?},0.0]\n").bytes());
        }
        if !self.journal.append(&lines) {
            self.broken.store(true, Ordering::Relaxed);
            self.lost.lock().push(lines);
        }
        drop(unwritten);
        let mut heard = self.heard.lock();
        if !std::mem::replace(&mut *heard, true) {
            self.news.notify_one();
        }
    }

    /// Lines that could not be written, since the last time.
    pub fn take_lost(&self) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.lost.lock())
    }

    /// Waits until something was answered; false after `timeout`.
    pub fn wait(&self, timeout: Duration) -> bool {
        let mut heard = self.heard.lock();
        if !*heard {
            self.news.wait_for(&mut heard, timeout);
        }
        std::mem::take(&mut *heard)
    }

    /// The lease that a call falls under, and where its records stand.
    fn find(&self, call: &Arrival<'_>, caller: &Caller) -> Option<(Arc<Lease>, Vec<Range<usize>>)> {
        let key = self.key(call.method, caller);
        let all = self.by_caller.read();
        let own = all.get(&key)?.iter();
        let own = own.filter(|l| l.is_for(call.method, caller));
        let mut found = own.filter_map(|lease| {
            let parts = split(call.message, lease.recipe.field)?;
            (parts.head == lease.head).then(|| (lease.clone(), parts.records))
        });
        found.next()
    }

    /// Keyed by random numbers: nobody can tell from times how near a guess is.
    fn key(&self, method: u32, caller: &Caller) -> u64 {
        let made = || {
            let mut hasher = self.hasher.build_hasher();
            lasting(caller).for_each(|pair| pair.hash(&mut hasher));
            hasher.finish()
        };
        caller
            .leases_key
            .get_or_init(made)
            .wrapping_add(method.into())
    }

    fn new_id(&self) -> String {
        let number = self.next_id.fetch_add(1, Ordering::Relaxed);
        format!("{}{number:016x}", self.id_prefix)
    }
}

/// A caller's metadata without what varies.
fn lasting(caller: &Caller) -> impl Iterator<Item = &(String, String)> {
    let pairs = caller.pairs.iter();
    pairs.filter(|(name, _)| !VARYING.contains(&name.as_str()))
}

#[cfg(test)]
mod tests;
