//! The listener, its connections, and their orderly end.

use std::collections::HashMap;
use std::io;
use std::net::ToSocketAddrs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::{Mutex, RwLock};
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::runtime::Runtime;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_rustls::TlsAcceptor;

use crate::connection;
use crate::inbox::{Bounds, Inbox};
use crate::status::Refusal;

/// All that the server needs to know; times in seconds are `Duration`s here.
#[derive(Clone)]
pub struct Config {
    /// Paths of the fast lane's methods, `/package.Service/Method`.
    pub methods: Vec<String>,
    /// The ordinary lane's Unix socket.
    pub ordinary: PathBuf,
    pub threads: usize,
    pub max_message_bytes: usize,
    pub max_header_bytes: u32,
    pub max_connections: usize,
    pub max_streams: u32,
    pub bounds: Bounds,
    pub keepalive: Duration,
    pub keepalive_timeout: Duration,
    /// None: connections may stay for ever.
    pub max_age: Option<Duration>,
    /// Time for running calls when a connection's age is over.
    pub age_grace: Duration,
    /// Time for a connection's handshake, and for a unary request to come in whole.
    pub receive_timeout: Duration,
    /// The answer when too much waits.
    pub overload: Refusal,
}

/// What connections share.
pub struct Shared {
    pub config: Config,
    pub methods: HashMap<String, u32>,
    pub inbox: Arc<Inbox>,
    pub connections: AtomicUsize,
    pub refused_connections: AtomicUsize,
    tls: RwLock<Option<Arc<ServerConfig>>>,
}

/// Where the server is in its life, as its connections see it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    Serving,
    Draining,
}

/// A running server. Dropping it ends all connections.
pub struct Server {
    pub shared: Arc<Shared>,
    pub port: u16,
    phase: watch::Sender<Phase>,
    alive: Mutex<Option<mpsc::Receiver<()>>>,
    runtime: Mutex<Option<Runtime>>,
}

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Server {
    /// Listens on `host:port` or `unix:path`.
    pub fn start(
        address: &str,
        config: Config,
        tls: Option<Arc<ServerConfig>>,
    ) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(config.threads)
            .thread_name("forebay-grpc")
            .enable_all()
            .build()?;
        let (listener, port) = {
            let _guard = runtime.enter();
            listen(address)?
        };
        let paths = config.methods.iter().cloned();
        let shared = Arc::new(Shared {
            methods: paths.zip(0..).collect(),
            inbox: Arc::new(Inbox::new(config.bounds)),
            connections: AtomicUsize::new(0),
            refused_connections: AtomicUsize::new(0),
            tls: RwLock::new(tls),
            config,
        });
        let (phase, watched) = watch::channel(Phase::Serving);
        let (sender, alive) = mpsc::channel(1);
        runtime.spawn(accept(listener, shared.clone(), watched, sender));
        Ok(Self {
            shared,
            port,
            phase,
            alive: Mutex::new(Some(alive)),
            runtime: Mutex::new(Some(runtime)),
        })
    }

    /// Takes these TLS settings for connections from now on.
    pub fn set_tls(&self, tls: Arc<ServerConfig>) {
        *self.shared.tls.write() = Some(tls);
    }

    /// Stops listening, tells clients to go (GOAWAY), and waits for running calls. True when all
    /// connections have ended.
    pub fn drain(&self, timeout: Duration) -> bool {
        self.phase.send_replace(Phase::Draining);
        let Some(mut alive) = self.alive.lock().take() else {
            return true;
        };
        let Some(handle) = self.runtime.lock().as_ref().map(|r| r.handle().clone()) else {
            return true;
        };
        handle.block_on(async move { tokio::time::timeout(timeout, alive.recv()).await.is_ok() })
    }

    /// Ends all that is left. Idempotent.
    pub fn close(&self) {
        self.shared.inbox.close();
        if let Some(runtime) = self.runtime.lock().take() {
            runtime.shutdown_timeout(Duration::from_secs(1));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.close();
    }
}

fn listen(address: &str) -> io::Result<(Listener, u16)> {
    if let Some(path) = address.strip_prefix("unix:") {
        let path = Path::new(path);
        if std::os::unix::net::UnixStream::connect(path).is_err() {
            let _ = std::fs::remove_file(path); // left by a server that was killed
        }
        return Ok((Listener::Unix(UnixListener::bind(path)?), 0));
    }
    let mut last = io::Error::new(io::ErrorKind::InvalidInput, "no such host");
    for resolved in address.to_socket_addrs()? {
        let bound = std::net::TcpListener::bind(resolved);
        match bound {
            Ok(listener) => {
                listener.set_nonblocking(true)?;
                let port = listener.local_addr()?.port();
                return Ok((Listener::Tcp(TcpListener::from_std(listener)?), port));
            }
            Err(e) => last = e,
        }
    }
    Err(last)
}

async fn accept(
    listener: Listener,
    shared: Arc<Shared>,
    mut phase: watch::Receiver<Phase>,
    alive: mpsc::Sender<()>,
) {
    let room = Arc::new(Semaphore::new(shared.config.max_connections));
    loop {
        let accepted = tokio::select! {
            biased;
            _ = phase.changed() => return,
            accepted = next(&listener) => accepted,
        };
        let Ok((stream, peer)) = accepted else {
            // Out of descriptors, say: give those that are held time to end.
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let Ok(permit) = room.clone().try_acquire_owned() else {
            shared.refused_connections.fetch_add(1, Ordering::Relaxed);
            continue; // dropped, which closes it
        };
        let (shared, phase, alive) = (shared.clone(), phase.clone(), alive.clone());
        tokio::spawn(async move {
            shared.connections.fetch_add(1, Ordering::Relaxed);
            welcome(stream, &peer, &shared, phase).await;
            shared.connections.fetch_sub(1, Ordering::Relaxed);
            drop((permit, alive));
        });
    }
}

async fn next(listener: &Listener) -> io::Result<(Box<dyn Stream>, String)> {
    match listener {
        Listener::Tcp(listener) => {
            let (stream, peer) = listener.accept().await?;
            stream.set_nodelay(true)?;
            let family = if peer.is_ipv4() { "ipv4" } else { "ipv6" };
            Ok((Box::new(stream), format!("{family}:{peer}")))
        }
        Listener::Unix(listener) => {
            let (stream, _) = listener.accept().await?;
            Ok((Box::new(stream), "unix:".to_owned()))
        }
    }
}

async fn welcome(
    stream: Box<dyn Stream>,
    peer: &str,
    shared: &Arc<Shared>,
    phase: watch::Receiver<Phase>,
) {
    let tls = shared.tls.read().clone();
    let Some(tls) = tls else {
        return connection::serve(stream, peer, shared, phase).await;
    };
    let handshake = TlsAcceptor::from(tls).accept(stream);
    let within = shared.config.receive_timeout;
    if let Ok(Ok(stream)) = tokio::time::timeout(within, handshake).await {
        connection::serve(Box::new(stream), peer, shared, phase).await;
    }
}

/// A connection's bytes.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}
