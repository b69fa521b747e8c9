//! The bodies of answers: a message with trailers, trailers alone, or what the ordinary lane sends.

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderMap, HeaderValue, Response, StatusCode};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;

use crate::call::Outcome;
use crate::frame::frame;
use crate::stream::Stream;

/// See the module.
pub enum Reply {
    Empty,
    Message {
        data: [Option<Bytes>; 2],
        trailers: Option<HeaderMap>,
    },
    /// An HTTP answer's body.
    Whole(Option<Bytes>),
    Passed(Incoming),
    Streamed(Box<Stream>),
}

impl Body for Reply {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        match &mut *self {
            Self::Empty => Poll::Ready(None),
            Self::Message { data, trailers } => {
                let next = data[0].take().or_else(|| data[1].take()).map(Frame::data);
                let next = next.or_else(|| trailers.take().map(Frame::trailers));
                Poll::Ready(next.map(Ok))
            }
            Self::Whole(body) => Poll::Ready(body.take().map(|b| Ok(Frame::data(b)))),
            Self::Passed(body) => Pin::new(body).poll_frame(context),
            Self::Streamed(stream) => stream.poll_frame(context).map(|f| f.map(Ok)),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Message { .. } | Self::Streamed(_) => false,
            Self::Whole(body) => body.is_none(),
            Self::Passed(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(body) => SizeHint::with_exact(body.as_ref().map_or(0, |b| b.len() as u64)),
            _ => SizeHint::default(), // gRPC has no content-length
        }
    }
}

/// The answer to a call of the fast lane.
pub fn answer(outcome: Outcome) -> Response<Reply> {
    let Some(payload) = outcome.payload else {
        return refusal(outcome.trailers);
    };
    let (first, second) = frame(payload);
    let body = Reply::Message {
        data: [Some(first), second],
        trailers: Some(outcome.trailers),
    };
    with_type(Response::new(body))
}

/// An answer to HTTP.
pub fn whole(status: StatusCode, headers: HeaderMap, body: Bytes) -> Response<Reply> {
    let mut response = Response::new(Reply::Whole(Some(body)));
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    response
}

/// An answer in pieces.
pub fn streamed(stream: Stream) -> Response<Reply> {
    with_type(Response::new(Reply::Streamed(Box::new(stream))))
}

/// An error: trailers alone, which gRPC sends as headers.
pub fn refusal(trailers: HeaderMap) -> Response<Reply> {
    let mut response = Response::new(Reply::Empty);
    *response.headers_mut() = trailers;
    with_type(response)
}

/// An answer to what is no gRPC.
pub fn plain(status: StatusCode) -> Response<Reply> {
    let mut response = Response::new(Reply::Empty);
    *response.status_mut() = status;
    response
}

fn with_type(mut response: Response<Reply>) -> Response<Reply> {
    let value = HeaderValue::from_static("application/grpc");
    response.headers_mut().insert(CONTENT_TYPE, value);
    response
}
