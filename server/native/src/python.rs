//! The module `forebay_native`, as Python sees it. `forebay_native.pyi` has its types.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue};
use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyString};

use crate::inbox::{Bounds, Call, Gone, Outcome};
use crate::metadata;
use crate::rows::{self, Number};
use crate::server::{Config, Server};
use crate::status::{self, Code, Refusal};
use crate::tls;

/// From this size on, an answer's bytes go to the socket from Python's own memory.
const COPY_BELOW: usize = 8 << 10;

#[pyclass(frozen, name = "Call", module = "forebay_native")]
struct PyCall {
    call: Arc<Call>,
}

#[pymethods]
impl PyCall {
    #[getter]
    fn method(&self) -> u32 {
        self.call.method
    }

    #[getter]
    fn message<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.call.message)
    }

    #[getter]
    fn metadata<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let dict = PyDict::new(py);
        for (name, value) in metadata::pairs(&self.call.headers) {
            dict.set_item(PyString::intern(py, name), value)?;
        }
        Ok(dict)
    }

    #[getter]
    fn peer(&self) -> &str {
        &self.call.peer
    }

    /// Seconds since the request was there in whole.
    #[getter]
    fn waited(&self) -> f64 {
        self.call.received.elapsed().as_secs_f64()
    }

    /// Seconds until the deadline, negative when it has passed; None without one.
    #[getter]
    fn time_left(&self) -> Option<f64> {
        let deadline = self.call.deadline?;
        let now = Instant::now();
        Some(match deadline.checked_duration_since(now) {
            Some(left) => left.as_secs_f64(),
            None => -now.duration_since(deadline).as_secs_f64(),
        })
    }

    /// What `take` names when this call is gone.
    fn set_owner(&self, owner: Py<PyAny>) {
        *self.call.owner.lock() = Some(Box::new(owner));
    }
}

impl Drop for PyCall {
    fn drop(&mut self) {
        // Python forgot it: the client must not wait for ever.
        let error = Refusal::new(Code::Unavailable, "the server lost this call");
        self.call.end(Outcome {
            payload: None,
            trailers: error.trailers(),
        });
    }
}

/// The bytes of a Python object. Immutable, and at one place as long as the object is held.
struct Held(#[allow(dead_code)] Py<PyBytes>, *const u8, usize);

// SAFETY: `bytes` objects never change; only the reference count needs the interpreter, and PyO3
// defers that to a thread that has it.
unsafe impl Send for Held {}
unsafe impl Sync for Held {}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: pointer and length are those of the object that is held.
        unsafe { std::slice::from_raw_parts(self.1, self.2) }
    }
}

fn payload(data: &Bound<'_, PyBytes>) -> Bytes {
    let bytes = data.as_bytes();
    if bytes.len() < COPY_BELOW {
        return Bytes::copy_from_slice(bytes);
    }
    Bytes::from_owner(Held(data.clone().unbind(), bytes.as_ptr(), bytes.len()))
}

fn headers(pairs: Vec<(String, String)>) -> HeaderMap {
    let mut map = HeaderMap::with_capacity(pairs.len() + 3);
    for (name, value) in pairs {
        // What no header can hold is left out: a trailer is no reason to lose an answer.
        if let (Ok(name), Ok(value)) = (HeaderName::try_from(name), HeaderValue::try_from(value)) {
            map.append(name, value);
        }
    }
    map
}

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
type Leavers = Vec<(Py<PyAny>, bool)>;

