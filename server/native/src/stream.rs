//! An answer that is a stream of messages, from Python's first word to the trailers.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body::Frame;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::{Instant, Sleep, sleep_until};

use crate::call::{Call, Event, Outcome};
use crate::frame::frame;
use crate::inbox::{Inbox, Room};
use crate::status::{Code, Refusal};

/// After the deadline, the time for Python to say where the call was when it passed.
pub const LATE_GRACE: Duration = Duration::from_secs(1);

/// See the module. Dropped before its end (the client reset it, or its connection ended), it tells
/// Python.
pub struct Stream {
    inbox: Arc<Inbox>,
    call: Arc<Call>,
    events: UnboundedReceiver<Event>,
    /// What comes next, where it is known.
    next: Option<Event>,
    /// The second piece of a large message.
    rest: Option<Bytes>,
    until: Option<Pin<Box<Sleep>>>,
    late: bool,
    ended: bool,
    room: Option<Room>,
}

impl Stream {
    /// Waits for the first word. Fails with the end, where that comes before any message.
    pub async fn begin(
        inbox: Arc<Inbox>,
        call: Arc<Call>,
        events: UnboundedReceiver<Event>,
        room: Room,
    ) -> Result<Self, Outcome> {
        let until = call.deadline.map(|d| Box::pin(sleep_until(d.into())));
        let mut stream = Self {
            inbox,
            call,
            events,
            next: None,
            rest: None,
            until,
            late: false,
            ended: false,
            room: Some(room),
        };
        match poll_fn(|context| stream.poll_event(context)).await {
            Event::End(outcome) => {
                stream.ended = true;
                Err(outcome)
            }
            first @ Event::Message(_) => {
                stream.next = Some(first);
                Ok(stream)
            }
        }
    }

    /// The body's next piece.
    pub fn poll_frame(&mut self, context: &mut Context<'_>) -> Poll<Option<Frame<Bytes>>> {
        if let Some(rest) = self.rest.take() {
            return Poll::Ready(Some(Frame::data(rest)));
        }
        if self.ended {
            return Poll::Ready(None);
        }
        let event = match self.next.take() {
            Some(event) => event,
            None => std::task::ready!(self.poll_event(context)),
        };
        match event {
            Event::Message(message) => {
                self.inbox.read(&self.call, message.len());
                let (first, rest) = frame(message);
                self.rest = rest;
                Poll::Ready(Some(Frame::data(first)))
            }
            Event::End(outcome) => {
                self.ended = true;
                Poll::Ready(Some(Frame::trailers(outcome.trailers)))
            }
        }
    }

    fn poll_event(&mut self, context: &mut Context<'_>) -> Poll<Event> {
        match self.events.poll_recv(context) {
            Poll::Ready(Some(event)) => return Poll::Ready(event),
            Poll::Ready(None) => {
                return Poll::Ready(end(Code::Unavailable, "the server is shutting down"));
            }
            Poll::Pending => {}
        }
        let Some(until) = &mut self.until else {
            return Poll::Pending;
        };
        while until.as_mut().poll(context).is_ready() {
            if self.late {
                return Poll::Ready(end(Code::DeadlineExceeded, "the deadline passed"));
            }
            self.late = true;
            self.inbox.late(&self.call);
            until.as_mut().reset(Instant::now() + LATE_GRACE);
        }
        Poll::Pending
    }
}

fn end(code: Code, message: &str) -> Event {
    Event::End(Outcome::new(None, Refusal::new(code, message).trailers()))
}

impl Drop for Stream {
    fn drop(&mut self) {
        let room = self.room.take();
        if self.ended {
            self.inbox.abandon(&self.call, room); // its time may be over while it still waits
        } else {
            self.inbox.leave(&self.call, room);
        }
    }
}
