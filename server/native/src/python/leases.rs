//! Leases as Python sees them.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Arc;
use std::time::Duration;

use http::HeaderName;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::lease::recipe::{Ending, Recipe, Table};
use crate::lease::{Counts, Lease, Leases, Terms};
use crate::metadata;
use crate::rows::Number;
use crate::trees::ensemble::Ensemble;

/// How many nodes a row visits at most in the trees of this number; None where there are none, or where they
/// give a row several values.
#[pyfunction]
pub fn tree_visits(number: i64) -> Option<usize> {
    Ensemble::find(number)
        .filter(|e| e.targets() == 1)
        .map(|e| e.visits())
}

#[pyclass(frozen, name = "Recipe", module = "forebay_native")]
pub struct PyRecipe {
    pub recipe: Arc<Recipe>,
}

#[pymethods]
impl PyRecipe {
    #[new]
    #[allow(clippy::too_many_arguments, clippy::type_complexity)]
    fn new(
        field: u64,
        trees: i64,
        numbers: Option<Vec<(String, f64, f64, bool)>>,
        raw: Option<(usize, usize)>,
        before: Vec<u8>,
        each: Vec<u8>,
        double: bool,
        endings: Vec<Option<(Vec<u8>, Option<usize>)>>,
    ) -> PyResult<Self> {
        let forest = Ensemble::find(trees).filter(|e| e.targets() == 1);
        let forest = forest.ok_or_else(|| PyValueError::new_err("no such trees"))?;
        let number = |(name, least, most, needed)| Number {
            name,
            least,
            most,
            needed,
        };
        let table = match (numbers, raw) {
            (Some(numbers), None) => Table::Rows(numbers.into_iter().map(number).collect()),
            (None, Some((bytes, columns))) => Table::Raw { bytes, columns },
            _ => return Err(PyValueError::new_err("either rows or a tensor")),
        };
        let ending = |(bytes, took_at)| Ending { bytes, took_at };
        let recipe = Recipe {
            field,
            table,
            forest,
            before,
            each,
            double,
            endings: endings.into_iter().map(|e| e.map(ending)).collect(),
        };
        match recipe.fault() {
            Some(why) => Err(PyValueError::new_err(why)),
            None => Ok(Self {
                recipe: Arc::new(recipe),
            }),
        }
    }
}

pub type PyCounts = Vec<(String, i64, bool)>;

/// Terms as Python says them.
pub fn terms(
    calls: u64,
    items: u64,
    hold_s: f64,
    trailers: Vec<(String, String)>,
    counts: PyCounts,
) -> PyResult<Terms> {
    let count = |(name, base, items): (String, i64, bool)| {
        let name = HeaderName::try_from(name).map_err(|e| PyValueError::new_err(e.to_string()))?;
        let of = if items { Counts::Items } else { Counts::Calls };
        Ok((name, base, of))
    };
    Ok(Terms {
        hold: Duration::try_from_secs_f64(hold_s).unwrap_or_default(),
        calls,
        items,
        trailers: metadata::map(trailers),
        counts: counts.into_iter().map(count).collect::<PyResult<_>>()?,
    })
}

#[pyclass(frozen, name = "Lease", module = "forebay_native")]
pub struct PyLease {
    pub lease: Arc<Lease>,
    pub leases: Arc<Leases>,
}

/// Calls that say the same of themselves: rows of each, `traceparent`; then the ends of their lines in the log,
/// seconds of each, and the model's seconds of all.
type Group = (usize, Option<String>, String, Vec<f64>, f64);

#[pymethods]
impl PyLease {
    fn renew(
        &self,
        calls: u64,
        items: u64,
        hold_s: f64,
        trailers: Vec<(String, String)>,
        counts: PyCounts,
    ) -> PyResult<bool> {
        let terms = terms(calls, items, hold_s, trailers, counts)?;
        Ok(self.lease.renew(terms))
    }

    fn end(&self) -> (u64, u64) {
        self.leases.end(&self.lease)
    }

    fn left(&self) -> (u64, u64) {
        self.lease.left()
    }

    fn take(&self) -> Vec<Group> {
        let mut groups: BTreeMap<(usize, Option<String>), Group> = BTreeMap::new();
        for one in self.lease.take() {
            let key = (one.rows, one.traceparent);
            let new = || (key.0, key.1.clone(), String::new(), Vec::new(), 0.0);
            let group = groups.entry(key.clone()).or_insert_with(new);
            let took = one.took.as_secs_f64();
            let ms = (took * 1e6).round() / 1e3;
            let (id, peer) = (&one.request_id, &one.caller.peer);
            if !group.2.is_empty() {
                group.2.push('\n');
            }
            // Nothing to be escaped is in an id, which was looked at, nor in an address.
            let _ = write!(
                group.2,
                r#""ms":{ms:?},"request_id":"{id}","peer":"{peer}"}}"#
            );
            group.3.push(took);
            group.4 += one.engine.as_secs_f64();
        }
        groups.into_values().collect()
    }
}