#[pymethods]
impl PyServer {
    #[new]
    #[pyo3(signature = (address, methods, ordinary, *, threads, max_message_bytes, max_header_bytes,
        max_connections, max_streams, max_waiting_calls, max_waiting_bytes, keepalive_s,
        keepalive_timeout_s, max_age_s, age_grace_s, receive_timeout_s, overload, tls = None))]
    #[allow(clippy::too_many_arguments, clippy::type_complexity)]
    fn new(
        py: Python<'_>,
        address: &str,
        methods: Vec<String>,
        ordinary: &str,
        threads: usize,
        max_message_bytes: usize,
        max_header_bytes: u32,
        max_connections: usize,
        max_streams: u32,
        max_waiting_calls: usize,
        max_waiting_bytes: usize,
        keepalive_s: f64,
        keepalive_timeout_s: f64,
        max_age_s: f64,
        age_grace_s: f64,
        receive_timeout_s: f64,
        overload: (String, Vec<u8>),
        tls: Option<(Vec<u8>, Vec<u8>, Option<Vec<u8>>)>,
    ) -> PyResult<Self> {
        let seconds = Duration::from_secs_f64;
        let config = Config {
            methods,
            ordinary: ordinary.into(),
            threads: threads.max(1),
            max_message_bytes,
            max_header_bytes,
            max_connections,
            max_streams,
            bounds: Bounds {
                calls: max_waiting_calls,
                bytes: max_waiting_bytes,
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
            },
        };
        let tls = tls
            .map(|(c, k, ca)| settings(&c, &k, ca.as_deref()))
            .transpose()?;
        let server = py
            .detach(|| Server::start(address, config, tls))
            .map_err(|e| PyOSError::new_err(format!("cannot listen on {address}: {e}")))?;
        Ok(Self { server })
    }

    #[getter]
    fn port(&self) -> u16 {
        self.server.port
    }

    fn take(
        &self,
        py: Python<'_>,
        most: usize,
        timeout_s: f64,
    ) -> PyResult<(Vec<Py<PyCall>>, Leavers)> {
        let inbox = &self.server.shared.inbox;
        let (taken, gone) = py.detach(|| inbox.take(most, Duration::from_secs_f64(timeout_s)));
        let calls: PyResult<_> = taken
            .into_iter()
            .map(|call| Py::new(py, PyCall { call }))
            .collect();
        let owner_of = |call: &Call| {
            let owner = call.owner.lock();
            Some(owner.as_ref()?.downcast_ref::<Py<PyAny>>()?.clone_ref(py))
        };
        let gone = gone
            .iter()
            .filter_map(|(call, why)| Some((owner_of(call)?, *why == Gone::Late)))
            .collect();
        Ok((calls?, gone))
    }

    /// Sends answers. Each is (call, code, payload or details, message, trailers).
    #[staticmethod]
    fn answer(py: Python<'_>, answers: Vec<Answer<'_>>) {
        let ready: Vec<_> = answers
            .into_iter()
            .map(|(call, code, data, message, more)| {
                let call = call.call.clone();
                // Call and owner hold each other. Dropped when the lock is free: it may run code.
                let owner = call.owner.lock().take();
                drop(owner);
                let payload = (code == 0).then(|| payload(&data));
                let details = if code == 0 { &b""[..] } else { data.as_bytes() };
                let trailers = status::trailers(code, &message, details, headers(more));
                (call, Outcome { payload, trailers })
            })
            .collect();
        // Waking the transport's threads takes system calls: others may run Python meanwhile.
        py.detach(|| {
            for (call, outcome) in ready {
                call.end(outcome);
            }
        });
    }

    #[pyo3(signature = (certificate, key, client_ca = None))]
    fn set_tls(&self, certificate: &[u8], key: &[u8], client_ca: Option<&[u8]>) -> PyResult<()> {
        self.server.set_tls(settings(certificate, key, client_ca)?);
        Ok(())
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

fn settings(
    certificate: &[u8],
    key: &[u8],
    client_ca: Option<&[u8]>,
) -> PyResult<Arc<rustls::ServerConfig>> {
    tls::config(&tls::Pem {
        certificate,
        key,
        client_ca,
    })
    .map_err(PyValueError::new_err)
}

type Columns = Vec<Vec<Py<PyString>>>;

/// Reads rows of google.protobuf.Struct.
#[pyclass(frozen, name = "RowReader", module = "forebay_native")]
struct PyRowReader {
    numbers: Vec<Number>,
    strings: Vec<String>,
}

#[pymethods]
impl PyRowReader {
    #[new]
    fn new(numbers: Vec<(String, f64, f64, bool)>, strings: Vec<String>) -> Self {
        let number = |(name, least, most, needed)| Number {
            name,
            least,
            most,
            needed,
        };
        Self {
            numbers: numbers.into_iter().map(number).collect(),
            strings,
        }
    }

    /// A matrix of numbers, columns of strings, and a flag per row.
    #[allow(clippy::needless_pass_by_value)] // PyO3 makes it for the call
    fn read<'py>(
        &self,
        py: Python<'py>,
        rows: Vec<Bound<'py, PyBytes>>,
    ) -> (Bound<'py, PyBytes>, Columns, Bound<'py, PyBytes>) {
        let mut values = Vec::with_capacity(rows.len() * self.numbers.len() * 8);
        let mut columns: Columns = self.strings.iter().map(|_| Vec::new()).collect();
        let mut odd = Vec::with_capacity(rows.len());
        for data in &rows {
            let row = rows::read(data.as_bytes(), &self.numbers, &self.strings);
            odd.push(u8::from(row.is_none()));
            for i in 0..self.numbers.len() {
                let value = row.as_ref().map_or(f64::NAN, |r| r.numbers[i]);
                values.extend_from_slice(&value.to_ne_bytes());
            }
            for (i, column) in columns.iter_mut().enumerate() {
                let text = row.as_ref().map_or("", |r| r.strings[i]);
                column.push(PyString::new(py, text).unbind());
            }
        }
        (PyBytes::new(py, &values), columns, PyBytes::new(py, &odd))
    }
}

#[pymodule]
fn forebay_native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_class::<PyRowReader>()?;
    module.add_class::<PyCall>()?;
    module.add_class::<PyServer>()
}
