//! The module `forebay_native`, as Python sees it. `forebay_native.pyi` has its types.

use std::fs::OpenOptions;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use ::http::{HeaderName, HeaderValue, StatusCode};
use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::types::{PyBytes, PyDict};

use crate::call::{Call, Outcome};
use crate::http1;
use crate::inbox::{Bounds, Gone};
use crate::metadata;
use crate::server::{Config, Door, Method, Server, Tls};
use crate::shed::Holds;
use crate::status::{self, Code, Refusal};
use crate::tls;

use calls::{Arrival, PyCall, arrival, payload};
use leases::{PyLease, PyRecipe};

mod calls;
mod http;
mod leases;
mod records;

#[pyclass(frozen, name = "Server", module = "forebay_native")]
struct PyServer {
    server: Server,
}

type Answer<'py> = (
    PyRef<'py, PyCall>,
    u8,
    Bound<'py, PyBytes>,
    String,
    Vec<(String, String)>,
);
type HttpAnswer<'py> = (
    PyRef<'py, PyCall>,
    u16,
    Bound<'py, PyBytes>,
    Vec<(String, String)>,
);
type Leavers = Vec<(Py<PyAny>, &'static str)>;
/// Contents of PEM files: certificate chain, key, authority of client certificates.
type PyPem = (Vec<u8>, Vec<u8>, Option<Vec<u8>>);
#[pymethods]
impl PyServer {
    #[new]
    #[pyo3(signature = (addresses, methods, ordinary, *, threads, max_message_bytes, max_header_bytes,
        max_connections, max_streams, max_waiting_calls, max_waiting_bytes, max_waiting_s, keepalive_s,
        keepalive_timeout_s, max_age_s, age_grace_s, receive_timeout_s, overload, too_large, id_prefix = String::new(), tls = None, http = None,
        http_tls = None))]
    #[allow(
        clippy::too_many_arguments,
        clippy::type_complexity,
        clippy::needless_pass_by_value
    )]
    fn new(
        py: Python<'_>,
        addresses: Vec<String>,
        methods: Vec<(String, Vec<u64>, bool)>,
        ordinary: &str,
        threads: usize,
        max_message_bytes: usize,
        max_header_bytes: u32,
        max_connections: usize,
        max_streams: u32,
        max_waiting_calls: usize,
        max_waiting_bytes: usize,
        max_waiting_s: f64,
        keepalive_s: f64,
        keepalive_timeout_s: f64,
        max_age_s: f64,
        age_grace_s: f64,
        receive_timeout_s: f64,
        overload: (String, Vec<u8>, f64),
        too_large: Vec<u8>,
        id_prefix: String,
        tls: Option<PyPem>,
        http: Option<http::PyHttp>,
        http_tls: Option<PyPem>,
    ) -> PyResult<Self> {
        let seconds = Duration::from_secs_f64;
        let method = |(path, fields, streams)| Method {
            path,
            fields,
            streams,
        };
        let config = Config {
            methods: methods.into_iter().map(method).collect(),
            ordinary: ordinary.into(),
            threads: threads.max(1),
            max_message_bytes,
            max_header_bytes,
            max_connections,
            max_streams,
            bounds: Bounds {
                calls: max_waiting_calls,
                bytes: max_waiting_bytes,
                wait: seconds(max_waiting_s),
            },
            keepalive: seconds(keepalive_s),
            keepalive_timeout: seconds(keepalive_timeout_s),
            max_age: (max_age_s > 0.0).then(|| seconds(max_age_s)),
            age_grace: seconds(age_grace_s),
            receive_timeout: seconds(receive_timeout_s),
            overload: Refusal {
                code: Code::ResourceExhausted,
                message: overload.0,
                details: overload.1,
                retry: Duration::try_from_secs_f64(overload.2).ok(),
            },
            too_large,
            id_prefix,
            http: http.map(http::PyHttp::config).transpose()?,
        };
        let tls_of = |pem: Option<PyPem>, door| {
            let settings = |(c, k, ca): PyPem| settings(&c, &k, ca.as_deref(), door);
            pem.map(settings).transpose()
        };
        let tls = Tls {
            grpc: tls_of(tls, Door::Grpc)?,
            http: tls_of(http_tls, Door::Http)?,
        };
        let server = py
            .detach(|| Server::start(&addresses, config, tls))
            .map_err(|e| PyOSError::new_err(e.to_string()))?;
        Ok(Self { server })
    }

    #[getter]
    fn port(&self) -> u16 {
        self.server.port
    }

    #[getter]
    fn http_port(&self) -> u16 {
        self.server.http_port
    }

    fn take<'py>(
        &self,
        py: Python<'py>,
        most: usize,
        timeout_s: f64,
    ) -> PyResult<(Vec<Arrival<'py>>, Leavers)> {
        let inbox = &self.server.shared.inbox;
        let (taken, gone) = py.detach(|| inbox.take(most, Duration::from_secs_f64(timeout_s)));
        let now = Instant::now();
        let calls: PyResult<_> = taken.into_iter().map(|c| arrival(py, c, now)).collect();
        let owner_of = |call: &Call| {
            let owner = call.owner.lock();
            Some(owner.as_ref()?.downcast_ref::<Py<PyAny>>()?.clone_ref(py))
        };
        let gone = gone
            .iter()
            .filter_map(|(call, why)| {
                let why = match why {
                    Gone::Cancelled => "cancelled",
                    Gone::Late => "late",
                    Gone::Ready => "ready",
                };
                Some((owner_of(call)?, why))
            })
            .collect();
        Ok((calls?, gone))
    }

    /// Sends answers of calls that went well. Each gets the trailers in `shared`, and one of its own.
    #[allow(clippy::needless_pass_by_value)] // PyO3 makes them for the call
    fn answer_well(
        &self,
        py: Python<'_>,
        calls: Vec<PyRef<'_, PyCall>>,
        payloads: Vec<Bound<'_, PyBytes>>,
        own: &str,
        values: Vec<PyBackedStr>,
        shared: Vec<(String, String)>,
    ) -> PyResult<()> {
        if payloads.len() != calls.len() || values.len() != calls.len() {
            return Err(PyValueError::new_err("an answer for each call is needed"));
        }
        let own = HeaderName::try_from(own).map_err(|e| PyValueError::new_err(e.to_string()))?;
        let trailers = status::trailers(0, "", b"", metadata::map(shared));
        let mut ready = Vec::with_capacity(calls.len());
        for ((call, data), value) in calls.iter().zip(&payloads).zip(&values) {
            drop(call.call.owner.lock().take());
            let mut trailers = trailers.clone();
            if let Ok(value) = HeaderValue::from_str(value) {
                trailers.insert(own.clone(), value);
            }
            let payload = Some(payload(data));
            ready.push((call.call.clone(), Outcome::new(payload, trailers)));
        }
        py.detach(|| self.server.answer(ready));
        Ok(())
    }

    /// Sends answers. Each is (call, code, payload or details, message, trailers).
    fn answer(&self, py: Python<'_>, answers: Vec<Answer<'_>>) {
        let ready: Vec<_> = answers
            .into_iter()
            .map(|(call, code, data, message, more)| {
                let call = call.call.clone();
                // Call and owner hold each other. Dropped when the lock is free: it may run code.
                let owner = call.owner.lock().take();
                drop(owner);
                let payload = (code == 0).then(|| payload(&data));
                let details = if code == 0 { &b""[..] } else { data.as_bytes() };
                let trailers = status::trailers(code, &message, details, metadata::map(more));
                (call, Outcome::new(payload, trailers))
            })
            .collect();
        // Waking the transport's threads takes system calls: others may run Python meanwhile.
        py.detach(|| self.server.answer(ready));
    }

    /// Sends answers of calls that came by HTTP. Each is (call, status, body, headers).
    fn answer_http(&self, py: Python<'_>, answers: Vec<HttpAnswer<'_>>) {
        let ready: Vec<_> = answers
            .into_iter()
            .map(|(call, status, body, headers)| {
                let call = call.call.clone();
                let owner = call.owner.lock().take();
                drop(owner);
                let outcome = Outcome {
                    status: StatusCode::from_u16(status).unwrap_or_default(),
                    payload: Some(payload(&body)),
                    trailers: http1::headers(headers),
                };
                (call, outcome)
            })
            .collect();
        py.detach(|| self.server.answer(ready));
    }

    /// Sends messages of streams, in order. Gives the places of those whose readers are behind.
    #[allow(clippy::needless_pass_by_value)] // PyO3 makes them for the call
    #[staticmethod]
    fn send(py: Python<'_>, messages: Vec<(PyRef<'_, PyCall>, Bound<'_, PyBytes>)>) -> Vec<usize> {
        let messages = messages.iter();
        let messages: Vec<_> = messages
            .map(|(call, data)| (call.call.clone(), payload(data)))
            .collect();
        py.detach(|| {
            let sent = messages.into_iter().enumerate();
            let behind = sent.filter_map(|(at, (call, data))| call.push(data).then_some(at));
            behind.collect()
        })
    }

    /// For so long, refuses calls that ask the same as this one, without asking Python.
    #[allow(clippy::needless_pass_by_value, clippy::too_many_arguments)] // PyO3 makes it for the call
    fn refuse_alike(
        &self,
        py: Python<'_>,
        call: PyRef<'_, PyCall>,
        hold_s: f64,
        gap_s: f64,
        within_s: Option<f64>,
        by_size: bool,
        message: String,
        details: Vec<u8>,
        retry_s: f64,
    ) {
        let like_it = Holds {
            time: Duration::try_from_secs_f64(hold_s).unwrap_or_default(),
            gap: Duration::try_from_secs_f64(gap_s).unwrap_or_default(),
            within: within_s.and_then(|s| Duration::try_from_secs_f64(s).ok()),
            by_size,
        };
        let refusal = Refusal {
            code: Code::ResourceExhausted,
            message,
            details,
            retry: Duration::try_from_secs_f64(retry_s).ok(),
        };
        let (shed, inbox) = (&self.server.shared.shed, &self.server.shared.inbox);
        let Some(alike) = shed.refuse(&call.call, like_it, refusal.clone()) else {
            return;
        };
        // Also those that wait for Python already: nobody comes in behind them.
        py.detach(|| inbox.refuse(|c| shed.is_one(c, &alike).then(|| refusal.clone())));
    }

    /// Leases the right to answer calls like this one.
    #[allow(clippy::needless_pass_by_value, clippy::too_many_arguments)] // PyO3 makes it for the call
    fn lease(
        &self,
        call: PyRef<'_, PyCall>,
        recipe: PyRef<'_, PyRecipe>,
        line: String,
        calls: u64,
        items: u64,
        hold_s: f64,
        trailers: Vec<(String, String)>,
        counts: leases::PyCounts,
    ) -> PyResult<Option<PyLease>> {
        let terms = leases::terms(calls, items, hold_s, trailers, counts)?;
        let leases = &self.server.shared.leases;
        let lease = leases.lease(&call.call, recipe.recipe.clone(), line, terms);
        let whole = |lease| PyLease {
            lease,
            leases: leases.clone(),
        };
        Ok(lease.map(whole))
    }

    /// Waits until a call was answered by a lease.
    fn wait_leased(&self, py: Python<'_>, timeout_s: f64) -> bool {
        let timeout = Duration::try_from_secs_f64(timeout_s).unwrap_or_default();
        py.detach(|| self.server.shared.leases.wait(timeout))
    }

    /// The file that what leases answer is counted in. Without one, or where it cannot be opened, they
    /// answer nothing.
    fn set_journal(&self, path: Option<PathBuf>) {
        let leases = &self.server.shared.leases;
        leases.write(); // what is not written yet was answered while the one before was in force
        let open = |path| OpenOptions::new().append(true).open(path).ok();
        leases.journal.set(path.and_then(open));
    }

    /// Whether the journal was written to, and whether a line was left without an end; since the last time.
    /// And lines that it did not take.
    fn journal_state(&self) -> (bool, bool, Vec<Vec<u8>>) {
        let leases = &self.server.shared.leases;
        let journal = &leases.journal;
        (
            journal.take_dirty(),
            journal.take_torn(),
            leases.take_lost(),
        )
    }

    /// Calls that were refused here because too much waits, by method, since the last time.
    fn take_refusals(&self) -> Vec<usize> {
        let refusals = self.server.shared.refusals.iter();
        refusals.map(|n| n.swap(0, Ordering::Relaxed)).collect()
    }

    #[pyo3(signature = (certificate, key, client_ca = None, *, http = false))]
    fn set_tls(
        &self,
        certificate: &[u8],
        key: &[u8],
        client_ca: Option<&[u8]>,
        http: bool,
    ) -> PyResult<()> {
        let door = door_of(http);
        let tls = settings(certificate, key, client_ca, door)?;
        self.server.set_tls(door, tls);
        Ok(())
    }

    fn drain_http(&self) {
        self.server.drain_http();
    }

    fn drain(&self, py: Python<'_>, timeout_s: f64) -> bool {
        py.detach(|| self.server.drain(Duration::from_secs_f64(timeout_s)))
    }

    fn close(&self, py: Python<'_>) {
        py.detach(|| self.server.close());
    }

    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let shared = &self.server.shared;
        let dict = PyDict::new(py);
        let count = |n: &std::sync::atomic::AtomicUsize| n.load(Ordering::Relaxed);
        dict.set_item("connections", count(&shared.connections))?;
        dict.set_item("refused_connections", count(&shared.refused_connections))?;
        dict.set_item("waiting_calls", shared.inbox.waiting())?;
        dict.set_item("held_bytes", shared.inbox.held())?;
        dict.set_item("refused_calls", count(&shared.inbox.refused))?;
        dict.set_item("abandoned_calls", count(&shared.inbox.abandoned))?;
        Ok(dict)
    }
}

