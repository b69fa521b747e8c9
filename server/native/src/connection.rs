//! One HTTP/2 connection: which lane each of its calls takes, and how it ends.

use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body::Body;
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{oneshot, watch};
use tokio::task::spawn_blocking;
use tokio::time::{sleep, timeout, timeout_at};

use crate::call::{Call, Caller, Outcome};
use crate::cork::Cork;
use crate::frame::Receiver;
use crate::inbox::{Inbox, Room};
use crate::lease::Arrival;
use crate::metadata;
use crate::ordinary::Ordinary;
use crate::reply::{Reply, answer, plain, refusal, streamed};
use crate::server::{self, Phase, Shared};
use crate::status::{Code, PUSHBACK, Refusal};
use crate::stream::{LATE_GRACE, Stream};

const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 4 << 20;
/// Compressed messages that turn out to be longer are unpacked on a thread that no others wait for: they
/// may be a thousand times as long as they look.
const UNPACKED_HERE: usize = 64 << 10;
/// Answers that one stream may have unsent.
const SEND_BUFFER: usize = 1 << 20;

/// Serves the connection until its end.
pub async fn serve(
    stream: Box<dyn server::Stream>,
    peer: &str,
    shared: &Arc<Shared>,
    mut phase: watch::Receiver<Phase>,
) {
    let config = &shared.config;
    let greeted = Arc::new(AtomicBool::new(false));
    let leases = shared.leases.clone();
    let greeted_stream = Greeted {
        stream,
        heard: greeted.clone(),
        read: 0,
    };
    let stream = Cork::new(greeted_stream, Arc::new(move || leases.write()));
    let ordinary = Arc::new(Ordinary::new(config.ordinary.clone(), peer));
    let callers = Arc::new(Callers::new(peer.into()));
    let service = service_fn(|request| {
        let (shared, ordinary, callers) = (shared.clone(), ordinary.clone(), callers.clone());
        async move { Ok::<_, Infallible>(route(request, &shared, &ordinary, &callers).await) }
    });
    let mut connection = std::pin::pin!(
        http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .auto_date_header(false) // gRPC has none
            .max_concurrent_streams(config.max_streams)
            .max_header_list_size(config.max_header_bytes)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_send_buf_size(SEND_BUFFER)
            .keep_alive_interval(config.keepalive)
            .keep_alive_timeout(config.keepalive_timeout)
            .serve_connection(TokioIo::new(stream.clone()), service)
    );
    let age = config
        .max_age
        .map(|age| jittered(age, Arc::as_ptr(&ordinary).addr()));
    let mut end_of_age = std::pin::pin!(sleep(age.unwrap_or(Duration::MAX)));
    let mut greeting = std::pin::pin!(sleep(config.receive_timeout));
    let mut unsure = true;
    let mut ending = false;
    let mut aged = false;
    loop {
        let turn = poll_fn(|context| {
            let ended = connection.as_mut().poll(context);
            match stream.poll_out(context) {
                Poll::Ready(Err(_)) => Poll::Ready(()), // nobody is there any more
                _ => ended.map(|_| ()),
            }
        });
        tokio::select! {
            () = turn => return,
            () = &mut greeting, if unsure => {
                if !greeted.load(Ordering::Relaxed) {
                    return; // opened, and never spoke HTTP/2
                }
                unsure = false;
            }
            () = &mut end_of_age, if age.is_some() => {
                if aged {
                    return; // the grace is over too
                }
                (aged, ending) = (true, true);
                connection.as_mut().graceful_shutdown();
                end_of_age.as_mut().reset(tokio::time::Instant::now() + config.age_grace);
            }
            changed = phase.changed(), if !ending => {
                if changed.is_err() || *phase.borrow() == Phase::Draining {
                    ending = true;
                    connection.as_mut().graceful_shutdown();
                }
            }
        }
    }
}

/// The callers of one connection. Mostly they are one, and say the same with each call.
struct Callers(Mutex<Arc<Caller>>);

impl Callers {
    fn new(peer: Arc<str>) -> Self {
        Self(Mutex::new(Arc::new(Caller::new(peer, &HeaderMap::new()))))
    }

    fn of(&self, headers: &HeaderMap) -> Arc<Caller> {
        let mut last = self.0.lock();
        if !last.says(headers) {
            *last = Arc::new(Caller::new(last.peer.clone(), headers));
        }
        last.clone()
    }
}

/// Up to a tenth more, so that connections that came together do not leave together.
fn jittered(age: Duration, seed: usize) -> Duration {
    let share = (seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 48) as u32 & 0xff;
    age + age / 10 * share / 256
}

async fn route(
    request: Request<Incoming>,
    shared: &Arc<Shared>,
    ordinary: &Ordinary,
    callers: &Callers,
) -> Response<Reply> {
    let Some(&method) = shared.methods.get(request.uri().path()) else {
        return ordinary.pass(request).await;
    };
    let kind = request
        .headers()
        .get(CONTENT_TYPE)
        .map_or(&b""[..], |v| v.as_bytes());
    if request.method() != Method::POST || !kind.starts_with(b"application/grpc") {
        return plain(StatusCode::UNSUPPORTED_MEDIA_TYPE);
    }
    let (head, body) = request.into_parts();
    match fast(method, body, &head.headers, shared, callers).await {
        Ok(response) => response,
        Err(mut error) => {
            let exhausted = error.code == Code::ResourceExhausted;
            if exhausted {
                if error.details.is_empty() {
                    // Of such refusals only that of a message beyond the limit has none yet.
                    error = error.with_details(&shared.config.too_large);
                } else {
                    shared.refusals[method as usize].fetch_add(1, Ordering::Relaxed);
                }
            }
            let mut trailers = error.trailers();
            if exhausted {
                let left = metadata::timeout(&head.headers);
                trailers.insert(PUSHBACK, error.pushback(left));
            }
            if let Some(id) = metadata::request_id(&head.headers) {
                trailers.insert(metadata::REQUEST_ID, id.clone());
            }
            refusal(trailers)
        }
    }
}

