//! Calls that are refused as they come, while Python has said that it would refuse them anyhow.
//!
//! To refuse a call costs Python a good part of what a small model takes to answer it, so that under
//! several times the load a server is busy refusing. What it has said of one call holds for a moment
//! for all that ask the same and have as little time: they are told so here.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};

use crate::call::Call;
use crate::status::Refusal;
use crate::wire::{Field, field};

/// Calls are let through one by one for so many times as long as all were refused, and then for as
/// long again as they come, while Python is not behind.
const SLOWLY: u32 = 4;
/// Python is behind when a call has waited for it this long, about what it takes to read a table of 500
/// rows: those that come after would wait, too, and mostly to be refused.
const BEHIND: Duration = Duration::from_micros(1500);
/// Where size matters, a message counts as no smaller with this share of its bytes less: as many rows
/// with shorter words in them would be refused as well, one after the other, each by Python.
const NEARLY: usize = 8;
/// An overload goes on where for `STILL` calls that were let through at least one had to be kept back;
/// it is looked at when a rule would end, which then goes on for as long again.
const STILL: usize = 2;
/// More are not kept: the next call is refused by Python, as without.
const MOST_RULES: usize = 64;

/// The calls that a refusal is about.
#[derive(Clone)]
pub struct Alike {
    method: u32,
    key: Vec<u8>,
    within: Option<Duration>,
    /// Bytes of a message; smaller ones are let through.
    least: usize,
}

impl Alike {
    /// Whether it is about a call, but for its key, which takes longer to find.
    fn may_mean(&self, method: u32, size: usize, deadline: Option<Instant>, now: Instant) -> bool {
        let late = match (self.within, deadline) {
            (None, _) => true,
            (Some(_), None) => false,
            (Some(within), Some(deadline)) => deadline.saturating_duration_since(now) <= within,
        };
        late && self.method == method && size >= self.least
    }
}

struct Rule {
    alike: Alike,
    until: Instant,
    /// From `until` to `slowly`, a call is let through after each `gap`; then, for `again`, as they come
    /// while Python is not behind.
    slowly: Instant,
    again: Duration,
    gap: Duration,
    pace: Mutex<Pace>,
    refusal: Refusal,
}

/// How a rule goes on.
struct Pace {
    /// Until `slowly`: when the next call is let through.
    next: Instant,
    ends: Instant,
    /// Calls since `slowly`, or since the rule would have ended.
    let_through: usize,
    kept_back: usize,
}

impl Rule {
    /// Whether a call that it is about may pass nevertheless.
    fn lets_through(&self, now: Instant, behind: impl Fn() -> Duration) -> bool {
        if now < self.until {
            return false;
        }
        let keeps_up = behind() < BEHIND;
        let mut pace = self.pace.lock();
        if now >= self.slowly {
            if keeps_up {
                pace.let_through += 1;
            } else {
                pace.kept_back += 1;
            }
            return keeps_up;
        }
        let passes = keeps_up && now >= pace.next;
        if passes {
            pace.next = now + self.gap;
        }
        passes
    }

    /// Whether it has ended. Ended while the overload lasts, it would let in at once all that comes
    /// while Python reads one call, and most of those would wait long to be refused.
    fn over(&self, now: Instant) -> bool {
        let mut pace = self.pace.lock();
        if now < pace.ends {
            return false;
        }
        if pace.kept_back * STILL < pace.let_through.max(1) || now >= pace.ends + self.again {
            return true;
        }
        pace.ends = now + self.again;
        (pace.let_through, pace.kept_back) = (0, 0);
        false
    }
}

/// For how long, and for what calls, a refusal holds.
#[derive(Clone, Copy, Debug)]
pub struct Holds {
    pub time: Duration,
    /// Then, for `SLOWLY` times as long, one call is let through in each such time: all at once would
    /// come in faster than Python reads them, and those behind would wait to be refused. None are
    /// kept back after `time` where it is zero.
    pub gap: Duration,
    /// Calls that have more time than this are let through. None: nobody is.
    pub within: Option<Duration>,
    /// Whether smaller calls are let through.
    pub by_size: bool,
}

