//! Calls as Python sees them, and its bytes on their way to the socket.

use std::any::Any;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyString};

use crate::call::{Call, Outcome};
use crate::status::{Code, Refusal};

/// From this size on, an answer's bytes go to the socket from Python's own memory.
const COPY_BELOW: usize = 8 << 10;

#[pyclass(frozen, name = "Call", module = "forebay_native")]
pub struct PyCall {
    pub call: Arc<Call>,
}

#[pymethods]
impl PyCall {
    /// What `take` names when this call is gone.
    fn set_owner(&self, owner: Py<PyAny>) {
        *self.call.owner.lock() = Some(Box::new(owner));
    }
}

impl Drop for PyCall {
    fn drop(&mut self) {
        // Python forgot it: the client must not wait for ever.
        let error = Refusal::new(Code::Unavailable, "the server lost this call");
        self.call.end(Outcome::new(None, error.trailers()));
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

/// Bytes for the socket.
pub fn payload(data: &Bound<'_, PyBytes>) -> Bytes {
    let bytes = data.as_bytes();
    if bytes.len() < COPY_BELOW {
        return Bytes::copy_from_slice(bytes);
    }
    Bytes::from_owner(Held(data.clone().unbind(), bytes.as_ptr(), bytes.len()))
}

/// Call, method, message, metadata, peer, seconds since it was there, seconds that are left, what the
/// places of its route say.
pub type Arrival<'py> = (
    Py<PyCall>,
    u32,
    Bound<'py, PyBytes>,
    Py<PyDict>,
    Py<PyString>,
    f64,
    Option<f64>,
    Vec<String>,
);
/// Python's form of a `Caller`.
type PyCaller = (Py<PyDict>, Py<PyString>);

/// A call that Python takes.
pub fn arrival(py: Python<'_>, call: Arc<Call>, now: Instant) -> PyResult<Arrival<'_>> {
    let make = || -> Box<dyn Any + Send + Sync> {
        let dict = PyDict::new(py);
        for (name, value) in &call.caller.pairs {
            // Nothing is left to go wrong: both are strings.
            let _ = dict.set_item(PyString::intern(py, name), value);
        }
        let known: PyCaller = (dict.unbind(), PyString::new(py, &call.caller.peer).unbind());
        Box::new(known)
    };
    let known = call.caller.python.get_or_init(make);
    let (metadata, peer) = known.downcast_ref::<PyCaller>().expect("made above");
    let (metadata, peer) = (metadata.clone_ref(py), peer.clone_ref(py));
    let left = call.deadline.map(|d| match d.checked_duration_since(now) {
        Some(left) => left.as_secs_f64(),
        None => -now.duration_since(d).as_secs_f64(),
    });
    let waited = now.duration_since(call.received).as_secs_f64();
    let message = PyBytes::new(py, &call.message);
    let (method, places) = (call.method, call.places.clone());
    let call = Py::new(py, PyCall { call })?;
    Ok((call, method, message, metadata, peer, waited, left, places))
}
