//! The way to the gateway: every HTTP request that is not served here goes through unchanged, upgrades
//! to `WebSockets` included.

use std::error::Error as _;
use std::future::Future;
use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONNECTION, EXPECT, TRANSFER_ENCODING, UPGRADE};
use http::{HeaderMap, HeaderName, Request, Response, StatusCode, Version};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncWriteExt, copy, split};
use tokio::net::UnixStream;
use tokio::sync::Mutex;
use tokio::time::{Instant, Sleep, sleep, timeout};

use crate::reply::Reply;

const HTTP2_SETTINGS: HeaderName = HeaderName::from_static("http2-settings");
const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
/// Time that a byte of a request's body is worth: 500 a second are enough, as for Apache's
/// `RequestReadTimeout`.
const BYTE: Duration = Duration::from_millis(2);

/// One client connection's connection to the gateway, opened by its first request. HTTP/1.1 has one
/// request at a time on each.
pub struct Gateway {
    socket: PathBuf,
    /// Time that a request's body may be waited for, see `Patient`.
    patience: Duration,
    sender: Mutex<Option<SendRequest<Patient>>>,
    /// Both ends of a connection that became a `WebSocket`.
    switched: Mutex<Option<(OnUpgrade, OnUpgrade)>>,
}

impl Gateway {
    pub fn new(socket: PathBuf, patience: Duration) -> Self {
        Self {
            socket,
            patience,
            sender: Mutex::new(None),
            switched: Mutex::new(None),
        }
    }

    /// Sends the request on, and gives the answer as it comes. `TimedOut`: the request did not come.
    pub async fn pass(&self, mut request: Request<Incoming>) -> io::Result<Response<Reply>> {
        let offer = request.headers().get(UPGRADE);
        let upgrades = offer.is_some_and(|to| to.as_bytes().eq_ignore_ascii_case(b"websocket"));
        if !upgrades {
            // Java's HttpClient offers HTTP/2 with its requests. The gateway's server would take the
            // offer for the end of the request, and lose its body.
            request.headers_mut().remove(UPGRADE);
            request.headers_mut().remove(HTTP2_SETTINGS);
        }
        let ours = upgrades.then(|| hyper::upgrade::on(&mut request));
        *request.version_mut() = Version::HTTP_11;
        request.headers_mut().remove(EXPECT); // it is answered when the body is read
        hop_by_hop(request.headers_mut(), upgrades);
        let mut slot = self.sender.lock().await;
        let mut kept = slot.take();
        if let Some(sender) = &mut kept
            && sender.ready().await.is_err()
        {
            kept = None;
        }
        let mut sender = match kept {
            Some(sender) => sender,
            None => self.connect().await?,
        };
        let request = request.map(|body| Patient {
            body,
            patience: self.patience,
            left: self.patience,
            until: None,
        });
        let mut response = sender.send_request(request).await.map_err(why)?;
        *slot = Some(sender);
        drop(slot);
        let switched = response.status() == StatusCode::SWITCHING_PROTOCOLS;
        if switched && let Some(ours) = ours {
            let theirs = hyper::upgrade::on(&mut response);
            *self.switched.lock().await = Some((ours, theirs));
        }
        hop_by_hop(response.headers_mut(), switched);
        Ok(response.map(Reply::Passed))
    }

    /// What the connection is for when it speaks HTTP no more: nothing, or a `WebSocket` until its end.
    pub async fn relay(&self) {
        let Some((ours, theirs)) = self.switched.lock().await.take() else {
            return;
        };
        let (Ok(ours), Ok(theirs)) = (ours.await, theirs.await) else {
            return;
        };
        let (mut from_client, mut to_client) = split(TokioIo::new(ours));
        let (mut from_gateway, mut to_gateway) = split(TokioIo::new(theirs));
        let up = async {
            let _ = copy(&mut from_client, &mut to_gateway).await;
            let _ = to_gateway.shutdown().await;
        };
        let down = async {
            let _ = copy(&mut from_gateway, &mut to_client).await;
            let _ = to_client.shutdown().await;
        };
        let (mut up, mut down) = (std::pin::pin!(up), std::pin::pin!(down));
        // Where one way has ended, the other is to follow: a client that neither reads nor leaves would
        // hold its connection for ever.
        tokio::select! {
            () = &mut up => drop(timeout(self.patience, down).await),
            () = &mut down => drop(timeout(self.patience, up).await),
        }
    }

    async fn connect(&self) -> io::Result<SendRequest<Patient>> {
        let stream = UnixStream::connect(&self.socket).await?;
        let (sender, connection) = handshake(TokioIo::new(stream))
            .await
            .map_err(io::Error::other)?;
        tokio::spawn(connection.with_upgrades()); // it ends when the sender is dropped
        Ok(sender)
    }
}

/// A request's body on its way. It fails when its client lets itself be waited for too long: one that
/// is gone without a word, or sends a byte now and then, would hold its connection for ever.
///
/// Each byte buys some time, but no more is ever left than `patience`. Time that the gateway takes is
/// not counted.
struct Patient {
    body: Incoming,
    patience: Duration,
    left: Duration,
    /// While it is waited for.
    until: Option<Pin<Box<Sleep>>>,
}

impl Body for Patient {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        if let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(context) {
            if let Some(until) = self.until.take() {
                self.left = until.deadline().saturating_duration_since(Instant::now());
            }
            if let Some(Ok(piece)) = frame.as_ref().map(|f| f.as_ref().map(Frame::data_ref)) {
                let size = piece.map_or(0, Bytes::len);
                let bought = BYTE.saturating_mul(u32::try_from(size).unwrap_or(u32::MAX));
                self.left = self.left.saturating_add(bought).min(self.patience);
            }
            return Poll::Ready(frame.map(|f| f.map_err(io::Error::other)));
        }
        let left = self.left;
        let until = self.until.get_or_insert_with(|| Box::pin(sleep(left)));
        let over = until.as_mut().poll(context);
        over.map(|()| Some(Err(io::ErrorKind::TimedOut.into())))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Why a request got no answer.
fn why(error: hyper::Error) -> io::Error {
    let cause = error.source().and_then(|e| e.downcast_ref::<io::Error>());
    match cause.map(io::Error::kind) {
        Some(io::ErrorKind::TimedOut) => io::ErrorKind::TimedOut.into(),
        _ => io::Error::other(error),
    }
}

/// Leaves out what is said of one connection alone.
fn hop_by_hop(headers: &mut HeaderMap, upgrades: bool) {
    headers.remove(KEEP_ALIVE);
    headers.remove(TRANSFER_ENCODING);
    if !upgrades {
        headers.remove(CONNECTION);
    }
}