/// A call of the fast lane, from its headers to its answer, or to the first piece of it.
async fn fast(
    method: u32,
    body: Incoming,
    headers: &HeaderMap,
    shared: &Arc<Shared>,
    callers: &Callers,
) -> Result<Response<Reply>, Refusal> {
    let deadline = metadata::timeout(headers).and_then(|t| Instant::now().checked_add(t));
    let receiving = receive(body, headers, shared);
    let (message, room) = match timeout(shared.config.receive_timeout, receiving).await {
        Ok(received) => received?,
        Err(_) => {
            return Err(Refusal::new(
                Code::DeadlineExceeded,
                "the request did not come in whole",
            ));
        }
    };
    let behind = || shared.inbox.behind();
    if let Some(full) = shared.shed.refusal(method, &message, deadline, behind) {
        return Err(full);
    }
    let arrival = Arrival {
        method,
        message: &message,
        headers,
        deadline,
    };
    let caller = callers.of(headers);
    if let Some(outcome) = shared.leases.answer(&arrival, &caller) {
        return Ok(answer(outcome));
    }
    if shared.config.methods[method as usize].streams {
        let (call, events) = Call::streamed(method, message, caller, deadline);
        if !shared.inbox.put(call.clone()) {
            return Err(shared.config.overload.clone());
        }
        let begun = Stream::begin(shared.inbox.clone(), call, events, room).await;
        return Ok(begun.map_or_else(|end| refusal(end.trailers), streamed));
    }
    let (call, outcome) = Call::new(method, message, caller, deadline, Vec::new());
    if !shared.inbox.put(call.clone()) {
        return Err(shared.config.overload.clone());
    }
    let leaving = Leaving::new(&shared.inbox, &call, room);
    let outcome = wait(outcome, deadline, &leaving).await;
    drop(leaving);
    outcome.map(answer)
}

/// The outcome of a call, or what is said when its time is over.
pub async fn wait(
    mut answer: oneshot::Receiver<Outcome>,
    deadline: Option<Instant>,
    leaving: &Leaving<'_>,
) -> Result<Outcome, Refusal> {
    let gone = |_| {
        let ending = || Refusal::new(Code::Unavailable, "the server is shutting down");
        leaving.call.refusal().unwrap_or_else(ending)
    };
    let Some(deadline) = deadline else {
        return answer.await.map_err(gone);
    };
    if let Ok(outcome) = timeout_at(deadline.into(), &mut answer).await {
        return outcome.map_err(gone);
    }
    leaving.inbox.late(leaving.call);
    match timeout(LATE_GRACE, answer).await {
        Ok(outcome) => outcome.map_err(gone),
        Err(_) => Err(Refusal::new(Code::DeadlineExceeded, "the deadline passed")),
    }
}

async fn receive(
    mut body: Incoming,
    headers: &HeaderMap,
    shared: &Arc<Shared>,
) -> Result<(Bytes, Room), Refusal> {
    let limit = shared.config.max_message_bytes;
    let gzip = metadata::is_gzip(headers);
    let mut receiver = Receiver::new(limit, gzip);
    let mut room = shared.inbox.room();
    loop {
        let next = poll_fn(|c| Pin::new(&mut body).poll_frame(c)).await;
        let Some(frame) = next else { break };
        let broken = |_| Refusal::new(Code::Unavailable, "the request broke off");
        let Ok(piece) = frame.map_err(broken)?.into_data() else {
            continue;
        };
        let size = piece.len();
        receiver.push(piece)?;
        if !room.grow(size, receiver.expected()) {
            return Err(shared.config.overload.clone());
        }
    }
    if !receiver.is_packed() {
        return Ok((receiver.finish()?, room));
    }
    let message = if let Some(short) = receiver.short(UNPACKED_HERE) {
        short
    } else {
        let turn = shared.unpacking.clone().acquire_owned().await;
        let gone = |_| Refusal::new(Code::Unavailable, "the server is shutting down");
        // Its turn and its room last until it is done, also when nobody waits for it any more.
        let unpack = move || (receiver.finish(), room, turn);
        let (message, own, _) = spawn_blocking(unpack).await.map_err(gone)?;
        room = own;
        message?
    };
    // What compression hid counts too.
    if !room.grow(message.len(), 0) {
        return Err(shared.config.overload.clone());
    }
    Ok((message, room))
}

/// Dropped with the call's future: when the client resets the stream, or the connection ends. It has
/// the room of the call's message.
pub struct Leaving<'a> {
    inbox: &'a Inbox,
    call: &'a Arc<Call>,
    room: Option<Room>,
}

impl<'a> Leaving<'a> {
    pub fn new(inbox: &'a Inbox, call: &'a Arc<Call>, room: Room) -> Self {
        Self {
            inbox,
            call,
            room: Some(room),
        }
    }
}

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        self.inbox.leave(self.call, self.room.take());
    }
}

/// Notices whether as much as HTTP/2's opening words have come.
struct Greeted {
    stream: Box<dyn server::Stream>,
    heard: Arc<AtomicBool>,
    read: usize,
}

const OPENING: usize = 24;

impl AsyncRead for Greeted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        let before = buffer.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(context, buffer);
        if self.read < OPENING {
            self.read += buffer.filled().len() - before;
            if self.read >= OPENING {
                self.heard.store(true, Ordering::Relaxed);
            }
        }
        polled
    }
}

impl AsyncWrite for Greeted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, data)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[std::io::IoSlice<'_>],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, data)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
