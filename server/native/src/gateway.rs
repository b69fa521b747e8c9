//! The way to the gateway: every HTTP request that is not served here goes through unchanged, upgrades
//! to `WebSockets` included.

use std::io;
use std::path::PathBuf;

use http::header::{CONNECTION, EXPECT, TRANSFER_ENCODING, UPGRADE};
use http::{HeaderMap, HeaderName, Request, Response, StatusCode, Version};
use hyper::body::Incoming;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use tokio::io::copy_bidirectional;
use tokio::net::UnixStream;
use tokio::sync::Mutex;

use crate::reply::Reply;

const HTTP2_SETTINGS: HeaderName = HeaderName::from_static("http2-settings");
const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");

/// One client connection's connection to the gateway, opened by its first request. HTTP/1.1 has one
/// request at a time on each.
pub struct Gateway {
    socket: PathBuf,
    sender: Mutex<Option<SendRequest<Incoming>>>,
}

impl Gateway {
    pub fn new(socket: PathBuf) -> Self {
        Self {
            socket,
            sender: Mutex::new(None),
        }
    }

    /// Sends the request on, and gives the answer as it comes.
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
        let sent = sender.send_request(request).await;
        let mut response = sent.map_err(io::Error::other)?;
        *slot = Some(sender);
        drop(slot);
        let switched = response.status() == StatusCode::SWITCHING_PROTOCOLS;
        if switched && let Some(ours) = ours {
            let theirs = hyper::upgrade::on(&mut response);
            tokio::spawn(async move {
                if let (Ok(ours), Ok(theirs)) = (ours.await, theirs.await) {
                    let (mut ours, mut theirs) = (TokioIo::new(ours), TokioIo::new(theirs));
                    let _ = copy_bidirectional(&mut ours, &mut theirs).await;
                }
            });
        }
        hop_by_hop(response.headers_mut(), switched);
        Ok(response.map(Reply::Passed))
    }

    async fn connect(&self) -> io::Result<SendRequest<Incoming>> {
        let stream = UnixStream::connect(&self.socket).await?;
        let (sender, connection) = handshake(TokioIo::new(stream))
            .await
            .map_err(io::Error::other)?;
        tokio::spawn(connection.with_upgrades()); // it ends when the sender is dropped
        Ok(sender)
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
