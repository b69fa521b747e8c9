//! The listener, its connections, and their orderly end.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use parking_lot::{Mutex, RwLock};
use rustls::ServerConfig;
#[cfg(target_os = "linux")]
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio_rustls::TlsAcceptor;

use crate::call::{Call, Outcome};
use crate::inbox::{Bounds, Inbox};
use crate::lease::Leases;
use crate::shed::Shed;
use crate::status::Refusal;
use crate::{connection, http1};

/// A method of the fast lane.
#[derive(Clone)]
pub struct Method {
    /// `/package.Service/Method`.
    pub path: String,
    /// The fields that tell its queues apart, see `Shed`.
    pub fields: Vec<u64>,
    /// Whether its answer is a stream.
    pub streams: bool,
}

/// All that the server needs to know; times in seconds are `Duration`s here.
#[derive(Clone)]
pub struct Config {
    pub methods: Vec<Method>,
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
    /// What is said of a message beyond the limit: a serialised google.rpc.Status without a message.
    pub too_large: Vec<u8>,
    /// What ids of requests that are answered here begin with.
    pub id_prefix: String,
    /// A second port, for HTTP/1.1.
    pub http: Option<http1::Config>,
}

impl Config {
    /// How long a peer may leave untaken what was sent: as long as until an idle one is found to be
    /// dead. The kernel's own bound is a quarter of an hour, and none for a peer that does not read.
    #[cfg(target_os = "linux")]
    fn untaken(&self) -> Duration {
        // The kernel counts milliseconds in 31 bits.
        (self.keepalive + self.keepalive_timeout).min(Duration::from_millis(i32::MAX as u64))
    }
}

/// The TLS of each port. None: it is in the clear.
pub struct Tls {
    pub grpc: Option<Arc<ServerConfig>>,
    pub http: Option<Arc<ServerConfig>>,
}

impl Tls {
    fn of(&self, door: Door) -> Option<Arc<ServerConfig>> {
        match door {
            Door::Grpc => self.grpc.clone(),
            Door::Http => self.http.clone(),
        }
    }
}

/// What connections share.
pub struct Shared {
    pub config: Config,
    pub methods: HashMap<String, u32>,
    pub inbox: Arc<Inbox>,
    pub shed: Shed,
    pub leases: Arc<Leases>,
    /// The right to unpack a message that may be long: at a time, as many are as the transport has
    /// threads.
    pub unpacking: Arc<Semaphore>,
    /// Calls that were refused here because too much waits, by method, then by route of HTTP, since
    /// somebody asked.
    pub refusals: Vec<AtomicUsize>,
    pub connections: AtomicUsize,
    pub refused_connections: AtomicUsize,
    tls: RwLock<Tls>,
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
    /// Of HTTP; 0 without it.
    pub http_port: u16,
    phase: watch::Sender<Phase>,
    /// Of the HTTP port, which may drain before the other.
    http_phase: watch::Sender<Phase>,
    alive: Mutex<Option<mpsc::Receiver<()>>>,
    handle: Handle,
    driver: Mutex<Option<Driver>>,
}

/// What runs the connections.
enum Driver {
    /// One thread takes what is ready in turn: all answers that are there reach a connection before it
    /// writes, where a worker of the other kind writes after each.
    One(oneshot::Sender<()>, thread::JoinHandle<()>),
    Many(Runtime),
}

impl Driver {
    fn new(runtime: Runtime, threads: usize) -> io::Result<Self> {
        if threads > 1 {
            return Ok(Self::Many(runtime));
        }
        let (stop, stopped) = oneshot::channel();
        let run = move || {
            let _ = runtime.block_on(stopped);
            runtime.shutdown_timeout(LAST_WORDS);
        };
        let thread = thread::Builder::new().name(NAME.to_owned()).spawn(run)?;
        Ok(Self::One(stop, thread))
    }

    fn end(self) {
        match self {
            Self::One(stop, thread) => {
                drop(stop);
                let _ = thread.join();
            }
            Self::Many(runtime) => runtime.shutdown_timeout(LAST_WORDS),
        }
    }
}

