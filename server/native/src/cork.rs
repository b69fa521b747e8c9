//! What one connection writes in a turn, written at the turn's end.
//!
//! HTTP/2 flushes before and after each larger DATA frame. A batch of answers would leave by as many
//! system calls as it has answers, each of which wakes the client for one of them.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Buf, BytesMut};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// More than this is not held back.
const FULL: usize = 64 << 10;
/// Pieces of this size are written as they are, and not copied.
const LARGE: usize = 16 << 10;
/// Buffers that are free, for the next connections that write: idle ones hold nothing, and busy ones need not
/// ask for memory in each turn.
static FREE: Mutex<Vec<BytesMut>> = Mutex::new(Vec::new());
const MOST_FREE: usize = 64;
const BUFFER: usize = 8 << 10;

/// Is called each time before bytes leave.
pub type Before = Arc<dyn Fn() + Send + Sync>;

struct State<S> {
    stream: S,
    waiting: BytesMut,
    before: Before,
}

/// See the module. Clones are the same stream: one for the protocol, one for who ends its turns.
pub struct Cork<S>(Arc<Mutex<State<S>>>);

impl<S> Clone for Cork<S> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<S: AsyncWrite + Unpin> Cork<S> {
    pub fn new(stream: S, before: Before) -> Self {
        Self(Arc::new(Mutex::new(State {
            stream,
            waiting: BytesMut::new(),
            before,
        })))
    }

    /// Writes what waits. Pending: the task is woken when more can be written.
    pub fn poll_out(&self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut state = self.0.lock();
        ready!(state.poll_out(context))?;
        Pin::new(&mut state.stream).poll_flush(context)
    }
}

impl<S: AsyncWrite + Unpin> State<S> {
    fn poll_out(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.waiting.is_empty() {
            (self.before)();
        }
        while !self.waiting.is_empty() {
            let n = ready!(Pin::new(&mut self.stream).poll_write(context, &self.waiting))?;
            if n == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.waiting.advance(n);
        }
        let mut waiting = std::mem::take(&mut self.waiting);
        waiting.clear();
        let mut free = FREE.lock();
        if free.len() < MOST_FREE && waiting.try_reclaim(BUFFER) && waiting.capacity() <= 2 * BUFFER
        {
            free.push(waiting);
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Cork<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0.lock().stream).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Cork<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(context, &[io::IoSlice::new(data)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut state = self.0.lock();
        let size = data.iter().map(|piece| piece.len()).sum();
        if size >= LARGE || state.waiting.len() >= FULL {
            ready!(state.poll_out(context))?;
        }
        if size >= LARGE {
            (state.before)();
            return Pin::new(&mut state.stream).poll_write_vectored(context, data);
        }
        if state.waiting.capacity() == 0 {
            let free = FREE.lock().pop();
            state.waiting = free.unwrap_or_else(|| BytesMut::with_capacity(BUFFER));
        }
        for piece in data {
            state.waiting.extend_from_slice(piece);
        }
        Poll::Ready(Ok(size))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// Not yet: whoever ends the turn calls `poll_out`.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut state = self.0.lock();
        ready!(state.poll_out(context))?;
        Pin::new(&mut state.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    /// All that is there to read now.
    async fn there(stream: &mut (impl AsyncRead + Unpin)) -> Vec<u8> {
        let mut found = vec![0; 1 << 20];
        let reading = stream.read(&mut found);
        let n = tokio::time::timeout(std::time::Duration::from_millis(20), reading).await;
        found.truncate(n.map_or(0, Result::unwrap));
        found
    }

    async fn out(cork: &Cork<impl AsyncWrite + Unpin>) {
        std::future::poll_fn(|c| cork.poll_out(c)).await.unwrap();
    }

    #[tokio::test(flavor = "current_thread")]
    async fn small_writes_leave_together_at_the_end_of_the_turn() {
        let (near, mut far) = duplex(1 << 20);
        let mut cork = Cork::new(near, Arc::new(|| ()));
        for piece in [&b"one "[..], b"two ", b"three"] {
            cork.write_all(piece).await.unwrap();
            cork.flush().await.unwrap();
        }
        assert_eq!(there(&mut far).await, b"");
        out(&cork.clone()).await;
        assert_eq!(there(&mut far).await, b"one two three");
    }

    #[tokio::test(flavor = "current_thread")]
    async fn large_writes_keep_their_place_and_are_not_held_back() {
        let (near, mut far) = duplex(1 << 20);
        let mut cork = Cork::new(near, Arc::new(|| ()));
        let large = vec![7; LARGE];
        cork.write_all(b"first").await.unwrap();
        cork.write_all(&large).await.unwrap();
        let mut found = there(&mut far).await;
        found.extend(there(&mut far).await);
        assert_eq!(found[..5], *b"first");
        assert_eq!(found[5..], large);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_reader_that_does_not_read_holds_the_writer_up() {
        let (near, mut far) = duplex(1000);
        let cork = Cork::new(near, Arc::new(|| ()));
        let mut writer = cork.clone();
        let all = vec![7; FULL * 4];
        let expected = all.clone();
        let writing = tokio::spawn(async move {
            for piece in all.chunks(999) {
                writer.write_all(piece).await.unwrap();
            }
            writer.shutdown().await.unwrap();
        });
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        assert!(!writing.is_finished());
        assert!(cork.0.lock().waiting.len() <= FULL + 999);
        let mut found = Vec::new();
        far.read_to_end(&mut found).await.unwrap();
        writing.await.unwrap();
        assert_eq!(found, expected);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn somebody_is_told_before_bytes_leave() {
        let (near, mut far) = duplex(1 << 20);
        let told = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let count = told.clone();
        let before: Before = Arc::new(move || {
            count.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        });
        let times = || told.load(std::sync::atomic::Ordering::SeqCst);
        let mut cork = Cork::new(near, before);
        cork.write_all(b"small").await.unwrap();
        assert_eq!(times(), 0);
        out(&cork).await;
        assert_eq!((times(), there(&mut far).await), (1, b"small".to_vec()));
        cork.write_all(&vec![7; LARGE]).await.unwrap();
        assert_eq!(times(), 2);
        out(&cork).await;
        assert_eq!(times(), 2, "nothing waits");
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_reader_that_is_gone_is_an_error_of_the_turn() {
        let (near, far) = duplex(1000);
        let mut cork = Cork::new(near, Arc::new(|| ()));
        cork.write_all(b"late").await.unwrap();
        drop(far);
        let ended = std::future::poll_fn(|c| cork.poll_out(c)).await;
        assert_eq!(ended.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }
}
