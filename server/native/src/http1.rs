//! HTTP/1.1 on a port of its own: calls of some routes wait for Python among those of gRPC. All others
//! go to the gateway, see `gateway.rs`.

use std::convert::Infallible;
use std::future::poll_fn;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode};
use http_body::Body;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::timeout;

use crate::call::{Call, Caller, Outcome};
use crate::connection::{Leaving, wait};
use crate::gateway::Gateway;
use crate::inbox::Room;
use crate::metadata;
use crate::reply::{Reply, whole};
use crate::server::{Phase, Shared, Stream};
use crate::status::{Code, STATUS};

/// hyper asks for at least so much room for headers.
const LEAST_BUFFER: usize = 8 << 10;
/// The key of the answer to a body that is too large, among those by status code.
const TOO_LARGE: u8 = 0;

/// What the listener needs to know.
#[derive(Clone)]
pub struct Config {
    /// As `Server::start` has them.
    pub addresses: Vec<String>,
    /// The gateway's Unix socket.
    pub gateway: PathBuf,
    pub routes: Vec<Route>,
    /// Headers that become the caller's metadata.
    pub forwarded: Vec<HeaderName>,
    /// Requests with one of these go to the gateway, whatever their route.
    pub aside: Vec<HeaderName>,
    pub max_body_bytes: usize,
    /// The deadline of calls whose callers name none.
    pub timeout: Duration,
    /// Time that a connection may be without a request, its headers' way included, and that the body of
    /// a request for the gateway may be waited for, see `gateway.rs`.
    pub idle_timeout: Duration,
    /// The answer when the gateway cannot be reached.
    pub unreachable: Canned,
    /// The answer to a request for the gateway that does not come in whole.
    pub stalled: Canned,
}

/// An answer that is written before it is needed.
#[derive(Clone, Debug)]
pub struct Canned {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Canned {
    pub fn response(&self) -> Response<Reply> {
        whole(self.status, self.headers.clone(), self.body.clone())
    }
}

/// A path whose POST requests wait for Python.
#[derive(Clone)]
pub struct Route {
    pub pattern: Pattern,
    /// The answers of calls that end here, by the status code of gRPC.
    pub errors: Vec<(u8, Canned)>,
}

impl Route {
    fn error(&self, code: u8) -> Response<Reply> {
        let found = self.errors.iter().find(|(own, _)| *own == code);
        match found.or_else(|| self.errors.first()) {
            Some((_, canned)) => canned.response(),
            None => whole(
                StatusCode::SERVICE_UNAVAILABLE,
                HeaderMap::new(),
                Bytes::new(),
            ),
        }
    }
}

/// A path, of whose segments some begin with any text.
#[derive(Clone, Debug)]
pub struct Pattern(Vec<Segment>);

#[derive(Clone, Debug)]
enum Segment {
    Literal(String),
    /// What is behind the place.
    Place(String),
}

impl Pattern {
    /// From `/models/{name}/infer` or `/models/{name}:infer`.
    pub fn new(template: &str) -> Self {
        let segment = |s: &str| match s.split_once('}') {
            Some((_, rest)) if s.starts_with('{') => Segment::Place(rest.to_owned()),
            _ => Segment::Literal(s.to_owned()),
        };
        Self(template.split('/').map(segment).collect())
    }

