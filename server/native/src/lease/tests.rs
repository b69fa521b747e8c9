use bytes::Bytes;

use super::recipe::tests::raw;
use super::*;
use crate::call::Call;

/// model = 1: "ab", then a tensor of one row in field 2.
fn message(model: u8, x: f32) -> Vec<u8> {
    let values = [x, 0.0].map(f32::to_le_bytes).concat();
    [&[0x0a, 1, model, 0x12, 8][..], &values].concat()
}

fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
    let pairs = pairs.iter();
    pairs
        .map(|&(n, v)| {
            (
                HeaderName::from_static(n),
                HeaderValue::from_str(v).unwrap(),
            )
        })
        .collect()
}

fn terms(calls: u64, items: u64) -> Terms {
    Terms {
        hold: Duration::from_secs(60),
        calls,
        items,
        trailers: headers(&[("x-limit", "9")]),
        counts: vec![(HeaderName::from_static("x-left"), 100, Counts::Calls)],
    }
}

const KEY: (&str, &str) = ("authorization", "Bearer a");

struct Set {
    leases: Leases,
    path: std::path::PathBuf,
}

impl Set {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("forebay-{name}-{}", std::process::id()));
        let leases = Leases::new("p".into());
        leases
            .journal
            .set(Some(std::fs::File::create(&path).unwrap()));
        Self { leases, path }
    }

    fn lease(&self, pairs: &[(&'static str, &str)], terms: Terms) -> Option<Arc<Lease>> {
        let caller = Arc::new(Caller::new("".into(), &headers(pairs)));
        let message = Bytes::from(message(b'm', 0.0));
        let (call, _) = Call::new(3, message, caller, None, Vec::new());
        let line = r#"["k","m",1,"#.into();
        self.leases.lease(&call, Arc::new(raw(8)), line, terms)
    }

    fn answer(
        &self,
        method: u32,
        message: &[u8],
        pairs: &[(&'static str, &str)],
    ) -> Option<Outcome> {
        let headers = &headers(pairs);
        let arrival = Arrival {
            method,
            message,
            headers,
            deadline: None,
        };
        let caller = Arc::new(Caller::new("".into(), headers));
        self.leases.answer(&arrival, &caller)
    }

    fn journal(&self) -> String {
        self.leases.write();
        std::fs::read_to_string(&self.path).unwrap()
    }
}

impl Drop for Set {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

#[test]
fn calls_that_ask_the_same_are_answered_and_no_others() {
    let set = Set::new("same");
    let ask = message(b'm', 1.5);
    assert!(set.answer(3, &ask, &[KEY]).is_none());
    let lease = set.lease(&[KEY], terms(9, 9)).unwrap();
    let outcome = set.answer(3, &ask, &[KEY]).unwrap();
    assert_eq!(outcome.payload.unwrap()[2..6], 20_f32.to_le_bytes());
    for (why, method, ask, pairs) in [
        ("another method", 4, &ask, &[KEY][..]),
        ("another model", 3, &message(b'n', 1.5), &[KEY]),
        ("another key", 3, &ask, &[("authorization", "Bearer b")]),
        ("no key", 3, &ask, &[]),
        ("more metadata", 3, &ask, &[KEY, ("x-more", "1")]),
        ("no message", 3, &b"\x0a\x7f".to_vec(), &[KEY]),
        ("another size", 3, &b"\x0a\x01m\x12\x01x".to_vec(), &[KEY]),
        (
            "an id that is none",
            3,
            &ask,
            &[KEY, ("x-request-id", "a b")],
        ),
    ] {
        assert!(set.answer(method, ask, pairs).is_none(), "{why}");
    }
    assert_eq!(lease.left(), (8, 8));
    let headers = &headers(&[KEY]);
    let late = Arrival {
        method: 3,
        message: &ask,
        headers,
        deadline: Some(Instant::now()),
    };
    let caller = Arc::new(Caller::new("".into(), headers));
    assert!(set.leases.answer(&late, &caller).is_none());
}

#[test]
fn ids_and_traces_are_each_calls_own() {
    let set = Set::new("ids");
    let lease = set
        .lease(&[KEY, ("x-request-id", "first")], terms(9, 9))
        .unwrap();
    let ask = message(b'm', 0.0);
    let ids: Vec<_> = [
        &[KEY, ("x-request-id", "mine"), ("traceparent", "t")][..],
        &[KEY],
        &[KEY],
    ]
    .map(|pairs| set.answer(3, &ask, pairs).unwrap().trailers["x-request-id"].clone())
    .into();
    assert_eq!(ids[0], "mine");
    assert_eq!(ids[1], "p0000000000000000");
    assert_eq!(ids[2], "p0000000000000001");
    let heard = lease.take();
    assert_eq!(heard[0].traceparent.as_deref(), Some("t"));
    assert!(heard.len() == 3 && heard[1].request_id == ids[1].to_str().unwrap());
    assert!(lease.take().is_empty());
}

#[test]
fn what_is_lent_is_not_exceeded_and_counted_down() {
    let set = Set::new("lent");
    let lease = set.lease(&[KEY], terms(2, 9)).unwrap();
    let ask = message(b'm', 0.0);
    let left = |o: Option<Outcome>| o.map(|o| o.trailers["x-left"].clone());
    assert_eq!(left(set.answer(3, &ask, &[KEY])).unwrap(), "101");
    assert_eq!(left(set.answer(3, &ask, &[KEY])).unwrap(), "100");
    assert!(set.answer(3, &ask, &[KEY]).is_none(), "no calls");
    assert!(lease.renew(terms(9, 0)));
    assert_eq!(lease.left(), (9, 7));
    let outcome = set.answer(3, &ask, &[KEY]).unwrap();
    assert_eq!(outcome.trailers["x-limit"], "9");
    assert_eq!(outcome.trailers["grpc-status"], "0");
    for _ in 0..6 {
        assert!(set.answer(3, &ask, &[KEY]).is_some());
    }
    assert!(set.answer(3, &ask, &[KEY]).is_none(), "no items");
    let over = Terms {
        hold: Duration::ZERO,
        ..terms(0, 9)
    };
    assert!(lease.renew(over));
    assert!(set.answer(3, &ask, &[KEY]).is_none(), "its time is over");
}

#[test]
fn an_ended_lease_gives_back_what_is_left() {
    let set = Set::new("ended");
    let lease = set.lease(&[KEY], terms(5, 7)).unwrap();
    let other = set
        .lease(&[("authorization", "Bearer b")], terms(5, 7))
        .unwrap();
    let ask = message(b'm', 0.0);
    assert!(set.answer(3, &ask, &[KEY]).is_some());
    assert_eq!(set.leases.end(&lease), (4, 6));
    assert!(set.answer(3, &ask, &[KEY]).is_none() && !lease.renew(terms(5, 5)));
    assert_eq!(lease.take().len(), 1, "what it did is still heard of");
    assert_eq!(set.leases.end(&lease), (0, 0));
    assert!(
        set.answer(3, &ask, &[("authorization", "Bearer b")])
            .is_some()
    );
    set.leases.end(&other);
    assert_eq!(set.leases.live.load(Ordering::Relaxed), 0);
}

#[test]
fn the_journal_has_what_was_answered_once() {
    let set = Set::new("journal");
    let _lease = set.lease(&[KEY], terms(9, 9)).unwrap();
    assert_eq!(set.journal(), "");
    let ask = message(b'm', 0.0);
    set.answer(3, &ask, &[KEY]).unwrap();
    set.answer(3, &ask, &[KEY]).unwrap();
    let line = set.journal();
    assert!(line.starts_with(r#"["k","m",1,2,2,0,0,0,0,"#), "{line}");
    assert!(line.ends_with(",0.0]\n") && set.journal() == line);
    assert!(set.leases.wait(Duration::ZERO) && !set.leases.wait(Duration::ZERO));
}

#[test]
fn lines_that_cannot_be_written_are_not_lost_and_python_takes_over() {
    let set = Set::new("full");
    let _lease = set.lease(&[KEY], terms(9, 9)).unwrap();
    let ask = message(b'm', 0.0);
    set.leases.journal.set(None);
    set.answer(3, &ask, &[KEY]).unwrap();
    set.leases.write();
    assert!(set.answer(3, &ask, &[KEY]).is_none());
    let lost = set.leases.take_lost();
    assert!(lost.len() == 1 && lost[0].starts_with(br#"["k","m",1,1,1,"#));
    assert!(
        set.lease(&[KEY], terms(9, 9)).is_none(),
        "there is no journal"
    );
}

#[test]
fn nobody_answers_more_than_python_can_hear_of() {
    let set = Set::new("unheard");
    let lease = set.lease(&[KEY], terms(1 << 20, 1 << 20)).unwrap();
    let ask = message(b'm', 0.0);
    while set.answer(3, &ask, &[KEY]).is_some() {}
    assert_eq!(lease.take().len(), MOST_UNHEARD);
    assert!(set.answer(3, &ask, &[KEY]).is_some());
}
