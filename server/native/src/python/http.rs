//! What Python says of the HTTP port.

use std::time::Duration;

use http::{HeaderName, StatusCode};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::http1::{self, Canned, Pattern, Route};

/// Status, headers, body.
type PyCanned = (u16, Vec<(String, String)>, Vec<u8>);

/// What `http1::Config` is made of.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub struct PyHttp {
    addresses: Vec<String>,
    gateway: String,
    routes: Vec<(String, Vec<(u8, PyCanned)>)>,
    forwarded: Vec<String>,
    aside: Vec<String>,
    max_body_bytes: usize,
    timeout_s: f64,
    idle_timeout_s: f64,
    unreachable: PyCanned,
    stalled: PyCanned,
}

impl PyHttp {
    pub fn config(self) -> PyResult<http1::Config> {
        let names = |names: Vec<String>| -> PyResult<Vec<HeaderName>> {
            let name = |n| HeaderName::try_from(n).map_err(|_| PyValueError::new_err("no header"));
            names.into_iter().map(name).collect()
        };
        let canned = |(status, headers, body): PyCanned| Canned {
            status: StatusCode::from_u16(status).unwrap_or_default(),
            headers: http1::headers(headers),
            body: body.into(),
        };
        let route = |(path, errors): (String, Vec<(u8, PyCanned)>)| Route {
            pattern: Pattern::new(&path),
            errors: errors.into_iter().map(|(n, e)| (n, canned(e))).collect(),
        };
        Ok(http1::Config {
            addresses: self.addresses,
            gateway: self.gateway.into(),
            routes: self.routes.into_iter().map(route).collect(),
            forwarded: names(self.forwarded)?,
            aside: names(self.aside)?,
            max_body_bytes: self.max_body_bytes,
            timeout: Duration::from_secs_f64(self.timeout_s),
            idle_timeout: Duration::from_secs_f64(self.idle_timeout_s),
            unreachable: canned(self.unreachable),
            stalled: canned(self.stalled),
        })
    }
}