    /// The text of its places. None for other paths, and for texts that are escaped.
    pub fn places(&self, path: &str) -> Option<Vec<String>> {
        let mut places = Vec::new();
        let mut segments = path.split('/');
        for own in &self.0 {
            let segment = segments.next()?;
            match own {
                Segment::Literal(own) if own == segment => {}
                Segment::Literal(_) => return None,
                Segment::Place(rest) => {
                    let text = segment.strip_suffix(rest.as_str())?;
                    if text.is_empty() || text.contains('%') {
                        return None;
                    }
                    places.push(text.to_owned());
                }
            }
        }
        segments.next().is_none().then_some(places)
    }
}

/// Serves the connection until its end.
pub async fn serve(
    stream: Box<dyn Stream>,
    peer: &str,
    shared: &Arc<Shared>,
    config: &Config,
    mut phase: watch::Receiver<Phase>,
) {
    let gateway = Gateway::new(config.gateway.clone(), config.idle_timeout);
    let last = Mutex::new(Arc::new(Caller::default()));
    let peer: Arc<str> = peer.into();
    let service = service_fn(|request: Request<Incoming>| {
        let (gateway, last, peer) = (&gateway, &last, &peer);
        async move {
            let response = match find(&request, config) {
                Some((at, places, within)) => {
                    let caller = caller(last, request.headers(), peer, &config.forwarded);
                    let call = Direct {
                        at,
                        places,
                        within,
                        caller,
                    };
                    call.serve(request, shared, config).await
                }
                None => match gateway.pass(request).await {
                    Ok(response) => response,
                    Err(e) if e.kind() == ErrorKind::TimedOut => config.stalled.response(),
                    Err(_) => config.unreachable.response(),
                },
            };
            Ok::<_, Infallible>(response)
        }
    });
    let mut connection = std::pin::pin!(
        http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(config.idle_timeout)
            .max_buf_size(LEAST_BUFFER.max(shared.config.max_header_bytes as usize))
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades()
    );
    let mut ending = false;
    loop {
        tokio::select! {
            _ = &mut connection => break,
            changed = phase.changed(), if !ending => {
                if changed.is_err() || *phase.borrow() == Phase::Draining {
                    ending = true;
                    connection.as_mut().graceful_shutdown();
                }
            }
        }
    }
    gateway.relay().await; // here, where it counts as the connection that it is
}

/// Route, places and time of a request; None for those that the gateway serves.
fn find(
    request: &Request<Incoming>,
    config: &Config,
) -> Option<(usize, Vec<String>, Option<Duration>)> {
    let (uri, headers) = (request.uri(), request.headers());
    if request.method() != Method::POST || uri.query().is_some() {
        return None;
    }
    let mut routes = config.routes.iter().enumerate();
    let (at, places) = routes.find_map(|(at, r)| Some((at, r.pattern.places(uri.path())?)))?;
    if config.aside.iter().any(|name| headers.contains_key(name)) {
        return None;
    }
    if let Some(length) = headers.get(CONTENT_LENGTH) {
        let length: usize = length.to_str().ok()?.parse().ok()?;
        if length > config.max_body_bytes {
            return None;
        }
    }
    Some((at, places, time(headers, config.timeout)?))
}

/// The time that a caller gives; None when it makes no sense, which the gateway says how.
#[allow(clippy::option_option)]
fn time(headers: &HeaderMap, default: Duration) -> Option<Option<Duration>> {
    if headers.contains_key(metadata::TIMEOUT) {
        return metadata::timeout(headers).map(Some);
    }
    let given = headers.get("x-forebay-timeout-ms");
    let Some(given) = given.or_else(|| headers.get("connect-timeout-ms")) else {
        return Some(Some(default));
    };
    let text = given.to_str().ok()?;
    let digits = !text.is_empty() && text.len() <= 10 && text.bytes().all(|b| b.is_ascii_digit());
    digits.then(|| text.parse().ok().map(Duration::from_millis))
}

/// The caller of a request: the same object while a connection's requests say the same.
fn caller(
    last: &Mutex<Arc<Caller>>,
    headers: &HeaderMap,
    peer: &Arc<str>,
    forwarded: &[HeaderName],
) -> Arc<Caller> {
    let given = |name: &HeaderName| {
        let value = headers.get(name)?.to_str().ok()?;
        let printable = !value.is_empty() && !value.contains('\t');
        printable.then(|| (name.as_str().to_owned(), value.to_owned()))
    };
    let pairs: Vec<_> = forwarded.iter().filter_map(given).collect();
    let mut last = last.lock();
    if last.pairs != pairs || last.peer != *peer {
        *last = Arc::new(Caller {
            peer: peer.clone(),
            pairs,
            leases_key: OnceLock::new(),
            python: OnceLock::new(),
        });
    }
    last.clone()
}

/// A call on its way to Python.
struct Direct {
    at: usize,
    places: Vec<String>,
    within: Option<Duration>,
    caller: Arc<Caller>,
}

impl Direct {
    async fn serve(
        self,
        request: Request<Incoming>,
        shared: &Shared,
        config: &Config,
    ) -> Response<Reply> {
        let route = &config.routes[self.at];
        // Routes are numbered behind the methods of gRPC.
        let method = shared.config.methods.len() + self.at;
        match self.run(request, method, shared, config).await {
            Ok(outcome) => match outcome.payload {
                Some(body) => whole(outcome.status, outcome.trailers, body),
                None => route.error(code_of(&outcome.trailers)),
            },
            Err(code) => {
                if code == Code::ResourceExhausted as u8 {
                    shared.refusals[method].fetch_add(1, Ordering::Relaxed);
                }
                route.error(code)
            }
        }
    }