const fn door_of(http: bool) -> Door {
    if http { Door::Http } else { Door::Grpc }
}

#[pyfunction]
#[pyo3(signature = (certificate, key, client_ca = None, *, http = false))]
fn check_tls(certificate: &[u8], key: &[u8], client_ca: Option<&[u8]>, http: bool) -> PyResult<()> {
    settings(certificate, key, client_ca, door_of(http)).map(drop)
}

fn settings(
    certificate: &[u8],
    key: &[u8],
    client_ca: Option<&[u8]>,
    door: Door,
) -> PyResult<Arc<rustls::ServerConfig>> {
    let pem = tls::Pem {
        certificate,
        key,
        client_ca,
    };
    let (section, protocol) = match door {
        Door::Grpc => ("grpc", "h2"),
        Door::Http => ("http", "http/1.1"),
    };
    tls::config(&pem, protocol).map_err(|e| PyValueError::new_err(format!("{section}.{e}")))
}

#[pymodule]
fn forebay_native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_function(wrap_pyfunction!(records::split, module)?)?;
    module.add_class::<records::PySplit>()?;
    module.add_class::<records::PyFeatureReader>()?;
    module.add_function(wrap_pyfunction!(records::column_sizes, module)?)?;
    module.add_function(wrap_pyfunction!(check_tls, module)?)?;
    module.add_function(wrap_pyfunction!(leases::tree_visits, module)?)?;
    module.add_class::<PyRecipe>()?;
    module.add_class::<PyLease>()?;
    module.add_class::<PyCall>()?;
    module.add_class::<PyServer>()
}