const NAME: &str = "forebay-grpc";
/// For what runs when the server closes.
const LAST_WORDS: Duration = Duration::from_secs(1);

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Server {
    /// Listens on each `address:port` or `unix:path`. Port 0: the first takes any, the others the same.
    pub fn start(addresses: &[String], config: Config, tls: Tls) -> io::Result<Self> {
        let threads = config.threads;
        let mut builder = if threads > 1 {
            Builder::new_multi_thread()
        } else {
            Builder::new_current_thread()
        };
        let runtime = builder
            .worker_threads(threads)
            .thread_name(NAME)
            .enable_all()
            .build()?;
        let handle = runtime.handle().clone();
        let entered = runtime.enter();
        let (listeners, port) = listen_all(addresses)?;
        let http = config.http.as_ref();
        let http = http.map(|h| listen_all(&h.addresses)).transpose()?;
        drop(entered);
        let methods = &config.methods;
        let routes = config.http.as_ref().map_or(0, |h| h.routes.len());
        let shared = Arc::new(Shared {
            refusals: (0..methods.len() + routes)
                .map(|_| AtomicUsize::default())
                .collect(),
            methods: methods.iter().map(|m| m.path.clone()).zip(0..).collect(),
            shed: Shed::new(methods.iter().map(|m| m.fields.clone()).collect()),
            leases: Arc::new(Leases::new(config.id_prefix.clone())),
            unpacking: Arc::new(Semaphore::new(threads)),
            inbox: Arc::new(Inbox::new(config.bounds)),
            connections: AtomicUsize::new(0),
            refused_connections: AtomicUsize::new(0),
            tls: RwLock::new(tls),
            config,
        });
        let (phase, watched) = watch::channel(Phase::Serving);
        let (http_phase, http_watched) = watch::channel(Phase::Serving);
        let (sender, alive) = mpsc::channel(1);
        let mut http_port = 0;
        let open = |listeners, door, watched: &watch::Receiver<Phase>| {
            let room = Arc::new(Semaphore::new(shared.config.max_connections));
            for listener in listeners {
                let (shared, phase) = (shared.clone(), watched.clone());
                let (room, alive) = (room.clone(), sender.clone());
                runtime.spawn(accept(listener, door, shared, room, phase, alive));
            }
        };
        if let Some((listeners, port)) = http {
            http_port = port;
            open(listeners, Door::Http, &http_watched);
        }
        open(listeners, Door::Grpc, &watched);
        drop(sender);
        Ok(Self {
            shared,
            port,
            http_port,
            phase,
            http_phase,
            alive: Mutex::new(Some(alive)),
            handle,
            driver: Mutex::new(Some(Driver::new(runtime, threads)?)),
        })
    }

    /// Ends calls together: their connections are woken once, and write all answers at once.
    pub fn answer(&self, ready: Vec<(Arc<Call>, Outcome)>) {
        let mut ready: Vec<_> = ready
            .into_iter()
            .filter_map(|(call, outcome)| Some((call.ending()?, outcome)))
            .collect();
        if ready.len() > 1 {
            self.handle.spawn(async move {
                for (back, outcome) in ready {
                    back.end(outcome);
                }
            });
        } else if let Some((back, outcome)) = ready.pop() {
            back.end(outcome);
        }
    }

    /// Takes these TLS settings for a port's connections from now on.
    pub fn set_tls(&self, door: Door, tls: Arc<ServerConfig>) {
        let mut own = self.shared.tls.write();
        match door {
            Door::Grpc => own.grpc = Some(tls),
            Door::Http => own.http = Some(tls),
        }
    }

    /// Stops listening for HTTP, and ends its connections as soon as they have no request. gRPC goes on.
    pub fn drain_http(&self) {
        self.http_phase.send_replace(Phase::Draining);
    }

    /// Stops listening, tells clients to go (GOAWAY), and waits for running calls. True when all
    /// connections have ended.
    pub fn drain(&self, timeout: Duration) -> bool {
        self.drain_http();
        self.phase.send_replace(Phase::Draining);
        let Some(mut alive) = self.alive.lock().take() else {
            return true;
        };
        if self.driver.lock().is_none() {
            return true;
        }
        self.handle
            .block_on(async move { tokio::time::timeout(timeout, alive.recv()).await.is_ok() })
    }

    /// Ends all that is left. Idempotent.
    pub fn close(&self) {
        self.shared.inbox.close();
        let driver = self.driver.lock().take();
        if let Some(driver) = driver {
            driver.end();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.close();
    }
}

/// The listeners of a port, and which it is; 0 for Unix sockets.
fn listen_all(addresses: &[String]) -> io::Result<(Vec<Listener>, u16)> {
    let mut listeners = Vec::with_capacity(addresses.len());
    let mut port = 0;
    for address in addresses {
        let named =
            |e: io::Error| io::Error::new(e.kind(), format!("cannot listen on {address}: {e}"));
        let (listener, own) = bind(address, port).map_err(named)?;
        listeners.push(listener);
        port = own;
    }
    Ok((listeners, port))
}

/// `port`: the one to take where the address leaves it open.
fn bind(address: &str, port: u16) -> io::Result<(Listener, u16)> {
    if let Some(path) = address.strip_prefix("unix:") {
        let path = Path::new(path);
        let socket = std::fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket());
        if socket && UnixStream::connect(path).is_err() {
            let _ = std::fs::remove_file(path); // left by a server that was killed
        }
        return Ok((Listener::Unix(UnixListener::bind(path)?), 0));
    }
    let parsed: Result<SocketAddr, _> = address.parse();
    let mut place = parsed.map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e))?;
    if place.port() == 0 {
        place.set_port(port);
    }
    let listener = std::net::TcpListener::bind(place)?;
    listener.set_nonblocking(true)?;
    let port = listener.local_addr()?.port();
    Ok((Listener::Tcp(TcpListener::from_std(listener)?), port))
}