    async fn run(
        self,
        request: Request<Incoming>,
        method: usize,
        shared: &Shared,
        config: &Config,
    ) -> Result<Outcome, u8> {
        let deadline = self.within.and_then(|t| Instant::now().checked_add(t));
        let body = request.into_body();
        let receiving = receive(body, shared, config.max_body_bytes);
        let received = timeout(shared.config.receive_timeout, receiving).await;
        let (message, room) = received.map_err(|_| Code::DeadlineExceeded as u8)??;
        let method = u32::try_from(method).unwrap_or(u32::MAX);
        let (call, outcome) = Call::new(method, message, self.caller, deadline, self.places);
        if !shared.inbox.put(call.clone()) {
            return Err(Code::ResourceExhausted as u8);
        }
        let leaving = Leaving::new(&shared.inbox, &call, room);
        let outcome = wait(outcome, deadline, &leaving).await;
        outcome.map_err(|refusal| refusal.code as u8)
    }
}

fn code_of(trailers: &HeaderMap) -> u8 {
    let text = trailers.get(STATUS).and_then(|v| v.to_str().ok());
    text.and_then(|t| t.parse().ok())
        .unwrap_or(Code::Unavailable as u8)
}

async fn receive(mut body: Incoming, shared: &Shared, limit: usize) -> Result<(Bytes, Room), u8> {
    let mut room = shared.inbox.room();
    // Of a body in pieces nothing is known.
    let expected = usize::try_from(body.size_hint().lower()).map_err(|_| TOO_LARGE)?;
    if !room.grow(0, expected) {
        return Err(Code::ResourceExhausted as u8);
    }
    let mut first = Bytes::new();
    let mut rest = BytesMut::new();
    loop {
        let next = poll_fn(|c| Pin::new(&mut body).poll_frame(c)).await;
        let Some(frame) = next else { break };
        let Ok(piece) = frame.map_err(|_| Code::Unavailable as u8)?.into_data() else {
            continue;
        };
        if first.len() + rest.len() + piece.len() > limit {
            return Err(TOO_LARGE);
        }
        if !room.grow(piece.len(), expected) {
            return Err(Code::ResourceExhausted as u8);
        }
        if first.is_empty() && rest.is_empty() {
            first = piece; // most bodies come in one piece, and are not copied
        } else {
            rest.extend_from_slice(&std::mem::take(&mut first));
            rest.extend_from_slice(&piece);
        }
    }
    let message = if rest.is_empty() {
        first
    } else {
        rest.freeze()
    };
    Ok((message, room))
}

/// Headers of an answer; JSON, if they do not say else.
pub fn headers(pairs: Vec<(String, String)>) -> HeaderMap {
    let mut map = metadata::map(pairs);
    map.entry(CONTENT_TYPE)
        .or_insert(HeaderValue::from_static("application/json"));
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_have_places_for_one_segment_each() {
        let infer = Pattern::new("/v2/models/{name}/infer");
        assert_eq!(
            infer.places("/v2/models/a.b-c/infer"),
            Some(vec!["a.b-c".to_owned()])
        );
        for other in [
            "/v2/models//infer",
            "/v2/models/a/b/infer",
            "/v2/models/a%2Fb/infer",
            "/v2/models/a/infer/",
            "/v2/models/a",
            "/v2/models/a/inferx",
            "",
        ] {
            assert_eq!(infer.places(other), None, "{other}");
        }
        let search = Pattern::new("/collections/{collection}:search");
        assert_eq!(
            search.places("/collections/a:b:search"),
            Some(vec!["a:b".to_owned()])
        );
        assert_eq!(search.places("/collections/:search"), None);
        let plain = Pattern::new("/api/v1/tabular:predict");
        assert_eq!(plain.places("/api/v1/tabular:predict"), Some(vec![]));
        assert_eq!(plain.places("/api/v1/tabular:predicts"), None);
    }

    #[test]
    fn a_callers_time_is_its_own_the_default_or_the_gateways_affair() {
        let default = Duration::from_secs(9);
        let given = |name: &'static str, value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(name, value.parse().unwrap());
            time(&headers, default)
        };
        assert_eq!(time(&HeaderMap::new(), default), Some(Some(default)));
        assert_eq!(
            given("grpc-timeout", "20m"),
            Some(Some(Duration::from_millis(20)))
        );
        assert_eq!(
            given("x-forebay-timeout-ms", "1500"),
            Some(Some(Duration::from_millis(1500)))
        );
        for wrong in ["", "1.5", "-1", "12345678901", "1s"] {
            assert_eq!(given("x-forebay-timeout-ms", wrong), None, "{wrong:?}");
        }
        assert_eq!(given("grpc-timeout", "soon"), None);
    }
}
