//! The way to the ordinary lane: every call that the fast lane does not know goes through unchanged.

use std::mem;
use std::path::PathBuf;

use http::header::TE;
use http::uri::{Authority, Scheme};
use http::{HeaderName, HeaderValue, Request, Response, Uri};
use hyper::body::Incoming;
use hyper::client::conn::http2::{Builder, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::UnixStream;
use tokio::sync::Mutex;

use crate::reply::{Reply, refusal};
use crate::status::{Code, Refusal};

/// Tells the ordinary lane whose call this is. A caller's own value never gets through.
pub const PEER: HeaderName = HeaderName::from_static("forebay-peer");
/// Room of one connection for messages that its client has not read yet.
const CONNECTION_WINDOW: u32 = 4 << 20;
const STREAM_WINDOW: u32 = 1 << 20;

/// One client connection's connection to the ordinary lane, opened by its first call.
///
/// One each, so that flow control stays between that client and the server: who reads slowly fills
/// windows that are his own.
pub struct Ordinary {
    socket: PathBuf,
    peer: HeaderValue,
    sender: Mutex<Option<SendRequest<Incoming>>>,
}

impl Ordinary {
    pub fn new(socket: PathBuf, peer: &str) -> Self {
        let peer = HeaderValue::from_str(peer).unwrap_or(HeaderValue::from_static("unknown"));
        Self {
            socket,
            peer,
            sender: Mutex::new(None),
        }
    }

    /// Sends the call on, and gives the answer as it comes.
    pub async fn pass(&self, mut request: Request<Incoming>) -> Response<Reply> {
        request.headers_mut().insert(PEER, self.peer.clone());
        complete(&mut request);
        let answer = match self.sender().await {
            Ok(mut sender) => sender
                .send_request(request)
                .await
                .map_err(|e| e.to_string()),
            Err(e) => Err(e.to_string()),
        };
        if let Ok(response) = answer {
            return response.map(Reply::Passed);
        }
        let text = "the server is not ready for this call";
        refusal(Refusal::new(Code::Unavailable, text).trailers())
    }

    async fn sender(&self) -> std::io::Result<SendRequest<Incoming>> {
        let mut slot = self.sender.lock().await;
        if let Some(sender) = slot.as_ref().filter(|s| !s.is_closed()) {
            return Ok(sender.clone());
        }
        let stream = UnixStream::connect(&self.socket).await?;
        let (sender, connection) = Builder::new(TokioExecutor::new())
            .initial_connection_window_size(CONNECTION_WINDOW)
            .initial_stream_window_size(STREAM_WINDOW)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(std::io::Error::other)?;
        tokio::spawn(connection); // it ends when the last sender is dropped
        *slot = Some(sender.clone());
        Ok(sender)
    }
}

/// Adds what a caller may leave out and the way over HTTP/2 needs: whom the call is for, which only
/// proxies care for, and that trailers are understood.
fn complete(request: &mut Request<Incoming>) {
    let trailers = HeaderValue::from_static("trailers");
    request.headers_mut().insert(TE, trailers);
    if request.uri().authority().is_none() {
        let mut parts = mem::take(request.uri_mut()).into_parts();
        parts.scheme = Some(Scheme::HTTP);
        parts.authority = Some(Authority::from_static("localhost"));
        *request.uri_mut() = Uri::from_parts(parts).unwrap_or_default();
    }
}