/// What is spoken on a port.
#[derive(Clone, Copy)]
pub enum Door {
    Grpc,
    Http,
}

async fn accept(
    listener: Listener,
    door: Door,
    shared: Arc<Shared>,
    room: Arc<Semaphore>,
    mut phase: watch::Receiver<Phase>,
    alive: mpsc::Sender<()>,
) {
    loop {
        let accepted = tokio::select! {
            biased;
            _ = phase.changed() => return,
            accepted = next(&listener, &shared.config) => accepted,
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
            if let Some(stream) = welcome(stream, door, &shared, phase.clone()).await {
                match (door, &shared.config.http) {
                    (Door::Http, Some(config)) => {
                        http1::serve(stream, &peer, &shared, config, phase).await;
                    }
                    _ => connection::serve(stream, &peer, &shared, phase).await,
                }
            }
            shared.connections.fetch_sub(1, Ordering::Relaxed);
            drop((permit, alive));
        });
    }
}

async fn next(listener: &Listener, config: &Config) -> io::Result<(Box<dyn Stream>, String)> {
    match listener {
        Listener::Tcp(listener) => {
            let (stream, peer) = listener.accept().await?;
            stream.set_nodelay(true)?;
            #[cfg(target_os = "linux")]
            SockRef::from(&stream).set_tcp_user_timeout(Some(config.untaken()))?;
            let family = if peer.is_ipv4() { "ipv4" } else { "ipv6" };
            Ok((Box::new(stream), format!("{family}:{peer}")))
        }
        Listener::Unix(listener) => {
            let (stream, _) = listener.accept().await?;
            Ok((Box::new(stream), "unix:".to_owned()))
        }
    }
}

/// The connection's bytes, after its handshake where the port has TLS. None: there was none in time, or
/// the server drains, to which nothing was said yet.
async fn welcome(
    stream: Box<dyn Stream>,
    door: Door,
    shared: &Shared,
    mut phase: watch::Receiver<Phase>,
) -> Option<Box<dyn Stream>> {
    let Some(tls) = shared.tls.read().of(door) else {
        return Some(stream);
    };
    let handshake = TlsAcceptor::from(tls).accept(stream);
    let greeted = tokio::time::timeout(shared.config.receive_timeout, handshake);
    tokio::select! {
        greeted = greeted => Some(Box::new(greeted.ok()?.ok()?)),
        _ = phase.changed() => None,
    }
}

/// A connection's bytes.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}