/// See the module.
pub struct Shed {
    /// By method: the fields whose values tell its queues apart. Without any, nothing is shed.
    fields: Vec<Vec<u64>>,
    rules: RwLock<Vec<Rule>>,
    /// Length of `rules`: nothing is looked at while there are none.
    live: AtomicUsize,
}

impl Shed {
    pub fn new(fields: Vec<Vec<u64>>) -> Self {
        Self {
            fields,
            rules: RwLock::default(),
            live: AtomicUsize::new(0),
        }
    }

    /// For so long, calls that ask the same as this one get this refusal. Gives which those are; None
    /// where nothing is shed.
    pub fn refuse(&self, like: &Call, holds: Holds, refusal: Refusal) -> Option<Alike> {
        let size = like.message.len();
        let alike = Alike {
            method: like.method,
            key: self.key(like.method, &like.message)?,
            within: holds.within,
            least: if holds.by_size {
                size - size / NEARLY
            } else {
                0
            },
        };
        let now = Instant::now();
        let slowly = holds.time * if holds.gap.is_zero() { 0 } else { SLOWLY };
        let mut rules = self.rules.write();
        let replaced = |r: &Rule| r.alike.method == alike.method && r.alike.key == alike.key;
        rules.retain(|r| !(r.over(now) || replaced(r)));
        if rules.len() < MOST_RULES {
            rules.push(Rule {
                alike: alike.clone(),
                until: now + holds.time,
                slowly: now + holds.time + slowly,
                again: slowly,
                gap: holds.gap,
                pace: Mutex::new(Pace {
                    next: now,
                    ends: now + holds.time + slowly * 2,
                    let_through: 0,
                    kept_back: 0,
                }),
                refusal,
            });
        }
        self.live.store(rules.len(), Ordering::Relaxed);
        Some(alike)
    }

    /// Whether a call is one of these.
    pub fn is_one(&self, call: &Call, of: &Alike) -> bool {
        of.may_mean(
            call.method,
            call.message.len(),
            call.deadline,
            Instant::now(),
        ) && self.key(call.method, &call.message).as_ref() == Some(&of.key)
    }

    /// What a call is refused with, if it is. `behind`: how long a call has waited for Python.
    pub fn refusal(
        &self,
        method: u32,
        message: &[u8],
        deadline: Option<Instant>,
        behind: impl Fn() -> Duration,
    ) -> Option<Refusal> {
        if self.live.load(Ordering::Relaxed) == 0 {
            return None;
        }
        let now = Instant::now();
        let rules = self.rules.read();
        let mut lapsed = 0;
        let mut key = None;
        for rule in rules.iter() {
            if rule.over(now) {
                lapsed += 1;
                continue;
            }
            if !rule.alike.may_mean(method, message.len(), deadline, now) {
                continue;
            }
            if key.is_none() {
                key = Some(self.key(method, message)?);
            }
            if key.as_ref() == Some(&rule.alike.key) && !rule.lets_through(now, &behind) {
                return Some(rule.refusal.clone());
            }
        }
        let all = lapsed > 0 && lapsed == rules.len();
        drop(rules);
        if all {
            let mut rules = self.rules.write();
            rules.retain(|r| !r.over(now));
            self.live.store(rules.len(), Ordering::Relaxed);
        }
        None
    }

    /// The values of a message's telling fields, each behind its length; of a field that comes
    /// several times the last one counts. None: malformed, or a method without such fields.
    fn key(&self, method: u32, message: &[u8]) -> Option<Vec<u8>> {
        let fields = self.fields.get(method as usize).filter(|f| !f.is_empty())?;
        let mut values: Vec<&[u8]> = vec![&[]; fields.len()];
        let mut rest = message;
        while !rest.is_empty() {
            let (number, value) = field(&mut rest)?;
            if let Some(at) = fields.iter().position(|&f| f == number) {
                let Field::Bytes(value) = value else {
                    return None;
                };
                values[at] = value;
            }
        }
        let mut key = Vec::new();
        for value in values {
            key.extend_from_slice(&value.len().to_ne_bytes());
            key.extend_from_slice(value);
        }
        Some(key)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use bytes::Bytes;

    use super::*;
    use crate::status::Code;

    const LONG: Duration = Duration::from_secs(60);
    /// model = 1: "ab", texts = 2: "x"
    const AB: &[u8] = b"\x0a\x02ab\x12\x01x";
    /// The same model, asked the other way round.
    const BA: &[u8] = b"\x12\x01y\x0a\x02ab";
    /// Another model.
    const C: &[u8] = b"\x0a\x01c\x12\x01x";

    fn holds(time: Duration, within: Option<Duration>) -> Holds {
        Holds {
            time,
            gap: Duration::ZERO,
            within,
            by_size: false,
        }
    }

    fn shed() -> Shed {
        Shed::new(vec![vec![1], vec![], vec![1, 3]])
    }

    /// What a call is told while Python keeps up.
    fn told(
        shed: &Shed,
        method: u32,
        message: &[u8],
        deadline: Option<Instant>,
    ) -> Option<Refusal> {
        shed.refusal(method, message, deadline, || Duration::ZERO)
    }

    fn refuse(shed: &Shed, method: u32, message: &'static [u8], within: Option<Duration>) {
        let (call, _) = crate::call::Call::new(
            method,
            Bytes::from_static(message),
            Arc::default(),
            None,
            Vec::new(),
        );
        shed.refuse(
            &call,
            holds(LONG, within),
            Refusal::new(Code::ResourceExhausted, "full"),
        );
    }

    #[test]
    fn calls_that_ask_the_same_are_refused_and_no_others() {
        let shed = shed();
        assert!(told(&shed, 0, AB, None).is_none());
        refuse(&shed, 0, AB, None);
        assert!(told(&shed, 0, AB, None).is_some());
        assert!(told(&shed, 0, BA, None).is_some());
        assert!(told(&shed, 0, C, None).is_none(), "another model");
        assert!(
            told(&shed, 0, b"\x12\x01x", None).is_none(),
            "the default model"
        );
        assert!(told(&shed, 2, AB, None).is_none(), "another method");
        assert!(
            told(&shed, 0, b"\x0a\x7f", None).is_none(),
            "malformed: Python says so"
        );
    }

    #[test]
    fn every_telling_field_counts_and_a_method_without_any_is_left_alone() {
        let shed = shed();
        refuse(&shed, 1, AB, None);
        assert!(told(&shed, 1, AB, None).is_none());
        refuse(&shed, 2, b"\x0a\x02ab\x1a\x011", None);
        assert!(told(&shed, 2, b"\x0a\x02ab\x1a\x011", None).is_some());
        assert!(told(&shed, 2, b"\x0a\x02ab\x1a\x012", None).is_none());
        assert!(told(&shed, 2, AB, None).is_none());
    }

    #[test]
    fn who_has_more_time_is_let_through() {
        let shed = shed();
        refuse(&shed, 0, AB, Some(Duration::from_secs(10)));
        let at = |s| Some(Instant::now() + Duration::from_secs(s));
        assert!(told(&shed, 0, AB, at(9)).is_some());
        assert!(told(&shed, 0, AB, at(11)).is_none());
        assert!(told(&shed, 0, AB, None).is_none());
    }

    #[test]
    fn smaller_calls_are_let_through_where_size_matters() {
        let shed = shed();
        let (call, _) = Call::new(0, Bytes::from_static(AB), Arc::default(), None, Vec::new());
        let by_size = Holds {
            by_size: true,
            ..holds(LONG, None)
        };
        shed.refuse(
            &call,
            by_size,
            Refusal::new(Code::ResourceExhausted, "full"),
        );
        assert!(told(&shed, 0, BA, None).is_some(), "as large");
        assert!(told(&shed, 0, b"\x0a\x02ab", None).is_none());
        let table = |bytes: usize| {
            let mut message = vec![0x0a, 0x01, b't', 0x12, bytes as u8];
            message.resize(5 + bytes, b'x');
            Bytes::from(message)
        };
        let (call, _) = Call::new(0, table(95), Arc::default(), None, Vec::new());
        let full = Refusal::new(Code::ResourceExhausted, "full");
        shed.refuse(&call, by_size, full);
        assert!(
            told(&shed, 0, &table(83), None).is_some(),
            "nearly as large"
        );
        assert!(told(&shed, 0, &table(82), None).is_none());
    }

    #[test]
    fn after_its_time_calls_are_let_through_one_by_one() {
        let shed = shed();
        let (call, _) = Call::new(0, Bytes::from_static(AB), Arc::default(), None, Vec::new());
        let time = Duration::from_millis(300);
        let slowly = Holds {
            gap: LONG,
            ..holds(time, None)
        };
        shed.refuse(&call, slowly, Refusal::new(Code::ResourceExhausted, "full"));
        assert!(told(&shed, 0, AB, None).is_some());
        std::thread::sleep(time + Duration::from_millis(10));
        assert!(told(&shed, 0, AB, None).is_none(), "one");
        assert!(told(&shed, 0, AB, None).is_some(), "and no more");
        std::thread::sleep(time * SLOWLY);
        assert!(told(&shed, 0, AB, None).is_none());
        assert!(told(&shed, 0, AB, None).is_none(), "as they come");
        assert!(told(&shed, 0, AB, None).is_none());
        let behind = || shed.refusal(0, AB, None, || BEHIND);
        assert!(behind().is_some(), "but not behind others");
        std::thread::sleep(time * SLOWLY);
        assert!(behind().is_none());
    }

    #[test]
    fn it_goes_on_while_a_good_part_of_what_comes_is_kept_back() {
        let shed = shed();
        let (call, _) = Call::new(0, Bytes::from_static(AB), Arc::default(), None, Vec::new());
        let time = Duration::from_millis(100);
        let slowly = Holds {
            gap: time,
            ..holds(time, None)
        };
        shed.refuse(&call, slowly, Refusal::new(Code::ResourceExhausted, "full"));
        let behind = || shed.refusal(0, AB, None, || BEHIND);
        std::thread::sleep(time * (1 + SLOWLY) + Duration::from_millis(10));
        assert!(told(&shed, 0, AB, None).is_none() && behind().is_some());
        std::thread::sleep(time * SLOWLY);
        assert!(behind().is_some(), "it would have ended");
        assert!(told(&shed, 0, AB, None).is_none());
        std::thread::sleep(time * SLOWLY * 2);
        assert!(behind().is_none(), "nothing came meanwhile");
    }

    #[test]
    fn a_rule_lapses_and_rules_are_bounded() {
        let shed = shed();
        let (call, _) = Call::new(0, Bytes::from_static(AB), Arc::default(), None, Vec::new());
        let full = || Refusal::new(Code::ResourceExhausted, "full");
        shed.refuse(&call, holds(Duration::from_millis(1), None), full());
        std::thread::sleep(Duration::from_millis(5));
        assert!(told(&shed, 0, AB, None).is_none());
        assert_eq!(shed.live.load(Ordering::Relaxed), 0);
        for i in 0..=255 {
            let message = Bytes::from(vec![0x0a, 0x01, i]);
            let (call, _) = Call::new(0, message, Arc::default(), None, Vec::new());
            shed.refuse(&call, holds(LONG, None), full());
        }
        assert_eq!(shed.rules.read().len(), MOST_RULES);
    }
}
